"""What an adapter holds for one module, as plain tensors: the form between files and layers.

Letters: (out, in) a linear's weight; a, b factors of out, c, d factors of in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

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
        bias: (out,), added to the layer's bias; or None.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Width between the two matrices."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What up @ down is multiplied by: alpha / rank."""
        return self.alpha / self.rank

    def delta(self) -> torch.Tensor:
        """up @ down * alpha / rank, (out, in), in the factors' dtype; DoRA's rescaling is left out."""
        return self.up @ self.down * self.scale

    def delta_norm(self) -> float:
        """Frobenius norm of the delta, in float64; DoRA's rescaling and the bias are left out."""
        return _norm((self.up, self.down)) * abs(self.scale)


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
        bias: (a*b,), added to the layer's bias; or None.
    """

    w1: Factor
    w2: Factor
    alpha: float
    dim: int
    bias: torch.Tensor | None = None

    @property
    def shape(self) -> LoKrShape:
        """Sizes of the factors, and the ranks of those that are decomposed."""
        (a, c, rank1), (b, d, rank2) = _size(self.w1), _size(self.w2)
        return LoKrShape(a, b, c, d, rank1, rank2)

    @property
    def scale(self) -> float:
        """What kron(w1, w2) is multiplied by: alpha / rank, and 1 where both factors are full."""
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
        return _norm(self.w1) * _norm(self.w2) * abs(self.scale)


@dataclass(frozen=True)
class LoHaFactors:
    """One linear's LoHa: delta W = (w1_a @ w1_b) * (w2_a @ w2_b) * alpha / rank, element by element (Hyeon-Woo et al.
    2022, "FedPara"; LyCORIS).

    Attributes:
        w1, w2: each a pair (out, rank), (rank, in), of one rank.
        alpha: numerator of the scale.
        bias: (out,), added to the layer's bias; or None.
    """

    w1: tuple[torch.Tensor, torch.Tensor]
    w2: tuple[torch.Tensor, torch.Tensor]
    alpha: float
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Width between the matrices of each pair."""
        return self.w1[1].shape[0]

    @property
    def scale(self) -> float:
        """What the product of the pairs is multiplied by: alpha / rank."""
        return self.alpha / self.rank

    def delta(self) -> torch.Tensor:
        """The delta, (out, in), in the factors' dtype."""
        return product(self.w1) * product(self.w2) * self.scale

    def delta_norm(self) -> float:
        """Frobenius norm of the delta, in float64."""
        return float((product(_double(self.w1)) * product(_double(self.w2))).norm()) * abs(self.scale)


@dataclass(frozen=True)
class FullDelta:
    """What is added to a linear's weight, to its bias, or to both.

    Attributes:
        weight: (out, in), or None.
        bias: (out,), or None.
    """

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def scale(self) -> float:
        """Always 1: files have no alpha beside it."""
        return 1.0

    def delta(self) -> torch.Tensor:
        """The weight's delta, (out, in); zero where there is none."""
        assert self.weight is not None or self.bias is not None
        return self.weight if self.weight is not None else torch.zeros(())

    def delta_norm(self) -> float:
        """Frobenius norm of the weight's delta, in float64."""
        return float(self.delta().cpu().double().norm())


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
        """Always 1: files have no alpha beside it."""
        return 1.0

    def delta_norm(self) -> float:
        """Frobenius norm of both, in float64."""
        parts = [self.weight] if self.bias is None else [self.weight, self.bias]
        return math.sqrt(sum(float(part.cpu().double().square().sum()) for part in parts))


LinearFactors = LoraFactors | LoKrFactors | LoHaFactors | FullDelta
Factors = LinearFactors | NormDelta
Weights = Mapping[ModuleName, Factors]
AnyFactors = TypeVar("AnyFactors", bound=Factors)


def alike(one: Factors, other: Factors) -> bool:
    """Whether one adapter's factors can take the other's place: kind and shapes agree; scales may differ."""
    return layout(one) == layout(other)


def layout(factors: Factors) -> tuple[object, ...]:
    """Kind and shapes of a module's factors: what has to agree for one to take another's place."""
    bias = factors.bias is not None
    if isinstance(factors, LoraFactors):
        return "LoRA", factors.rank, factors.magnitude is not None, bias
    if isinstance(factors, LoKrFactors):
        return "LoKr", factors.shape, bias
    if isinstance(factors, LoHaFactors):
        return "LoHa", factors.rank, bias
    if isinstance(factors, FullDelta):
        return "full difference", factors.weight is not None, bias
    return "norm", bias


def rescaled(factors: Factors, scale: float) -> Factors:
    """The same delta with another scale before it; computed in float32.

    Raises:
        ValueError: the scale is zero, or factors that carry none are to have one.
    """
    if factors.scale == scale:
        return factors
    ratio = factors.scale / scale
    if isinstance(factors, LoraFactors):
        return replace(factors, up=factors.up.float() * ratio, alpha=scale * factors.rank)
    if isinstance(factors, LoHaFactors):
        return replace(factors, w1=(factors.w1[0].float() * ratio, factors.w1[1]), alpha=scale * factors.rank)
    rank = factors.shape.rank if isinstance(factors, LoKrFactors) else None
    if not isinstance(factors, LoKrFactors) or rank is None:
        raise ValueError(f"these factors have the scale 1 and cannot have {scale}")
    return replace(factors, w1=scaled_factor(factors.w1, ratio), alpha=scale * rank)  # w1: the smaller of the two


