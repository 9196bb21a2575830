"""What an adapter holds for one module, as plain tensors: the form between files and layers.

Letters: (out, in) a linear's weight; a, b factors of out, c, d factors of in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .naming import ModuleName

Factor = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""A full matrix (m, n), or a low-rank pair (m, rank), (rank, n)."""


@dataclass(frozen=True)
class LoraFactors:
    """One linear's LoRA: delta W = up @ down * alpha / rank (Hu et al. 2021, section 4.1; kohya's naming).

    Attributes:
        down: (rank, in).
        up: (out, rank).
        alpha: numerator of the scale; equal to the rank where a file names none.
        magnitude: DoRA's, (out,): the norms that the rows of W + delta W are brought to (Liu et al. 2024); or None.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta_norm(self) -> float:
        """Frobenius norm of the delta, in float64; DoRA's rescaling is left out."""
        down, up = self.down.cpu().double(), self.up.cpu().double()  # not every device has float64
        # |up @ down|^2 = trace((up' up) (down down')): rank x rank instead of out x in
        return math.sqrt(float(((up.T @ up) * (down @ down.T)).sum())) * abs(self.scale)


@dataclass(frozen=True)
class LoKrShape:
    """The factors of one linear: w1 (a, c) and w2 (b, d) for a weight (a*b, c*d).

    Attributes:
        rank1, rank2: rank of a decomposed w1 or w2; None where it is full.
    """

    a: int
    b: int
    c: int
    d: int
    rank1: int | None = None
    rank2: int | None = None

    @property
    def rank(self) -> int | None:
        """What alpha is divided by: w2's rank, else w1's; None where both are full and nothing is scaled."""
        return self.rank2 if self.rank2 is not None else self.rank1


@dataclass(frozen=True)
class LoKrFactors:
    """One linear's LoKr: delta W = kron(w1, w2) * scale (Yeh et al. 2024, LyCORIS).

    scale is alpha / rank where some factor is low-rank, and 1 where both are full: files write any alpha there
    (1, the dimension, 1e5, infinity in half precision), so the factors are trusted and not the alpha.

    Attributes:
        w1: (a, c).
        w2: (b, d).
        alpha: as configured or as the file has it.
        dim: the configured rank; 100000 and more stand for full matrices.
    """

    w1: Factor
    w2: Factor
    alpha: float
    dim: int

    @property
    def shape(self) -> LoKrShape:
        (a, c, rank1), (b, d, rank2) = _size(self.w1), _size(self.w2)
        return LoKrShape(a, b, c, d, rank1, rank2)

    @property
    def scale(self) -> float:
        rank = self.shape.rank
        return 1.0 if rank is None else self.alpha / rank

    @property
    def written_alpha(self) -> float:
        """The alpha for a file: for full factors the larger side of w2, which every loader's guess at the rank divides
        to 1, and which half precision can hold; otherwise the alpha itself."""
        shape = self.shape
        return float(max(shape.b, shape.d)) if shape.rank is None else self.alpha

    def delta(self) -> torch.Tensor:
        """kron(w1, w2) * scale, (a*b, c*d), in the factors' dtype."""
        w1, w2 = product(self.w1), product(self.w2)
        return torch.kron(w1, w2.contiguous()) * self.scale

    def delta_norm(self) -> float:
        """Frobenius norm of the delta, in float64: that of a Kronecker product is the product of the factors'."""
        w1, w2 = (product(_double(factor)) for factor in (self.w1, self.w2))
        return float(w1.norm() * w2.norm()) * abs(self.scale)


@dataclass(frozen=True)
class NormDelta:
    """What is added to a norm's weight, and to its bias where it has one.

    Attributes:
        weight, bias: in the shape of the norm's own.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def scale(self) -> float:
        return 1.0

    def delta_norm(self) -> float:
        """Frobenius norm of both, in float64."""
        parts = [self.weight] if self.bias is None else [self.weight, self.bias]
        return math.sqrt(sum(float(part.cpu().double().square().sum()) for part in parts))


Factors = LoraFactors | LoKrFactors | NormDelta
Weights = Mapping[ModuleName, Factors]


def alike(one: Factors, other: Factors) -> bool:
    """Whether one adapter's factors can take the other's place: kind and shapes agree; scales may differ."""
    if isinstance(one, LoraFactors) and isinstance(other, LoraFactors):
        return one.rank == other.rank and (one.magnitude is None) == (other.magnitude is None)
    if isinstance(one, LoKrFactors) and isinstance(other, LoKrFactors):
        return one.shape == other.shape
    return isinstance(one, NormDelta) and isinstance(other, NormDelta)


def rescaled(factors: Factors, scale: float) -> Factors:
    """The same delta with another scale before it; computed in float32.

    Raises:
        ValueError: the scale is zero, or full LoKr factors are to have one.
    """
    if factors.scale == scale:
        return factors
    if isinstance(factors, LoraFactors):
        ratio = factors.scale / scale
        return replace(factors, up=factors.up.float() * ratio, alpha=scale * factors.rank)
    rank = factors.shape.rank if isinstance(factors, LoKrFactors) else None
    if isinstance(factors, NormDelta) or rank is None:
        raise ValueError(f"these factors have the scale 1 and cannot have {scale}")
    ratio = factors.scale / scale
    w1 = factors.w1  # the smaller of the two
    scaled = w1.float() * ratio if isinstance(w1, torch.Tensor) else (w1[0].float() * ratio, w1[1])
    return replace(factors, w1=scaled, alpha=scale * rank)


def summary(weights: Weights) -> str:
    """Kinds, ranks and scales of an adapter in a few words."""
    counts: Counter[str] = Counter()
    for factors in weights.values():
        if isinstance(factors, NormDelta):
            counts["norms"] += 1
        elif isinstance(factors, LoraFactors):
            counts[f"LoRA of rank {factors.rank} and scale {factors.scale:g}"] += 1
        else:
            rank = factors.shape.rank
            counts["LoKr of " + ("full matrices" if rank is None else f"rank {rank} and scale {factors.scale:g}")] += 1
    return ", ".join(f"{count} x {text}" for text, count in counts.items()) or "nothing"


def product(factor: Factor) -> torch.Tensor:
    """The matrix (m, n) that a factor stands for."""
    return factor if isinstance(factor, torch.Tensor) else factor[0] @ factor[1]


def detached(factor: Factor) -> Factor:
    """The factor outside of any graph."""
    return factor.detach() if isinstance(factor, torch.Tensor) else (factor[0].detach(), factor[1].detach())


def _double(factor: Factor) -> Factor:
    parts = (factor,) if isinstance(factor, torch.Tensor) else factor
    exact = tuple(part.cpu().double() for part in parts)  # not every device has float64
    return exact[0] if len(exact) == 1 else (exact[0], exact[1])


def _size(factor: Factor) -> tuple[int, int, int | None]:
    if isinstance(factor, torch.Tensor):
        return factor.shape[0], factor.shape[1], None
    return factor[0].shape[0], factor[1].shape[1], factor[0].shape[1]
