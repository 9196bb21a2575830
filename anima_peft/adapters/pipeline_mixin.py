"""The adapter methods of a diffusers pipeline, over Anima's two components."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import AnimaLoraLoaderMixin

from . import exchange, strengths
from .anywhere import components_of, without_offloading
from .hotswap import reserve
from .naming import Components
from .strengths import Strength
from .writing import Format


class AnimaAdapterMixin(AnimaLoraLoaderMixin):
    """`load_lora_weights` and its kin, exact for every supported file; names and signatures are diffusers'."""

    @property
    def _adapted(self) -> Components:
        return components_of(self)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: exchange.Source,
        adapter_name: str | None = None,
        *,
        hotswap: bool = False,
        **hub: Any,
    ) -> None:
        """Load an adapter file; it acts at once with strength 1.0, beside those already active.

        Args:
            pretrained_model_name_or_path_or_dict: safetensors file, folder, hub repo id, or key -> tensor.
            adapter_name: name for `set_adapters`; by default `default_0`, `default_1`, …
            hotswap: replace the weights of the loaded adapter `adapter_name`; a compiled model is not compiled again.
            hub: weight_name, subfolder, revision, token, cache_dir, local_files_only.

        Raises:
            InputError: a key is not understood, nothing belongs to Anima, or (hotswap) the file does not fit; the model
                is then as it was.
        """
        with without_offloading(self):
            exchange.load_adapter(
                self._adapted, pretrained_model_name_or_path_or_dict, adapter_name, hotswap=hotswap, **hub
            )

    def enable_lora_hotswap(self, target_rank: int = 128) -> None:  # type: ignore[override]  # nothing else to set
        """Before the first adapter is loaded: leave room for this rank, so that others can be swapped in."""
        reserve(self._adapted, target_rank)

    def save_lora_weights(  # type: ignore[override]  # the stock mixin has none; other pipelines take layers here
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str = "default_0",
        *,
        format: Format = "diffusers",
        dtype: torch.dtype = torch.float32,
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """Write an adapter; see `exchange.save_adapter`. A folder gets `pytorch_lora_weights.safetensors`."""
        return exchange.save_adapter(
            self._adapted, save_directory, adapter_name, format=format, dtype=dtype, metadata=metadata
        )

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: Strength | Sequence[Strength | None] | None = None,
    ) -> None:
        """Let exactly these adapters act, each with a number or numbers per block; see `strengths.set_adapters`."""
        strengths.set_adapters(self._adapted, adapter_names, adapter_weights)

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that act."""
        return strengths.active_adapters(self._adapted)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Component -> names of the adapters it carries."""
        return strengths.list_adapters(self._adapted)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters; the others stay as they are."""
        with without_offloading(self):
            strengths.delete_adapters(self._adapted, adapter_names)

    def disable_lora(self) -> None:
        """Switch all adapters off without forgetting which were active."""
        strengths.set_enabled(self._adapted, False)

    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        strengths.set_enabled(self._adapted, True)

    def fuse_lora(  # type: ignore[override]  # no `components`: an adapter is fused wherever it lives
        self, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None
    ) -> None:
        """Add adapters to the base weights, so that they cost no time; see `strengths.fuse`."""
        with without_offloading(self):
            strengths.fuse(self._adapted, lora_scale, adapter_names)
        self._merged_adapters = strengths.fused_adapters(self._adapted)

    def unfuse_lora(self) -> None:  # type: ignore[override]
        """Subtract fused adapters again; see `strengths.unfuse` for how exact that is."""
        with without_offloading(self):
            strengths.unfuse(self._adapted)
        self._merged_adapters = set()

    def unload_lora_weights(self) -> None:
        """Remove all adapters; weights that were not fused are then bit for bit the base's."""
        with without_offloading(self):
            strengths.unload(self._adapted)
