"""Deltas as products of two thin matrices: which have such a form exactly, and the best one of a rank.

Letters: (out, in) a linear's weight, r a rank. All in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .factors import Factor, FullDelta, LinearFactors, LoHaFactors, LoKrFactors, LoraFactors

Pair = tuple[torch.Tensor, torch.Tensor]
"""(out, r) and (r, in)."""


@dataclass(frozen=True)
class Keep:
    """How much of a delta is kept; where both are given, the smaller rank of the two counts.

    Attributes:
        rank: at most this many singular values.
        energy: as few singular values as together have this share of the squared Frobenius norm.
    """

    rank: int | None = None
    energy: float | None = None

    def count(self, squares: torch.Tensor) -> int:
        """How many of the squared singular values, the largest first, are kept; at least one."""
        count = len(squares)
        if self.energy is not None:
            # What is left out, summed from the small end: adding to a large sum would lose it.
            left_out = squares.flip(0).cumsum(0).flip(0)
            allowed = (1 - self.energy) * left_out[0] + torch.finfo(squares.dtype).eps ** 2 * left_out[0]
            count = int((left_out > allowed).sum())
        return max(1, count if self.rank is None else min(count, self.rank))


@dataclass(frozen=True)
class Spectrum:
    """A matrix by its singular values.

    Attributes:
        squares: squared singular values, the largest first.
        leading: rank -> the best approximation of that rank (Eckart & Young 1936).
    """

    squares: torch.Tensor
    leading: Callable[[int], Pair]

    @property
    def energy(self) -> float:
        """The squared Frobenius norm."""
        return float(self.squares.sum())

    def cut(self, keep: Keep) -> tuple[Pair, float]:
        """The best pair, both sides of one size, and the squared Frobenius norm that it keeps."""
        rank = keep.count(self.squares)
        left, right = self.leading(rank)
        size = (left.norm(dim=0) / right.norm(dim=1)).sqrt()
        size = torch.where(size.isfinite() & (size > 0), size, torch.ones_like(size))
        return (left / size, right * size[:, None]), float(self.squares[:rank].sum())


def spectrum_of_pair(left: torch.Tensor, right: torch.Tensor) -> Spectrum:
    """Of left (out, r) @ right (r, in), which is never formed: QR of both, and an SVD of (r, r)."""
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)

    def leading(rank: int) -> Pair:
        """The best pair of that rank."""
        return q_left @ (u[:, :rank] * values[:rank]), v[:rank] @ q_right.T

    return Spectrum(values.square(), leading)


def spectrum_of_matrix(matrix: torch.Tensor) -> Spectrum:
    """Of a whole matrix, by the eigenvectors of its Gram matrix on the smaller side.

    Several times faster than an SVD. Singular values below 1e-8 of the largest are lost, far below what checkpoints
    and adapters hold; the approximation is the matrix itself projected, so that what is kept is exact.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)

    def leading(rank: int) -> Pair:
        """The matrix on its leading vectors."""
        kept = vectors[:, :rank]
        return (matrix @ kept, kept.T) if tall else (kept, kept.T @ matrix)

    return Spectrum(squares, leading)


def exact_pair(factors: LinearFactors) -> Pair | None:
    """A weight's delta as a product of two thin matrices, exactly; None where it has no such form.

    LoRA is one. LoKr with a low-rank factor is one by kron(A B, C D) = kron(A, C) kron(B, D); LoHa by the products of
    its pairs' columns and rows (Hyeon-Woo et al. 2022, proposition 1). DoRA's magnitude and biases are left out.

    Args:
        factors: in float64.
    """
    if isinstance(factors, LoraFactors):
        return factors.up * factors.scale, factors.down
    if isinstance(factors, LoKrFactors) and factors.shape.rank is not None:
        (left1, right1), (left2, right2) = _thin(factors.w1), _thin(factors.w2)
        return torch.kron(left1, left2) * factors.scale, torch.kron(right1, right2)
    if isinstance(factors, LoHaFactors):
        (a, b), (c, d) = factors.w1, factors.w2
        left = (a[:, :, None] * c[:, None, :]).flatten(1) * factors.scale
        return left, (b[:, None, :] * d[None, :, :]).flatten(0, 1)
    return None


def spectrum_of(factors: LinearFactors) -> Spectrum:
    """Of a weight's delta, from thin matrices where it has such a form."""
    pair = exact_pair(factors)
    if pair is None or pair[1].shape[0] >= min(pair[0].shape[0], pair[1].shape[1]):
        return spectrum_of_matrix(factors.delta())
    return spectrum_of_pair(*pair)


def has_weight(factors: LinearFactors) -> bool:
    """Whether the factors change the weight, and not the bias alone."""
    return not (isinstance(factors, FullDelta) and factors.weight is None)


def lora_of(pair: Pair, bias: torch.Tensor | None = None) -> LoraFactors:
    """A pair as LoRA of scale 1, in float32."""
    left, right = pair
    bias = None if bias is None else bias.float()
    return LoraFactors(right.float().contiguous(), left.float().contiguous(), float(right.shape[0]), bias=bias)


def _thin(factor: Factor) -> Pair:
    """The factor as a product over its smaller side."""
    if not isinstance(factor, torch.Tensor):
        return factor
    rows, columns = factor.shape
    if rows <= columns:
        return torch.eye(rows, dtype=factor.dtype), factor
    return factor, torch.eye(columns, dtype=factor.dtype)
