"""LoKr on linear layers through PEFT, without ever forming the Kronecker product in training.

delta W = kron(w1, w2) * scale, where w1 or w2 may be a product of two low-rank factors (Yeh et al. 2024, "Navigating
Text-To-Image Customization", LyCORIS). scale = alpha / rank where some factor is low-rank, and 1 where both are full:
then alpha means nothing, whatever a file says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.tuners.lokr.layer import Linear as PeftLoKrLinear

from .factors import Factor, LoKrFactors, LoKrShape, detached, product
from .kronecker import add_kron_linear, factorize, kron_linear
from .quantized import is_quantized
from .targets import ATTN_MLP

FULL_MATRIX_SENTINEL = 100_000
"""From this rank on, both factors are full matrices, and alpha and rank scale nothing."""


@dataclass
class LoKrConfig(peft.LoKrConfig):
    """PEFT's `LoKrConfig` with Anima's targets, the full-matrix sentinel and trainable norms.

    Attributes:
        target_modules: a preset ("attn-mlp", the default, "attn-mlp-adaln", "all-linear") or patterns.
        decompose_factor: the smaller factor's size where it divides the width (LyCORIS' rule for all others).
        full_matrix: both factors full, scale 1; implied by `r >= 100000`.
        include_modules: patterns of layers to adapt in any case, also where `exclude_modules` names them.
        train_norm: also train a delta on every affine norm of what is adapted.
        train_text_conditioner: adapt the text conditioner's layers too.
    """

    target_modules: list[str] | str | None = field(
        default=ATTN_MLP, metadata={"help": "Preset, or patterns of module names."}
    )
    include_modules: list[str] | None = field(default=None, metadata={"help": "Patterns that win over exclusion."})
    decompose_factor: int = field(default=8, metadata={"help": "Size of the smaller Kronecker factor."})
    full_matrix: bool = field(default=False, metadata={"help": "Both factors full; implied by r >= 100000."})
    train_norm: bool = field(default=False, metadata={"help": "Train the affine norms as deltas."})
    train_text_conditioner: bool = field(default=False, metadata={"help": "Adapt the text conditioner's layers too."})


def plan_shape(
    out_features: int, in_features: int, *, rank: int, factor: int, full_matrix: bool, decompose_both: bool
) -> LoKrShape:
    """LyCORIS' choice of factors: one is low-rank where the rank is below half its size (lycoris/modules/lokr.py)."""
    (a, b), (c, d) = factorize(out_features, factor), factorize(in_features, factor)
    if full_matrix or rank >= FULL_MATRIX_SENTINEL:
        return LoKrShape(a, b, c, d)
    return LoKrShape(
        a,
        b,
        c,
        d,
        rank1=rank if decompose_both and rank < max(a, c) / 2 else None,
        rank2=rank if rank < max(b, d) / 2 else None,
    )


