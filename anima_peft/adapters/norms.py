"""A root-mean-square norm with a trained delta on its weight; of all in it only the input is kept for backward."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from torch.autograd.function import once_differentiable


def adds_in_place(norm: Any) -> bool:
    """Whether `add_norm_delta` knows all that this layer does, and may stand in for its backward pass.

    Not where a compiler chooses what is kept, and not around a layer that is more than x / rms(x) * weight, or that
    somebody watches.
    """
    return (
        not torch.compiler.is_compiling()
        and type(norm) in (RMSNorm, torch.nn.RMSNorm)
        and norm.eps is not None
        and getattr(norm, "bias", None) is None
        and "forward" not in vars(norm)
        and not (norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks)
        and not norm.weight.requires_grad
    )


def add_norm_delta(norm: Any, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """norm(x) + x / rms(x) * delta, in the dtype of norm(x).

    Plain operations would keep x, x in float32 and two products for each of the two norms in it: seven times the
    memory of x in bfloat16, for three norms in each of Anima's blocks.

    Args:
        norm: a frozen norm that `adds_in_place` has let pass.
        x: (..., D).
        delta: (D,) float32 or wider.
    """
    with torch.no_grad():
        result = norm(x)
    return _AddNormDelta.apply(result.detach(), x, delta, norm.weight, norm.eps)  # type: ignore[no-any-return]


class _AddNormDelta(torch.autograd.Function):
    """result += N delta with N = x / rms(x), rms(x) = sqrt(mean(x^2) + eps) over the last axis of D.

    With the whole weight W = weight + delta, a gradient G of the result and V = G W:

        dx = (V - N mean(V N)) / rms(x), ddelta = sum over rows of G N
    """

    @staticmethod
    def forward(
        ctx: Any, result: torch.Tensor, x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """`result` (..., D), written to in place; x (..., D), delta and weight (D,)."""
        normalized, _ = _normalize(x, eps)
        result += normalized.mul_(delta)  # rounded once, to the dtype of the result
        ctx.save_for_backward(x, delta, weight)
        ctx.eps = eps
        ctx.mark_dirty(result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of x and delta, each in its tensor's shape and dtype; what else went in is frozen."""
        x, delta, weight = ctx.saved_tensors
        normalized, inverse = _normalize(x, ctx.eps)
        gradient = gradient.to(normalized.dtype)
        d_delta = (gradient * normalized).flatten(0, -2).sum(0).to(delta.dtype) if ctx.needs_input_grad[2] else None
        d_x = None
        if ctx.needs_input_grad[1]:
            d_x = gradient * (weight + delta)
            mean = (d_x * normalized).mean(-1, keepdim=True)
            d_x = ((d_x - normalized * mean) * inverse).to(x.dtype)
        return None, d_x, d_delta, None, None


def _normalize(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x / rms(x) and 1 / rms(x), in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * inverse, inverse
