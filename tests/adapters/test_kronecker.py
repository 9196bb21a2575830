"""Products with a Kronecker product that is never formed, against the one that is."""

from __future__ import annotations

import pytest
import torch
from lycoris.functional.general import factorization

from anima_peft.adapters.kronecker import factorize, kron_linear

SHAPES = [  # a, b, c, d: square, up, down, a bigger than b, ones
    (4, 6, 4, 6),
    (4, 20, 4, 5),
    (4, 5, 4, 20),
    (6, 3, 2, 9),
    (1, 7, 1, 5),
    (3, 1, 5, 1),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def gradients(result: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weight = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view_as(result)
    return list(torch.autograd.grad((result * weight).sum(), inputs))


@pytest.mark.parametrize("factor", [-1, 1, 2, 4, 8, 12, 16, 64, 100])
def test_factors_are_lycoris_factors(factor: int) -> None:
    for dimension in [*range(1, 200), 256, 768, 1000, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288]:
        small, big = factorize(dimension, factor)
        assert small * big == dimension
        assert small <= big
        assert (small, big) == factorization(dimension, factor), (dimension, factor)


@pytest.mark.parametrize(("dimension", "factor"), [(0, 8), (-4, 8), (8, 0), (8, -2)])
def test_what_cannot_be_split_is_refused(dimension: int, factor: int) -> None:
    with pytest.raises(ValueError, match="cannot split"):
        factorize(dimension, factor)


@pytest.mark.parametrize("added", [False, True], ids=["alone", "added in place"])
@pytest.mark.parametrize("rank", [None, 2], ids=["full", "chain"])
@pytest.mark.parametrize("leading", [(), (7,), (2, 3)])
@pytest.mark.parametrize(("a", "b", "c", "d"), SHAPES)
def test_the_factored_product_is_the_materialised_one(
    a: int, b: int, c: int, d: int, leading: tuple[int, ...], rank: int | None, added: bool
) -> None:
    x, w1 = random(*leading, c * d), random(a, c, seed=1)
    parts = [random(b, d, seed=2)] if rank is None else [random(b, rank, seed=2), random(rank, d, seed=3)]
    w2 = parts[0] if rank is None else parts[0] @ parts[1]
    base, inputs = random(*leading, a * b, seed=4), [x, w1, *parts]
    factored = kron_linear(x, w1, parts[0] if rank is None else tuple(parts), add_to=base * 1 if added else None)
    materialised = x @ torch.kron(w1, w2).T + (base if added else 0)
    torch.testing.assert_close(factored, materialised, atol=1e-12, rtol=1e-12)
    inputs += [base] if added else []
    for ours, theirs in zip(gradients(factored, inputs), gradients(materialised, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