class LoKrLinear(PeftLoKrLinear):
    """PEFT's LoKr layer with explicit factor shapes and a factored forward pass.

    Parameters keep their dtype (float32 in training); the products run in the activations'.
    """

    def update_layer(  # type: ignore[override]  # the shape decides what PEFT derives from its config
        self, adapter_name: str, r: int, alpha: float, config: peft.LoKrConfig, shape: LoKrShape, **_: Any
    ) -> None:
        """Add an adapter whose delta is zero.

        Args:
            r, alpha: as configured; they scale nothing where both factors are full.
            shape: of the factors.
        """
        self.r[adapter_name], self.alpha[adapter_name] = r, alpha
        self.rank_dropout[adapter_name] = config.rank_dropout
        self.rank_dropout_scale[adapter_name] = config.rank_dropout_scale
        self.module_dropout[adapter_name] = config.module_dropout
        self.scaling[adapter_name] = 1.0 if shape.rank is None else alpha / shape.rank
        self._create("lokr_w1", adapter_name, (shape.a, shape.c), shape.rank1)
        self._create("lokr_w2", adapter_name, (shape.b, shape.d), shape.rank2)
        self.reset_adapter_parameters_lycoris_way(adapter_name)  # w1 Kaiming, w2 zero
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _create(self, factor: str, adapter_name: str, shape: tuple[int, int], rank: int | None) -> None:
        parts = {factor: shape} if rank is None else {f"{factor}_a": (shape[0], rank), f"{factor}_b": (rank, shape[1])}
        for name, size in parts.items():
            getattr(self, name)[adapter_name] = torch.nn.Parameter(torch.empty(size))

    def factors(self, adapter_name: str) -> LoKrFactors:
        """The adapter's parameters, detached, whatever its strength."""
        return LoKrFactors(
            detached(self._factor("lokr_w1", adapter_name)),
            detached(self._factor("lokr_w2", adapter_name)),
            float(self.alpha[adapter_name]),
            self.r[adapter_name],
        )

    def _factor(self, name: str, adapter_name: str) -> Factor:
        full = getattr(self, name)
        if adapter_name in full:
            return full[adapter_name]
        return getattr(self, f"{name}_a")[adapter_name], getattr(self, f"{name}_b")[adapter_name]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's strength; adapters that are not here are ignored, as PEFT's layers do."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.factors(adapter).scale

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> torch.Tensor:
        """The delta at the present strength, (out, in), in the parameters' dtype; for merging only."""
        factors = self.factors(adapter_name)
        return factors.delta() * (self.scaling[adapter_name] / factors.scale if factors.scale else 0.0)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., in) to (..., out), in the dtype that the base layer gives; kron(w1, w2) is not formed."""
        if self.disable_adapters or self.merged:
            if self.disable_adapters and self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            # Once for both products: each would make, and keep for its backward pass, a narrow copy of its own.
            x = x.to(torch.get_autocast_dtype(device))
        names = [name for name in self.active_adapters if name in self.scaling]
        if not names or args or kwargs or not self._adds_in_place(x):
            result = self.base_layer(x, *args, **kwargs)
            for name in names:
                delta = self._dropped(name, kron_linear(x, *self._scaled_factors(name, x.dtype)))
                result = result + delta.to(result.dtype)
            return result
        with torch.no_grad():
            result = self.base_layer(x)
        result = result.detach()  # torch forbids adding to what may be a view made without a graph
        weight: torch.Tensor | None = self.base_layer.weight  # the first adapter computes the base's gradient, too
        for name in names:
            result, weight = add_kron_linear(result, x, *self._scaled_factors(name), weight), None
        return result

    def _adds_in_place(self, x: torch.Tensor) -> bool:
        """Whether base and adapters can be computed, and differentiated, in one place: `add_kron_linear`.

        Not where a compiler does it better, and not around a base layer that is more than x @ weight' + bias, or that
        somebody watches.
        """
        base = self.base_layer
        return (
            not torch.compiler.is_compiling()
            and type(base) is torch.nn.Linear
            and not is_quantized(base)
            and "forward" not in vars(base)  # as offloading hooks leave it
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
            and not any(parameter.requires_grad for parameter in base.parameters())
            and (base.weight.dtype, base.weight.device) == (x.dtype, x.device)
            and not (self.training and any(self._drops(name) for name in self.active_adapters))
        )

    def _drops(self, adapter_name: str) -> bool:
        return bool(self.rank_dropout.get(adapter_name) or self.module_dropout.get(adapter_name))

    def _scaled_factors(self, adapter_name: str, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, Factor]:
        """w1 at the present strength, as the smallest of the factors, and w2; in the parameters' dtype or another."""
        w1, w2 = self._factor("lokr_w1", adapter_name), self._factor("lokr_w2", adapter_name)
        w1 = product(w1) * self.scaling[adapter_name]
        if dtype is None:
            return w1, w2
        return w1.to(dtype), w2.to(dtype) if isinstance(w2, torch.Tensor) else (w2[0].to(dtype), w2[1].to(dtype))

    def _dropped(self, adapter_name: str, activations: torch.Tensor) -> torch.Tensor:
        """LyCORIS' two dropouts as masks: every parameter stays in the graph, as several processes need it."""
        if not self.training:
            return activations
        rank_dropout, module_dropout = self.rank_dropout[adapter_name], self.module_dropout[adapter_name]
        if rank_dropout:
            kept = (torch.rand(activations.shape[-1], device=activations.device) > rank_dropout).to(activations.dtype)
            if self.rank_dropout_scale[adapter_name]:
                kept = kept / kept.mean().clamp_min(1 / activations.shape[-1])
            activations = activations * kept
        if module_dropout:
            activations = activations * (torch.rand((), device=activations.device) > module_dropout)
        return activations
