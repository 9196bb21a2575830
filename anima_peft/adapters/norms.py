"""Trainable norms: a delta on a norm's weight and bias that belongs to an adapter, as LoRA's factors do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge

NORM_TYPES = (torch.nn.RMSNorm, RMSNorm, torch.nn.LayerNorm)


def is_affine_norm(module: torch.nn.Module) -> bool:
    """Whether a module is a norm with a weight; the LayerNorms inside Anima's modulation have none."""
    return isinstance(module, NORM_TYPES) and getattr(module, "weight", None) is not None


class NormLayer(torch.nn.Module, BaseTunerLayer):
    """A norm whose weight is W + sum of s_i * delta_i over the active adapters (and its bias likewise).

    The deltas' part is computed beside the base's and added to its output: a delta far below the base weight's own
    precision still counts, and while all deltas are zero the output is the base's to the last bit.

    Deltas start at zero. They are named after the adapter's method (`lora_norm`, `lokr_norm`), by which PEFT knows
    that they belong to it.
    """

    adapter_layer_names = ("lora_norm", "lora_norm_bias", "lokr_norm", "lokr_norm_bias")
    other_param_names = ("scaling",)

    get_base_layer: Callable[[], Any]  # PEFT's; a type checker takes attributes of modules for tensors

    def __init__(self, base_layer: torch.nn.Module):
        super().__init__()
        self.base_layer: Any = base_layer
        for name in self.adapter_layer_names:
            setattr(self, name, torch.nn.ParameterDict())
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False
        self._active_adapter: Any = []
        self.merged_adapters: list[str] = []

    def add_delta(self, adapter_name: str, method: str) -> None:
        """Give an adapter its deltas, float32 zeros.

        Args:
            method: "lora" or "lokr".
        """
        base: Any = self.get_base_layer()
        for name, parameter in ((f"{method}_norm", base.weight), (f"{method}_norm_bias", getattr(base, "bias", None))):
            if parameter is not None:
                delta = torch.zeros_like(parameter, dtype=torch.float32)
                getattr(self, name)[adapter_name] = torch.nn.Parameter(delta)
        self.scaling[adapter_name] = 1.0

    def delta(self, adapter_name: str) -> tuple[torch.nn.Parameter | None, torch.nn.Parameter | None]:
        """An adapter's deltas of weight and bias, unscaled."""
        for method in ("lora", "lokr"):
            weights = getattr(self, f"{method}_norm")
            if adapter_name in weights:
                return weights[adapter_name], getattr(self, f"{method}_norm_bias").get(adapter_name)
        return None, None

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Set an adapter's strength; adapters without a delta here are ignored, as PEFT's layers do."""
        if adapter_name in self.scaling:
            self.scaling[adapter_name] = scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the scaled deltas of the active adapters (or those named) to the norm's weight and bias.

        Raises:
            ValueError: with `safe_merge`, where the result is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.scaling:
                continue
            if safe_merge and not all(part.isfinite().all() for part in self.delta(name) if part is not None):
                raise ValueError(f"The adapter {name} has a norm delta that is not finite.")
            self._add_to_base(name, self.scaling[name])
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract what was merged."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self._add_to_base(name, -self.scaling[name])

    def _add_to_base(self, adapter_name: str, scale: float) -> None:
        base: Any = self.get_base_layer()
        for parameter, delta in zip((base.weight, getattr(base, "bias", None)), self.delta(adapter_name), strict=True):
            if parameter is not None and delta is not None:
                parameter.data = (parameter.data.float() + scale * delta.detach()).to(parameter.dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        result = self.base_layer(hidden_states)
        if self.disable_adapters or self.merged:
            return result
        active: list[str] = self.active_adapters  # type: ignore[assignment]
        for name in active:
            weight, bias = self.delta(name)
            if weight is not None:
                scale = self.scaling[name]
                delta = self._normalized(hidden_states, weight * scale, None if bias is None else bias * scale)
                result = result + delta.to(result.dtype)
        return result

    def _normalized(self, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        base: Any = self.get_base_layer()
        functional = torch.nn.functional
        dtype = hidden_states.dtype
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        shape = tuple(weight.shape)
        if isinstance(base, torch.nn.LayerNorm):
            return functional.layer_norm(hidden_states, shape, weight, bias, base.eps)
        normalized = functional.rms_norm(hidden_states, shape, weight, base.eps)
        return normalized if bias is None else normalized + bias
