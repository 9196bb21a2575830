"""The Anima transformer: DiT and text conditioner as one diffusers model, and its adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers import AnimaTextConditioner, ConfigMixin, CosmosTransformer3DModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import unwrap_module

from .adapters import exchange, strengths
from .adapters.hotswap import reserve
from .adapters.naming import TEXT_CONDITIONER, TRANSFORMER, Components, base_weights
from .adapters.strengths import Strength
from .adapters.writing import Format
from .errors import InputError
from .models.checkpoints import build_empty
from .models.compat import ensure_cosmos_without_torchvision
from .models.dit import load_dit
from .models.folders import load_part
from .models.precision import set_qk_norm_eps
from .models.sources import is_diffusers_folder, locate_model
from .models.text import TextInputs, condition_text

ensure_cosmos_without_torchvision()


class AnimaTransformerModel(ModelMixin, ConfigMixin):
    """DiT and text conditioner, the two parts an adapter lives on, behind one `forward`.

    Both are diffusers' stock classes and pass freely to and from its pipelines; an adapter added here acts there.

    Legend of shapes: B batch, H and W the picture's pixels, Lq and Lt lengths of Qwen's and T5's tokens, L rows of
    conditioning (512, or more for longer captions), D the conditioning's width (1024).

    Args:
        transformer: the DiT.
        text_conditioner: maps Qwen's hidden states and T5's token ids to the DiT's conditioning.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["CosmosTransformerBlock", "AnimaTextConditionerBlock"]  # noqa: RUF012 - diffusers' own way
    _repeated_blocks = ["CosmosTransformerBlock"]  # noqa: RUF012
    ignore_for_config = [TRANSFORMER, TEXT_CONDITIONER]  # noqa: RUF012

    @register_to_config
    def __init__(self, transformer: CosmosTransformer3DModel, text_conditioner: AnimaTextConditioner):
        super().__init__()
        self.transformer: Any = transformer
        self.text_conditioner: Any = text_conditioner

    @classmethod
    def from_single_file(
        cls, path: str | os.PathLike[str], torch_dtype: torch.dtype | None = None
    ) -> AnimaTransformerModel:
        """Load the checkpoint that ComfyUI users have: DiT and `llm_adapter` in one safetensors file.

        Args:
            path: the file; sizes are read from its weights.
            torch_dtype: dtype of all weights; None keeps the file's.

        Raises:
            InputError: not an Anima checkpoint, or a key is missing, unexpected or misshapen.
        """
        return cls(*load_dit(path, torch_dtype)).eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        torch_dtype: torch.dtype | None = None,
        **hub_options: Any,
    ) -> AnimaTransformerModel:
        """Load from a diffusers folder, a hub repo id, or a single file.

        Args:
            pretrained_model_name_or_path: folder or repo with `transformer/` and `text_conditioner/`.
            torch_dtype: dtype of all weights; None means float32 for a folder, as in diffusers.
            hub_options: for a repo: revision, token, cache_dir, local_files_only, force_download.

        Raises:
            InputError: nothing there, or a key is missing, unexpected or misshapen.
        """
        path = locate_model(pretrained_model_name_or_path, (TRANSFORMER, TEXT_CONDITIONER), **hub_options)
        if path.is_file():
            return cls.from_single_file(path, torch_dtype)
        if not is_diffusers_folder(path):
            raise InputError(f"{path}: expected a diffusers folder with `transformer/` and `text_conditioner/`.")
        transformer = load_part(path / TRANSFORMER, TRANSFORMER, torch_dtype)
        conditioner = load_part(path / TEXT_CONDITIONER, TEXT_CONDITIONER, torch_dtype)
        set_qk_norm_eps(transformer)
        return cls(transformer, conditioner).eval()

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write diffusers' subfolders `transformer/` and `text_conditioner/`.

        Adapters are not part of them (`save_lora_adapter` writes those), except for what is fused.

        Args:
            save_directory: folder, made if missing.
            options: passed to both parts' `save_pretrained`.
        """
        parts: Mapping[str, Any] = self.components
        for component, model in parts.items():
            bare = build_empty(partial(type(model).from_config, model.config))
            bare.load_state_dict(base_weights(model), assign=True)
            bare.save_pretrained(Path(save_directory) / component, **options)

    @property
    def components(self) -> Components:
        """The two stock models by diffusers' component names."""
        # Not what torch.compile puts around them: adapters are looked up by the models' own paths.
        return {
            TRANSFORMER: unwrap_module(self.transformer),
            TEXT_CONDITIONER: unwrap_module(self.text_conditioner),
        }

    def encode_prompt_embeds(
        self,
        qwen_hidden_states: torch.Tensor,
        qwen_attention_mask: torch.Tensor,
        t5_input_ids: torch.Tensor,
        t5_attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        """The DiT's conditioning.

        Args:
            qwen_hidden_states: (B, Lq, D) last hidden states; rows of padding are zeroed here.
            qwen_attention_mask: (B, Lq), 1 for real tokens.
            t5_input_ids: (B, Lt) int64.
            t5_attention_mask: (B, Lt), 1 for real tokens.

        Returns:
            (B, max(512, Lt), D); rows of padding are zero and belong to the DiT's cross-attention.
        """
        states = qwen_hidden_states * qwen_attention_mask.to(qwen_hidden_states).unsqueeze(-1)
        return condition_text(
            self.text_conditioner, TextInputs(states, qwen_attention_mask, t5_input_ids, t5_attention_mask)
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        sigma: torch.Tensor,
        prompt_embeds: torch.Tensor | None = None,
        *,
        qwen_hidden_states: torch.Tensor | None = None,
        qwen_attention_mask: torch.Tensor | None = None,
        t5_input_ids: torch.Tensor | None = None,
        t5_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the velocity eps - z.

        The text comes either as `prompt_embeds`, or as the conditioner's four inputs, so that its gradients flow
        through this one call.

        Args:
            hidden_states: noised latents, (B, 16, H/8, W/8), or (B, 16, 1, H/8, W/8).
            sigma: (B,) in [0, 1]; keep it float32, at bfloat16 the model is told another noise level.
            prompt_embeds: (B, L, D), padded with zero rows.
            qwen_hidden_states, qwen_attention_mask, t5_input_ids, t5_attention_mask: see `encode_prompt_embeds`.

        Returns:
            Velocity in the shape of `hidden_states`.

        Raises:
            ValueError: both kinds of text, or neither.
        """
        text = (qwen_hidden_states, qwen_attention_mask, t5_input_ids, t5_attention_mask)
        given = [part is not None for part in text]
        if any(given) if prompt_embeds is not None else not all(given):
            raise ValueError("give either prompt_embeds or all four inputs of the text conditioner.")
        if prompt_embeds is None:
            prompt_embeds = self.encode_prompt_embeds(*text)  # type: ignore[arg-type]  # checked above
        image = hidden_states.ndim == 4
        latents = hidden_states.unsqueeze(2) if image else hidden_states
        # All zero for Anima; the batch axis must be 1 (diffusers repeats it over the batch).
        padding_mask = latents.new_zeros(1, 1, *latents.shape[-2:])
        velocity = self.transformer(
            hidden_states=latents,
            timestep=sigma,
            encoder_hidden_states=prompt_embeds,
            padding_mask=padding_mask,
            return_dict=False,
        )[0]
        return velocity.squeeze(2) if image else velocity

    def add_adapter(
        self, config: peft.LoraConfig | peft.LoKrConfig, adapter_name: str = "default"
    ) -> list[torch.nn.Parameter]:
        """Put a new adapter on the model for training; see `adapters.exchange.add_adapter`."""
        return exchange.add_adapter(self.components, config, adapter_name)

    def load_lora_adapter(
        self, source: exchange.Source, adapter_name: str | None = "default", *, hotswap: bool = False, **hub: Any
    ) -> str:
        """Load an adapter of any supported format; see `adapters.exchange.load_adapter`."""
        return exchange.load_adapter(self.components, source, adapter_name, hotswap=hotswap, **hub)

    def enable_lora_hotswap(self, target_rank: int = 128) -> None:
        """Leave room for this rank in adapters loaded from now on; see `adapters.hotswap.reserve`."""
        reserve(self.components, target_rank)

    def save_lora_adapter(
        self,
        path: str | os.PathLike[str],
        adapter_name: str = "default",
        format: Format = "kohya",
        metadata: Mapping[str, str] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        """Write an adapter to a file; see `adapters.exchange.save_adapter`."""
        return exchange.save_adapter(self.components, path, adapter_name, format=format, dtype=dtype, metadata=metadata)

    def set_adapters(
        self, names: str | Sequence[str], weights: Strength | Sequence[Strength | None] | None = None
    ) -> None:
        """Let exactly these adapters act, each with its strength; see `adapters.strengths.set_adapters`."""
        strengths.set_adapters(self.components, names, weights)

    def delete_adapters(self, names: str | Sequence[str]) -> None:
        """Remove adapters; see `adapters.strengths.delete_adapters`."""
        strengths.delete_adapters(self.components, names)

    def fuse_lora(self, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None) -> None:
        """Add adapters to the base weights; see `adapters.strengths.fuse`."""
        strengths.fuse(self.components, lora_scale, adapter_names)

    def unfuse_lora(self) -> None:
        """Subtract fused adapters again; see `adapters.strengths.unfuse`."""
        strengths.unfuse(self.components)

    def unload_lora(self) -> None:
        """Remove all adapters and their layers; see `adapters.strengths.unload`."""
        strengths.unload(self.components)
