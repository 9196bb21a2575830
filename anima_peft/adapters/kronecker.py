"""Products with a Kronecker product that is never formed.

For w1 (a, c) and w2 (b, d), kron(w1, w2) is (a*b, c*d) and, with x cut into c rows of d,

    kron(w1, w2) @ x = w1 @ X @ w2'      (vec-transpose identity; Van Loan 2000, "The ubiquitous Kronecker product")

Letters: a, b factors of the output width, c, d of the input width; a*b out_features, c*d in_features.
"""

from __future__ import annotations

import torch


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


def kron_linear(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """x @ kron(w1, w2)' as two small products.

    The order is the one whose intermediate result is smaller, and with it both its cost and what the backward pass
    has to keep: (a, d) a row when w1 goes first, (c, b) when w2 does. Only shapes decide, so a compiler sees no branch.

    Args:
        x: (..., c*d), of the factors' dtype or under autocast.
        w1: (a, c).
        w2: (b, d).

    Returns:
        (..., a*b).
    """
    (a, c), (b, d) = w1.shape, w2.shape
    cut = x.reshape(-1, c, d)
    mixing = w1.expand(len(cut), a, c)  # torch.matmul would fold the batch into w1 and copy for it
    if a * d <= c * b:
        result = torch.nn.functional.linear(torch.bmm(mixing, cut), w2)
    else:
        result = torch.bmm(mixing, torch.nn.functional.linear(cut, w2))
    return result.reshape(*x.shape[:-1], a * b)


def kron_chain(x: torch.Tensor, w1: torch.Tensor, w2_a: torch.Tensor, w2_b: torch.Tensor) -> torch.Tensor:
    """x @ kron(w1, w2_a @ w2_b)' as a chain through the rank; kron(w1, A B) = kron(1, A) kron(w1, B).

    Args:
        x: (..., c*d).
        w1: (a, c).
        w2_a: (b, rank).
        w2_b: (rank, d).

    Returns:
        (..., a*b).
    """
    (a, c), (b, _), (_, d) = w1.shape, w2_a.shape, w2_b.shape
    narrow = torch.nn.functional.linear(x.reshape(-1, c, d), w2_b)
    mixed = torch.bmm(w1.expand(len(narrow), a, c), narrow)
    return torch.nn.functional.linear(mixed, w2_a).reshape(*x.shape[:-1], a * b)
