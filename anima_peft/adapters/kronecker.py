"""Products with a Kronecker product that is never formed.

For w1 (a, c) and w2 (b, d), kron(w1, w2) is (a*b, c*d) and, with x cut into c rows of d,

    kron(w1, w2) @ x = w1 @ X @ w2'      (vec-transpose identity; Van Loan 2000, "The ubiquitous Kronecker product")

Letters: a, b factors of the output width, c, d of the input width; a*b out_features, c*d in_features.
"""

from __future__ import annotations

import torch

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


def kron_linear(x: torch.Tensor, w1: torch.Tensor, w2: Factor, add_to: torch.Tensor | None = None) -> torch.Tensor:
    """x @ kron(w1, w2)' as small products.

    The order is the one whose intermediate result is smaller, and with it both its cost and what the backward pass
    has to keep: (a, d) a row when w1 goes first, (c, b) when w2 does. A low-rank w2 = A B is taken as a chain,
    kron(w1, A B) = kron(1, A) kron(w1, B). Only shapes decide, so a compiler sees no branch.

    Args:
        x: (..., c*d), of the factors' dtype.
        w1: (a, c).
        w2: (b, d), or a pair (b, rank), (rank, d).
        add_to: (..., a*b), contiguous and of the same dtype; the product is added to it in place, which saves writing
            and reading it once more.

    Returns:
        (..., a*b); `add_to` if it was given.
    """
    (a, c), rows = w1.shape, x.shape[:-1]
    last, before = (w2, None) if isinstance(w2, torch.Tensor) else w2
    b = last.shape[0]
    cut = x.reshape(-1, c, x.shape[-1] // c)
    if before is not None:
        cut = torch.nn.functional.linear(cut, before)  # (N, c, rank): narrow, so everything after it is cheap
    mixing = w1.expand(len(cut), a, c)  # torch.matmul would fold the rows into w1 and copy for it
    if before is not None or a * last.shape[1] <= c * b:
        mixed = torch.bmm(mixing, cut)
        if add_to is None:
            return torch.nn.functional.linear(mixed, last).reshape(*rows, a * b)
        add_to.view(-1, b).addmm_(mixed.view(-1, last.shape[1]), last.T)
        return add_to
    widened = torch.nn.functional.linear(cut, last)
    if add_to is None:
        return torch.bmm(mixing, widened).reshape(*rows, a * b)
    add_to.view(-1, a, b).baddbmm_(mixing, widened)
    return add_to
