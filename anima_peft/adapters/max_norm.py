"""Max-norm regularization: the deltas of an adapter's linear layers are kept from growing beyond a norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .factors import Factor, LoKrFactors, LoraFactors, frobenius_norm, tensors_of
from .layers import adapter_layers_of, read_factors
from .naming import Components


@dataclass(frozen=True)
class DeltaNorms:
    """Frobenius norms of the deltas after `limit_norms`.

    Attributes:
        scaled: layers that were over the limit.
        mean, largest: over all linear layers.
    """

    scaled: int
    mean: float
    largest: float


@torch.no_grad()
def limit_norms(components: Components, adapter_name: str, limit: float) -> DeltaNorms:
    """Shrink every linear layer's delta to a Frobenius norm of at most `limit`, in place and on its device.

    The shrinking is spread evenly over the layer's factors, as sd-scripts (networks/lora.py,
    apply_max_norm_regularization) and LyCORIS do. Deltas of norms are left alone, and so is what is
    not trained.
    """
    layers = [
        read_factors(layer, adapter_name)
        for model in components.values()
        for _, layer in adapter_layers_of(model, adapter_name)
        if any(parameter.requires_grad for parameter in layer.parameters())
    ]
    linears = [factors for factors in layers if isinstance(factors, (LoraFactors, LoKrFactors))]
    norms = torch.stack([_delta_norm(factors) for factors in linears])
    ratios = (limit / norms).clamp(max=1.0)  # 1 where the delta is zero
    for factors, ratio in zip(linears, ratios, strict=True):
        parts = tensors_of(factors)
        if isinstance(factors, LoraFactors):
            parts = parts[:2]  # not DoRA's magnitude
        for part in parts:
            part.mul_(ratio ** (1 / len(parts)))
    norms = norms * ratios
    scaled, mean, largest = torch.stack([(ratios < 1).sum().float(), norms.mean(), norms.max()]).tolist()
    return DeltaNorms(int(scaled), mean, largest)


def _delta_norm(factors: LoraFactors | LoKrFactors) -> torch.Tensor:
    """() float32, on the factors' device: unlike `delta_norm` it waits for no graphics card."""
    if isinstance(factors, LoraFactors):
        return frobenius_norm(_float((factors.up, factors.down))) * abs(factors.scale)
    # that of a Kronecker product is the product of its factors' norms
    return frobenius_norm(_float(factors.w1)) * frobenius_norm(_float(factors.w2)) * abs(factors.scale)


def _float(factor: Factor) -> Factor:
    return factor.float() if isinstance(factor, torch.Tensor) else (factor[0].float(), factor[1].float())
