"""Deltas of weights and biases that belong to an adapter, as LoRA's factors do: on norms, and whole ones on linears."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge

from .norms import add_norm_delta, adds_in_place
from .quantized import plain_weight

NORM_TYPES: tuple[type[torch.nn.Module], ...] = (torch.nn.RMSNorm, RMSNorm, torch.nn.LayerNorm)


def is_affine_norm(module: torch.nn.Module) -> bool:
    """Whether a module is a norm with a weight; the LayerNorms inside Anima's modulation have none."""
    return isinstance(module, NORM_TYPES) and getattr(module, "weight", None) is not None


class DeltaLayer(torch.nn.Module, BaseTunerLayer):
    """A norm or linear layer with weight W + sum of s_i * delta_i over the active adapters (and its bias likewise).

    The deltas' part is computed beside the base's and added to its output: a delta far below the base weight's own
    precision still counts, and while all deltas are zero the output is the base's to the last bit.

    Deltas start at zero. They are named after the adapter's method (`lora_delta`, `lokr_delta`), by which PEFT knows
    that they belong to it.
    """

    adapter_layer_names = ("lora_delta", "lora_delta_bias", "lokr_delta", "lokr_delta_bias")
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

    def add_delta(self, adapter_name: str, method: str, *, weight: bool = True, bias: bool | None = None) -> None:
        """Give an adapter its deltas, zeros: float32 on a norm, in the dtype of the weight on a linear.

        Args:
            method: "lora" or "lokr".
            weight: whether the weight has one.
            bias: whether the bias has one; None: if there is a bias.
        """
        base: Any = self.get_base_layer()
        own_weight = plain_weight(base)
        dtype = own_weight.dtype if isinstance(base, torch.nn.Linear) else torch.float32
        own_bias = getattr(base, "bias", None)
        parts = {f"{method}_delta": own_weight if weight else None}
        parts[f"{method}_delta_bias"] = own_bias if bias or bias is None else None
        for name, parameter in parts.items():
            if parameter is not None:
                getattr(self, name)[adapter_name] = torch.nn.Parameter(torch.zeros_like(parameter, dtype=dtype))
        self.scaling[adapter_name] = 1.0

    def delta(self, adapter_name: str) -> tuple[torch.nn.Parameter | None, torch.nn.Parameter | None]:
        """An adapter's deltas of weight and bias, unscaled."""
        for method in ("lora", "lokr"):
            weights, biases = getattr(self, f"{method}_delta"), getattr(self, f"{method}_delta_bias")
            if adapter_name in weights or adapter_name in biases:
                return weights.get(adapter_name), biases.get(adapter_name)
        return None, None

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Set an adapter's strength; adapters without a delta here are ignored, as PEFT's layers do."""
        if adapter_name in self.scaling:
            self.scaling[adapter_name] = scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the scaled deltas of the active adapters (or those named) to the base's weight and bias.

        Raises:
            ValueError: with `safe_merge`, where the result is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.scaling:
                continue
            if safe_merge and not all(part.isfinite().all() for part in self.delta(name) if part is not None):
                raise ValueError(f"The adapter {name} has a delta that is not finite.")
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
        """(..., in) to (..., out), of a norm both its width; in the dtype that the base layer gives."""
        active: list[str] = self.active_adapters  # type: ignore[assignment]
        names = [] if self.disable_adapters or self.merged else [name for name in active if name in self.scaling]
        if names and adds_in_place(self.base_layer):
            deltas = [self.delta(name)[0] for name in names]
            delta = sum(self.scaling[name] * part for name, part in zip(names, deltas, strict=True) if part is not None)
            return add_norm_delta(self.base_layer, hidden_states, delta)  # type: ignore[arg-type]  # no sum of nothing
        result = self.base_layer(hidden_states)
        for name in names:
            weight, bias = (None if part is None else part * self.scaling[name] for part in self.delta(name))
            result = result + self._output(hidden_states, weight, bias).to(result.dtype)
        return result

    def _output(self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        """What the base layer would give with these in the places of its weight and bias."""
        base: Any = self.get_base_layer()
        functional = torch.nn.functional
        weight, bias = (None if part is None else part.to(x.dtype) for part in (weight, bias))
        if weight is None:
            assert bias is not None
            return bias
        if isinstance(base, torch.nn.Linear):
            return functional.linear(x, weight, bias)
        shape = tuple(weight.shape)
        if isinstance(base, torch.nn.LayerNorm):
            return functional.layer_norm(x, shape, weight, bias, base.eps)
        normalized = functional.rms_norm(x, shape, weight, base.eps)
        return normalized if bias is None else normalized + bias
