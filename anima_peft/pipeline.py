"""`AnimaPipeline`: text and pictures to pictures, in the shape of diffusers' classic pipelines.

The arithmetic is that of diffusers' `AnimaModularPipeline`, to which it is equal to the last bit in fp32. On top come
what modular pipelines lack: CPU offload, `from_pipe`, callbacks, `guidance_scale` per call and latent output.

Letters: B prompts, N = B * num_images_per_prompt pictures, H and W height and width in pixels, h = H/8 and w = W/8,
L rows of conditioning (512 unless a prompt is longer), D their width.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.models import AnimaTextConditioner, AutoencoderKLQwenImage, CosmosTransformer3DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.pipelines.qwenimage.pipeline_qwenimage import retrieve_timesteps
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from transformers import Qwen2Tokenizer, Qwen3Model, T5TokenizerFast  # type: ignore[attr-defined]  # an alias

from .adapters.pipeline_mixin import AnimaAdapterMixin
from .errors import InputError
from .models.compat import ensure_cosmos_without_torchvision
from .models.latents import decode_latents, encode_latents
from .models.precision import enable_fp32_residual, set_qk_norm_eps
from .models.text import TextInputs, condition_text, encode_text, find_cut_prompts
from .pipeline_inputs import (
    ModelSizes,
    check_callback_tensors,
    check_prompts,
    check_sampling,
    resolve_latents_shape,
    resolve_size,
)
from .pipeline_loading import AnimaPipelineLoader

ensure_cosmos_without_torchvision()

logger = logging.getLogger(__name__)

Generators = torch.Generator | list[torch.Generator] | None
StepCallback = Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any] | None]


class AnimaPipeline(AnimaPipelineLoader, AnimaAdapterMixin):
    """Text-to-image and image-to-image with Anima.

    Args:
        text_encoder: Qwen3.
        tokenizer: Qwen3's tokenizer.
        t5_tokenizer: T5's tokenizer; there is no T5 model.
        text_conditioner: maps Qwen3's states and T5's ids to the DiT's conditioning.
        transformer: the DiT. Its query and key norms are set to the original model's eps of 1e-6, in place;
            in float16 its residual stream is kept in float32.
        vae: the Qwen-Image VAE.
        scheduler: flow matching, `shift=3.0` in the published model.

    Parts that a call does not need may be None, such as the text parts where embeddings are given.
    """

    model_cpu_offload_seq: Any = "text_encoder->text_conditioner->transformer->vae"
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds")

    text_encoder: Any
    tokenizer: Any
    t5_tokenizer: Any
    text_conditioner: Any
    transformer: Any
    vae: Any
    scheduler: Any

    def __init__(
        self,
        text_encoder: Qwen3Model,
        tokenizer: Qwen2Tokenizer,
        t5_tokenizer: T5TokenizerFast,
        text_conditioner: AnimaTextConditioner,
        transformer: CosmosTransformer3DModel,
        vae: AutoencoderKLQwenImage,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ):
        super().__init__()
        self.register_modules(
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            t5_tokenizer=t5_tokenizer,
            text_conditioner=text_conditioner,
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
        )
        if transformer is not None:
            set_qk_norm_eps(transformer)
            if transformer.dtype is torch.float16:
                enable_fp32_residual(transformer)
        self.vae_scale_factor = 8 if vae is None else vae.spatial_compression_ratio
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_convert_rgb=True)
        self._guidance_scale = 4.0
        self._num_timesteps = 0
        self._interrupt = False

    @property
    def guidance_scale(self) -> float:
        """Scale of classifier-free guidance in the current or last call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether a second, unconditional pass is needed: at any scale but 1."""
        return not math.isclose(self._guidance_scale, 1.0)

    @property
    def num_timesteps(self) -> int:
        """Number of steps in the current or last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set it to True, from a callback or another thread, to stop after the step at hand."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    def enable_vae_slicing(self) -> None:
        """Let the VAE take one picture of a batch at a time. Saves memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Undo `enable_vae_slicing`."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Let the VAE work on overlapping tiles. Saves memory on large pictures and changes them slightly."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Undo `enable_vae_tiling`."""
        self.vae.disable_tiling()

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str],
        device: torch.device | str | None = None,
        max_sequence_length: int = 512,
    ) -> torch.Tensor:
        """Encode prompts to the DiT's conditioning.

        Args:
            prompt: one text or B texts; "" is the unconditional one.
            device: where the models run; None for the pipeline's own device.
            max_sequence_length: tokens that are kept. A prompt that is cut is logged as a warning.

        Returns:
            (B, L, D) in the DiT's dtype, zero in the rows after the text; L is 512 or, if longer, the longest prompt.

        Raises:
            InputError: no prompts, or a part that encodes text is missing.
        """
        device = device or self._execution_device
        embeds = condition_text(self.text_conditioner, self.encode_text(prompt, device, max_sequence_length))
        return embeds.to(self.transformer.dtype)

    def encode_text(self, prompt: str | list[str], device: torch.device | str, max_length: int = 512) -> TextInputs:
        """The first half of `encode_prompt`: what the text conditioner reads, for B texts."""
        if None in (self.text_encoder, self.tokenizer, self.t5_tokenizer, self.text_conditioner):
            raise InputError(
                "This pipeline was built without all text parts. Give `prompt_embeds` and, with guidance, "
                "`negative_prompt_embeds`."
            )
        for counts in find_cut_prompts(self.tokenizer, self.t5_tokenizer, prompt, max_length).values():
            logger.warning("A prompt of %d tokens was cut at max_sequence_length = %d.", max(counts), max_length)
        return encode_text(self.text_encoder, self.tokenizer, self.t5_tokenizer, prompt, max_length, device)

    def _prepare_embeds(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        embeds: dict[str, torch.Tensor | None],
        prompts: int,
        num_images_per_prompt: int,
        max_length: int,
        device: torch.device,
    ) -> dict[str, torch.Tensor]:
        """Conditioning (N, L, D) under `prompt_embeds` and, with guidance, `negative_prompt_embeds`."""
        texts = {"prompt_embeds": prompt}
        if self.do_classifier_free_guidance:
            negative_prompt = negative_prompt or ""
            texts["negative_prompt_embeds"] = (
                [negative_prompt] * prompts if isinstance(negative_prompt, str) else negative_prompt
            )
        # All texts pass the text encoder before any passes the conditioner, so that offloading moves each model once.
        encoded = {
            name: self.encode_text(text, device, max_length)
            for name, text in texts.items()
            if embeds[name] is None and text is not None
        }
        ready = {}
        for name in texts:
            given = embeds[name]
            tensor = condition_text(self.text_conditioner, encoded[name]) if given is None else given
            tensor = tensor.to(device=device, dtype=self.transformer.dtype)
            ready[name] = tensor.repeat_interleave(num_images_per_prompt, dim=0)
        return ready

    def _encode_image(
        self, image: PipelineImageInput, height: int, width: int, prompts: int, generator: Generators, device: Any
    ) -> torch.Tensor:
        """Latents (1 or B, 16, 1, h, w) fp32 of one picture, or of one for each prompt, resized to H x W."""
        pixels = self.image_processor.preprocess(image, height=height, width=width).to(device)
        if pixels.shape[1] != 3 or pixels.shape[0] not in (1, prompts):
            raise InputError(
                f"`image` holds {pixels.shape[0]} pictures of {pixels.shape[1]} channels. Expected 3 channels, and one "
                f"picture or one for each of the {prompts} prompts."
            )
        # A list of generators makes the reference encode one by one, which can differ from a batch in the last bit.
        batches = pixels.split(1) if isinstance(generator, list) else [pixels]
        return torch.cat([encode_latents(self.vae, batch) for batch in batches]).unsqueeze(2)

    def _set_timesteps(
        self, num_inference_steps: int, sigmas: Sequence[float] | None, strength: float, device: Any
    ) -> torch.Tensor:
        """Timesteps (steps,) in [0, 1000], of which img2img skips the first share of 1 - `strength`."""
        if sigmas is None:
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()
        timesteps, steps = retrieve_timesteps(self.scheduler, device=device, sigmas=list(sigmas))
        skipped = int(max(steps - min(steps * strength, steps), 0)) * self.scheduler.order
        self.scheduler.set_begin_index(skipped)
        self._num_timesteps = len(timesteps) - skipped
        return timesteps[skipped:]

    def _denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        embeds: dict[str, torch.Tensor],
        callback: StepCallback | None,
        callback_tensors: Sequence[str],
    ) -> torch.Tensor:
        """Run the sampler over `timesteps` from the noisy `latents` (N, 16, 1, h, w)."""
        dtype = self.transformer.dtype
        # Nothing is padded, and the model resizes the mask to the latents in any case.
        padding_mask = latents.new_zeros(1, 1, *latents.shape[-2:], dtype=dtype)

        def velocity(conditioning: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            """(N, 16, 1, h, w), for conditioning (N, L, D) and sigma (N,) in fp32."""
            return self.transformer(
                hidden_states=latents.to(dtype),
                timestep=sigma,
                encoder_hidden_states=conditioning.to(dtype),
                padding_mask=padding_mask,
                return_dict=False,
            )[0]

        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for step, timestep in enumerate(timesteps):
                if self.interrupt:
                    break
                # The reference rounds sigma to the DiT's dtype. At bf16 the model would be told another noise level
                # than the one it sees (0.9003 becomes 0.8984), so it stays in fp32 here.
                sigma = timestep.expand(latents.shape[0]).float() / self.scheduler.config.num_train_timesteps
                prediction = velocity(embeds["prompt_embeds"], sigma)
                if self.do_classifier_free_guidance:
                    unconditional = velocity(embeds["negative_prompt_embeds"], sigma)
                    prediction = unconditional + self._guidance_scale * (prediction - unconditional)
                latents = self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]
                if callback is not None:
                    offered = {"latents": latents, **embeds}
                    wanted = {name: offered[name] for name in callback_tensors if name in offered}
                    changed = callback(self, step, timestep, wanted) or {}
                    latents = changed.get("latents", latents)
                    embeds |= {name: changed[name] for name in embeds if name in changed}
                progress_bar.update()
        return latents

    @torch.no_grad()
    def __call__(  # long by its arguments and their description; the steps are one call each
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.9,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make pictures from prompts, or from prompts and pictures.

        Args:
            prompt: one text or B texts; None if `prompt_embeds` is given.
            negative_prompt: one text, or B texts; None is the empty text. Unused at a guidance scale of 1.
            image: turns on img2img: one picture, or one for each prompt; PIL, numpy (B, H, W, 3) or tensor
                (B, 3, H, W) in [0, 1]. It is resized to `height` and `width`.
            strength: how much of `image` is redrawn, in (0, 1].
            height: of the result in pixels, a multiple of 16; default 1024, or as `latents` have it.
            width: likewise.
            num_inference_steps: steps of the whole schedule; img2img runs the last `strength` share of them.
            sigmas: noise levels in (0, 1] instead of the even schedule; the scheduler's shift is applied to them.
            guidance_scale: of classifier-free guidance; 1.0 turns it off and halves the work.
            num_images_per_prompt: pictures for each prompt; N = B * num_images_per_prompt.
            generator: one, or a list of N, for the noise.
            latents: noise (N, 16, 1, h, w) to start from instead of drawing it.
            prompt_embeds: (B, L, D) from `encode_prompt`.
            negative_prompt_embeds: (B, L, D) likewise.
            output_type: "pil", "np" (N, H, W, 3) in [0, 1], "pt" (N, 3, H, W) in [0, 1], or "latent", the normalised
                latents (N, 16, 1, h, w) that `decode_latents` takes.
            return_dict: False for a tuple instead of `ImagePipelineOutput`.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after every step; the tensors that it
                returns replace the pipeline's own.
            callback_on_step_end_tensor_inputs: which tensors it gets, out of latents, prompt_embeds and
                negative_prompt_embeds.
            max_sequence_length: tokens of a prompt that are kept. A prompt that is cut is logged as a warning.

        Returns:
            `ImagePipelineOutput` with the N pictures in `images`.

        Raises:
            InputError: an argument is wrong or does not fit the others.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        check_callback_tensors(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        check_sampling(
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            strength=strength,
            max_sequence_length=max_sequence_length,
            output_type=output_type,
        )
        embeds = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        sizes = ModelSizes.of(self.transformer, self.text_conditioner, self.vae_scale_factor)
        prompts = check_prompts(prompt, negative_prompt, **embeds, sizes=sizes)
        height, width = resolve_size(height, width, latents, sizes)
        shape = resolve_latents_shape((height, width), prompts, num_images_per_prompt, generator, latents, sizes)

        self._guidance_scale = guidance_scale
        self._interrupt = False
        device = self._execution_device
        ready = self._prepare_embeds(
            prompt, negative_prompt, embeds, prompts, num_images_per_prompt, max_sequence_length, device
        )
        timesteps = self._set_timesteps(num_inference_steps, sigmas, 1.0 if image is None else strength, device)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device=device, dtype=torch.float32)
        if image is not None:
            clean = self._encode_image(image, height, width, prompts, generator, device)
            clean = clean.repeat_interleave(shape[0] // clean.shape[0], dim=0)
            latents = self.scheduler.scale_noise(clean, timesteps[:1].repeat(shape[0]), latents)
        latents = self._denoise(latents, timesteps, ready, callback_on_step_end, callback_on_step_end_tensor_inputs)
        images: Any = latents
        if output_type != "latent":
            pixels = decode_latents(self.vae, latents)
            images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def register_with_diffusers() -> None:
    """Make `DiffusionPipeline` and the `AutoPipeline` classes find `AnimaPipeline` by its name in a saved folder.

    diffusers has no hook for pipelines from outside: it looks class names up in its own namespace and in two tables.
    Calling it again changes nothing.
    """
    # Importing the tables imports all pipelines of diffusers. What transformers then logs, where torchvision is absent,
    # is about image processors that Anima does not use.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        auto_pipeline = importlib.import_module("diffusers.pipelines.auto_pipeline")
    finally:
        transformers.logging.set_verbosity(verbosity)
    diffusers.AnimaPipeline = AnimaPipeline  # type: ignore[attr-defined]
    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["anima"] = AnimaPipeline
    auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["anima"] = AnimaPipeline
