"""Products with a Kronecker product that is never formed.

For w1 (a, c) and w2 (b, d), kron(w1, w2) is (a*b, c*d) and, with x cut into c rows of d,

    kron(w1, w2) @ x = w1 @ X @ w2'      (vec-transpose identity; Van Loan 2000, "The ubiquitous Kronecker product")

Letters: a, b factors of the output width, c, d of the input width; a*b out_features, c*d in_features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .factors import Factor


def factorize(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Split a width into two factors, the smaller one first.

    A factor that divides the dimension is taken as it is; otherwise the most balanced pair is taken whose smaller
    number does not exceed the factor; -1 stands for no limit (LyCORIS, lycoris/functional/general.py, factorization).
    Unlike PEFT's function of this name, the two are sorted in every case.

    Raises:
        ValueError: a dimension below 1, or a factor that is neither positive nor -1.
    """
    if dimension < 1 or (factor < 1 and factor != -1):
        raise ValueError(
            f"cannot split {dimension} by {factor}: expected a positive width, and a positive factor or -1."
        )
    if factor > 0 and dimension % factor == 0:
        small, big = sorted((factor, dimension // factor))
        return small, big
    limit = dimension if factor == -1 else factor
    small = max(n for n in range(1, int(dimension**0.5) + 1) if dimension % n == 0 and n <= limit)
    return small, dimension // small


def kron_linear(x: torch.Tensor, w1: torch.Tensor, w2: Factor) -> torch.Tensor:
    """x @ kron(w1, w2)' as small products, from operations that a compiler can follow.

    Args:
        x: (..., c*d), of the factors' dtype.
        w1: (a, c).
        w2: (b, d), or a pair (b, rank), (rank, d).

    Returns:
        (..., a*b).
    """
    (a, c), rows = w1.shape, x.shape[:-1]
    inner, outer = _around_mixing(w1, w2)
    cut = x.reshape(-1, c, x.shape[-1] // c)
    if inner is not None:
        cut = torch.nn.functional.linear(cut, inner)
    # torch.matmul would fold the rows into w1 and copy for it
    mixed = torch.bmm(w1.expand(len(cut), a, c), cut)
    if outer is not None:
        mixed = torch.nn.functional.linear(mixed, outer)
    return mixed.reshape(*rows, a * mixed.shape[-1])


def add_kron_linear(
    result: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: Factor,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """`result` += x @ kron(w1, w2)', in place, with a backward pass of its own.

    Of the activations only x is kept for the backward pass, and a narrower one where w2 goes before w1; everything
    else is computed again, which costs less than writing it to memory and reading it back.

    Args:
        result: (..., a*b), contiguous.
        x: (..., c*d), of the same dtype.
        w1: (a, c), of any dtype: it is computed with in that of x, its gradient is summed in its own.
        w2: (b, d), or a pair (b, rank), (rank, d), likewise.
        weight: (a*b, c*d), where `result` is x @ weight' + bias and was computed without a graph, and is frozen: its
            part of the gradient of x is then computed here, and the adapter's is added to it in place.

    Returns:
        `result`, with a graph. It can be differentiated once.
    """
    inner, outer = _around_mixing(w1, w2)
    return _AddKron.apply(result, x, w1, inner, outer, weight)  # type: ignore[no-any-return]


def _around_mixing(w1: torch.Tensor, w2: Factor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The products before and after that with w1, each a matrix or None.

    kron(w1, B A) = kron(1, B) kron(w1, 1) kron(1, A), so a low-rank w2 = B A stands on both sides, and everything
    between is narrow. A full one stands where the activations between are smaller: (a, d) a row after w1, (c, b) before
    it. Only shapes decide, so a compiler sees no branch.
    """
    if not isinstance(w2, torch.Tensor):
        return w2[1], w2[0]
    (a, c), (b, d) = w1.shape, w2.shape
    return (None, w2) if a * d <= c * b else (w2, None)


_CPU_ROWS = 1024
"""Rows at once on a CPU: the activations between stay in its cache, and in memory that is already mapped."""


class _AddKron(torch.autograd.Function):
    """result += outer(w1(inner(x))), see `_around_mixing`; letters as above, N rows, k the width between.

    With T = X inner' (N, c, k), M = w1 T (N, a, k), O += M outer' and a gradient G of O:

        dM = G outer, dT = w1' dM, dX = dT inner (+ G weight), dinner = dT' X, douter = G' M, dw1 = sum over N of dM T'
    """

    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor,
        x: torch.Tensor,
        w1: torch.Tensor,
        inner: torch.Tensor | None,
        outer: torch.Tensor | None,
        weight: torch.Tensor | None,
    ) -> torch.Tensor:
        """`result` (..., a*b), written to in place; x (..., c*d), w1 (a, c); for the others see `_around_mixing`."""
        a, c = w1.shape
        mixing, before, after = _as(x, w1), _as(x, inner), _as(x, outer)
        rows, sums = x.reshape(-1, x.shape[-1]), result.view(-1, result.shape[-1])
        cut = rows.view(len(rows), c, x.shape[-1] // c)
        if before is not None:
            cut = torch.mm(rows.view(-1, before.shape[1]), before.T).view(len(rows), c, len(before))
        step, mixed = _between(len(rows), a, cut)
        for start in range(0, len(rows), step):
            part, here = cut[start : start + step], sums[start : start + step]
            expanded = mixing.expand(len(part), a, c)
            if after is None:
                here.view(len(part), a, -1).baddbmm_(expanded, part)
                continue
            torch.bmm(expanded, part, out=mixed[: len(part)])
            here.view(-1, len(after)).addmm_(mixed[: len(part)].view(-1, after.shape[1]), after.T)
        ctx.save_for_backward(x, w1, inner, outer, weight, None if before is None else cut)
        ctx.mark_dirty(result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of result, x, w1, inner, outer and weight, each in its tensor's shape and dtype; `gradient` is (..., a*b)."""
        x, w1, inner, outer, weight, cut = ctx.saved_tensors
        a, c = w1.shape
        mixing, before, after = _as(x, w1), _as(x, inner), _as(x, outer)
        back = mixing.T.contiguous()
        rows, gradients = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        cut = rows.view(len(rows), c, x.shape[-1] // c) if cut is None else cut
        step, wide = _between(len(rows), a, cut)
        narrow: Any = torch.empty_like(cut[:step]) if before is not None else None
        pairs = x.new_empty(step, a, c)
        d_x = torch.empty_like(rows) if ctx.needs_input_grad[1] else None
        d_w1 = torch.zeros_like(w1)
        d_inner: Any = None if inner is None else torch.zeros_like(inner)
        d_outer: Any = None if outer is None else torch.zeros_like(outer)
        for start in range(0, len(rows), step):
            part, here, raw = (t[start : start + step] for t in (cut, gradients, rows))
            count, mixed = len(part), wide[: len(part)]
            d_mixed = here.view(count, a, -1)
            if after is not None:
                torch.mm(here.view(-1, len(after)), after, out=mixed.view(-1, after.shape[1]))
                d_mixed = mixed
            d_w1 += torch.bmm(d_mixed, part.mT, out=pairs[:count]).sum(0, dtype=d_w1.dtype)
            target = None if d_x is None else d_x[start : start + step]
            if target is not None and weight is not None:
                torch.mm(here, weight, out=target)
            old = 0 if weight is None else 1  # of the sum in target, which is not yet written where there is no weight
            transposed = back.expand(count, c, a)
            if before is not None:
                d_cut = torch.bmm(transposed, d_mixed, out=narrow[:count]).view(-1, len(before))
                d_inner += torch.mm(d_cut.T, raw.view(-1, before.shape[1]))
                if target is not None:
                    target.view(-1, before.shape[1]).addmm_(d_cut, before, beta=old)
            elif target is not None:
                target.view(count, c, -1).baddbmm_(transposed, d_mixed, beta=old)
            if after is not None:  # last: it writes over d_mixed
                torch.bmm(mixing.expand(count, a, c), part, out=mixed)
                d_outer += torch.mm(here.view(-1, len(after)).T, mixed.view(-1, after.shape[1]))
        d_result = None if weight is not None else gradient
        return d_result, None if d_x is None else d_x.view_as(x), d_w1, d_inner, d_outer, None


def _as(x: torch.Tensor, factor: Any) -> Any:
    return None if factor is None else factor.to(x.dtype)


def _between(rows: int, a: int, cut: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Rows to take at once, and room for what is between w1 and `outer` for so many of them."""
    step = max(1, min(rows, _CPU_ROWS) if cut.device.type == "cpu" else rows)
    return step, cut.new_empty(step, a, cut.shape[-1])