def scaled_factor(factor: Factor, ratio: float) -> Factor:
    """The factor times a number, computed in float32."""
    if isinstance(factor, torch.Tensor):
        return factor.float() * ratio
    return factor[0].float() * ratio, factor[1]


def padded(factors: Factors, rank: int) -> Factors:
    """LoRA factors with zero rows and columns up to `rank`, and the same delta; other kinds as they are.

    Raises:
        ValueError: the rank of the factors is larger.
    """
    if not isinstance(factors, LoraFactors) or factors.rank == rank:
        return factors
    if factors.rank > rank:
        raise ValueError(f"it has rank {factors.rank}, and room is for {rank}")
    missing = rank - factors.rank
    return replace(
        factors,
        down=torch.nn.functional.pad(factors.down, (0, 0, 0, missing)),
        up=torch.nn.functional.pad(factors.up, (0, missing)),
        alpha=factors.scale * rank,
    )


def summary(weights: Weights) -> str:
    """Kinds, ranks and scales of an adapter in a few words."""
    counts = Counter(describe_factors(factors) for factors in weights.values())
    return ", ".join(f"{count} x {text}" for text, count in counts.items()) or "nothing"


def describe_factors(factors: Factors) -> str:
    """Kind, rank and scale of one module's factors in a few words."""
    if isinstance(factors, NormDelta):
        return "norms"
    with_bias = " and bias" if factors.bias is not None else ""
    if isinstance(factors, FullDelta):
        return "full difference" + with_bias if factors.weight is not None else "bias"
    if isinstance(factors, LoKrFactors):
        rank = factors.shape.rank
        return (
            "LoKr of " + ("full matrices" if rank is None else f"rank {rank} and scale {factors.scale:g}") + with_bias
        )
    kind = "LoHa" if isinstance(factors, LoHaFactors) else "LoRA" if factors.magnitude is None else "DoRA"
    return f"{kind} of rank {factors.rank} and scale {factors.scale:g}{with_bias}"


def tensors_of(factors: Factors) -> list[torch.Tensor]:
    """All tensors of a module's factors, in a fixed order."""
    parts: tuple[Factor | None, ...]
    if isinstance(factors, LoraFactors):
        parts = (factors.down, factors.up, factors.magnitude, factors.bias)
    elif isinstance(factors, (LoKrFactors, LoHaFactors)):
        parts = (factors.w1, factors.w2, factors.bias)
    else:
        parts = (factors.weight, factors.bias)
    present = [part for part in parts if part is not None]
    return [tensor for part in present for tensor in ([part] if isinstance(part, torch.Tensor) else part)]


def converted(factors: AnyFactors, dtype: torch.dtype | None, device: str = "cpu") -> AnyFactors:
    """The same factors with tensors of another dtype (None keeps each its own), on another device."""

    def moved(value: object) -> object:
        """Tensors, also in pairs; other values as they are."""
        if isinstance(value, torch.Tensor):
            return value.to(device, dtype)
        return tuple(map(moved, value)) if isinstance(value, tuple) else value

    values: dict[str, Any] = {key: moved(value) for key, value in vars(factors).items()}
    return replace(factors, **values)


def product(factor: Factor) -> torch.Tensor:
    """The matrix (m, n) that a factor stands for."""
    return factor if isinstance(factor, torch.Tensor) else factor[0] @ factor[1]


def detached(factor: Factor) -> Factor:
    """The factor outside of any graph."""
    return factor.detach() if isinstance(factor, torch.Tensor) else (factor[0].detach(), factor[1].detach())


def frobenius_norm(factor: Factor) -> torch.Tensor:
    """Frobenius norm of the matrix that a factor stands for: (), in the factor's dtype and on its device."""
    if isinstance(factor, torch.Tensor):
        return factor.norm()
    left, right = factor
    # |left @ right|^2 = trace((left' left) (right right')): rank x rank instead of m x n. Rounding can fall below zero.
    return ((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt()


def _norm(factor: Factor) -> float:
    return float(frobenius_norm(_double(factor)))


def _double(factor: Factor) -> Factor:
    parts = (factor,) if isinstance(factor, torch.Tensor) else factor
    exact = tuple(part.cpu().double() for part in parts)  # not every device has float64
    return exact[0] if len(exact) == 1 else (exact[0], exact[1])


def _size(factor: Factor) -> tuple[int, int, int | None]:
    if isinstance(factor, torch.Tensor):
        return factor.shape[0], factor.shape[1], None
    return factor[0].shape[0], factor[1].shape[1], factor[0].shape[1]
