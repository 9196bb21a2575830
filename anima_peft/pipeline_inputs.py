"""What `AnimaPipeline` refuses before it computes anything, each with a message that says what was expected.

Letters as in `pipeline.py`. All errors are `InputError`, which is a ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import InputError

DEFAULT_SIZE = 1024
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_SEQUENCE_LENGTH = 4096
"""The reference's own bound on `max_sequence_length`."""


@dataclass(frozen=True)
class ModelSizes:
    """What the parts of a pipeline can take.

    Attributes:
        channels: of the latents.
        scale: pixels per latent, along each axis.
        multiple: pixels per token of the DiT, along each axis.
        limit: the longest side in pixels.
        rows: least rows of conditioning.
        width: of the conditioning.
    """

    channels: int
    scale: int
    multiple: int
    limit: int
    rows: int
    width: int

    @classmethod
    def of(cls, transformer: Any, text_conditioner: Any, scale: int) -> ModelSizes:
        """Read the sizes off the models' configs; a conditioner of None has the family's 512 rows."""
        config = transformer.config
        # The rotary table has one row per position of the longest axis, and serves all three axes.
        positions = max(size // patch for size, patch in zip(config.max_size, config.patch_size, strict=True))
        multiple = scale * config.patch_size[1]
        return cls(
            channels=config.in_channels,
            scale=scale,
            multiple=multiple,
            limit=positions * multiple,
            rows=512 if text_conditioner is None else text_conditioner.config.min_sequence_length,
            width=config.text_embed_dim,
        )


def check_prompts(
    prompt: Any,
    negative_prompt: Any,
    prompt_embeds: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
    sizes: ModelSizes,
) -> int:
    """Check texts and embeddings against each other.

    Args:
        prompt: text or list of texts, if `prompt_embeds` is None.
        negative_prompt: text, list of as many texts as prompts, or None for the empty text.
        prompt_embeds: (B, L, D), if `prompt` is None.
        negative_prompt_embeds: (B, L, D), if `negative_prompt` is None.
        sizes: of the models.

    Returns:
        The number of prompts B.

    Raises:
        InputError: both or neither of a text and its embeddings, a wrong type, or numbers that differ.
    """
    _check_one_side("prompt", prompt, prompt_embeds, sizes)
    if prompt is None and prompt_embeds is None:
        raise InputError("Neither `prompt` nor `prompt_embeds` was given. Expected one of them.")
    count = _count(prompt, prompt_embeds)
    _check_one_side("negative_prompt", negative_prompt, negative_prompt_embeds, sizes)
    # One negative text serves all prompts; a list must match.
    if (isinstance(negative_prompt, list) or negative_prompt_embeds is not None) and count != _count(
        negative_prompt, negative_prompt_embeds
    ):
        raise InputError(
            f"There are {count} prompts and {_count(negative_prompt, negative_prompt_embeds)} negative ones. "
            "Expected as many of each, or one text as `negative_prompt` for all."
        )
    return count


def _check_one_side(name: str, text: Any, embeds: torch.Tensor | None, sizes: ModelSizes) -> None:
    if text is not None and embeds is not None:
        raise InputError(f"Both `{name}` and `{name}_embeds` were given. Expected only one of them.")
    is_text = isinstance(text, str) or (isinstance(text, list) and text and all(isinstance(one, str) for one in text))
    if text is not None and not is_text:
        raise InputError(f"`{name}` is {text!r}. Expected a text, or a list of at least one text.")
    if embeds is not None and (embeds.ndim != 3 or embeds.shape[1] < sizes.rows or embeds.shape[2] != sizes.width):
        raise InputError(
            f"`{name}_embeds` has shape {tuple(embeds.shape)}. Expected (prompts, {sizes.rows} or more, {sizes.width}) "
            "as `encode_prompt` gives it: the rows of zeros after the text are part of the model's input."
        )


def _count(text: Any, embeds: torch.Tensor | None) -> int:
    if embeds is not None:
        return embeds.shape[0]
    return len(text) if isinstance(text, list) else 1


def resolve_size(
    height: int | None, width: int | None, latents: torch.Tensor | None, sizes: ModelSizes
) -> tuple[int, int]:
    """The pictures' H and W in pixels: as given, else as the latents have them, else 1024.

    Raises:
        InputError: a side is no multiple of 16 or longer than the model's positions reach.
    """
    if latents is not None and latents.ndim == 5:
        height = height or latents.shape[-2] * sizes.scale
        width = width or latents.shape[-1] * sizes.scale
    height, width = height or DEFAULT_SIZE, width or DEFAULT_SIZE
    for name, value in (("height", height), ("width", width)):
        if not isinstance(value, int) or value < sizes.multiple or value % sizes.multiple:
            raise InputError(f"`{name}` is {value}. Expected a multiple of {sizes.multiple}, such as {DEFAULT_SIZE}.")
        if value > sizes.limit:
            raise InputError(f"`{name}` is {value}. The model's positions end at {sizes.limit} pixels.")
    return height, width


def check_sampling(
    *,
    num_inference_steps: int,
    sigmas: Sequence[float] | None,
    guidance_scale: float,
    strength: float,
    max_sequence_length: int,
    output_type: str,
) -> None:
    """Check the numbers that steer the sampling."""
    if num_inference_steps < 1:
        raise InputError(f"`num_inference_steps` is {num_inference_steps}. Expected at least 1.")
    if sigmas is not None and not (len(sigmas) and all(0.0 < sigma <= 1.0 for sigma in sigmas)):
        raise InputError(f"`sigmas` is {sigmas}. Expected at least one noise level in (0, 1], before any shift.")
    if not math.isfinite(guidance_scale):
        raise InputError(f"`guidance_scale` is {guidance_scale}. Expected a number; 1.0 turns guidance off.")
    if not 0.0 < strength <= 1.0:
        raise InputError(f"`strength` is {strength}. Expected a number in (0, 1]; 1.0 ignores the picture.")
    if not 1 <= max_sequence_length <= MAX_SEQUENCE_LENGTH:
        raise InputError(f"`max_sequence_length` is {max_sequence_length}. Expected 1 to {MAX_SEQUENCE_LENGTH} tokens.")
    if output_type not in OUTPUT_TYPES:
        raise InputError(f"`output_type` is {output_type!r}. Expected one of {', '.join(OUTPUT_TYPES)}.")


def resolve_latents_shape(
    size: tuple[int, int],
    prompts: int,
    num_images_per_prompt: int,
    generator: Any,
    latents: torch.Tensor | None,
    sizes: ModelSizes,
) -> tuple[int, int, int, int, int]:
    """The latents' shape (N, 16, 1, h, w), which given noise and a list of generators must fit.

    Raises:
        InputError: they do not, or no picture is asked for.
    """
    if num_images_per_prompt < 1:
        raise InputError(f"`num_images_per_prompt` is {num_images_per_prompt}. Expected at least 1.")
    pictures = prompts * num_images_per_prompt
    if isinstance(generator, list) and len(generator) != pictures:
        raise InputError(
            f"{len(generator)} generators were given for {pictures} pictures. Expected one generator, or a list with "
            "one for each picture."
        )
    shape = (pictures, sizes.channels, 1, size[0] // sizes.scale, size[1] // sizes.scale)
    if latents is not None and tuple(latents.shape) != shape:
        raise InputError(f"`latents` has shape {tuple(latents.shape)}. Expected {shape}.")
    return shape


def check_callback_tensors(names: Collection[str], allowed: Collection[str]) -> None:
    """Check the tensors that a callback asks for."""
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise InputError(
            f"`callback_on_step_end_tensor_inputs` names {', '.join(unknown)}. Expected names out of "
            f"{', '.join(allowed)}."
        )
