"""Products with a Kronecker product that is never formed, against the one that is."""

from __future__ import annotations

import pytest
import torch
from lycoris.functional.general import factorization

from anima_peft.adapters import kronecker
from anima_peft.adapters.kronecker import add_kron_linear, factorize, kron_linear

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


@pytest.fixture(params=["alone", "added", "added to a frozen layer", "in small parts"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "in small parts":
        monkeypatch.setattr(kronecker, "_CPU_ROWS", 2)
        return "added to a frozen layer"
    return request.param


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "chain"])
@pytest.mark.parametrize("leading", [(), (7,), (2, 3)])
@pytest.mark.parametrize(("a", "b", "c", "d"), SHAPES)
def test_the_factored_product_is_the_materialised_one(
    a: int, b: int, c: int, d: int, leading: tuple[int, ...], rank: int | None, way: str
) -> None:
    x, w1 = random(*leading, c * d), random(a, c, seed=1)
    parts = [random(b, d, seed=2)] if rank is None else [random(b, rank, seed=2), random(rank, d, seed=3)]
    w2 = parts[0] if rank is None else parts[0] @ parts[1]
    factor = parts[0] if rank is None else (parts[0], parts[1])
    result, weight, inputs = random(*leading, a * b, seed=4), random(a * b, c * d, seed=5), [x, w1, *parts]
    materialised = x @ torch.kron(w1, w2).T
    if way == "alone":
        factored = kron_linear(x, w1, factor)
    elif way == "added":
        factored = add_kron_linear(result * 1, x, w1, factor)
        materialised = materialised + result
        inputs.append(result)
    else:
        with torch.no_grad():
            before = x @ weight.T
        factored = add_kron_linear(before, x, w1, factor, weight.detach())
        materialised = materialised + x @ weight.T
    torch.testing.assert_close(factored, materialised, atol=1e-12, rtol=1e-12)
    for ours, theirs in zip(gradients(factored, inputs), gradients(materialised, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "chain"])
def test_gradients_of_float32_factors_are_summed_in_float32(rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many parts: a bfloat16 sum would stop growing at 256."""
    monkeypatch.setattr(kronecker, "_CPU_ROWS", 1)
    x, w1 = torch.ones(1000, 4, dtype=torch.bfloat16), torch.ones(2, 2, requires_grad=True)
    parts = [torch.ones(2, 2)] if rank is None else [torch.ones(2, rank), torch.ones(rank, 2)]
    parts = [part.requires_grad_() for part in parts]
    result = add_kron_linear(torch.zeros(1000, 4, dtype=torch.bfloat16), x, w1, parts[0] if rank is None else parts)
    result.sum().backward()
    for parameter in (w1, *parts):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad == parameter.grad[0, 0]).all()
        assert parameter.grad[0, 0] >= 1000


def test_no_rows_are_no_fault() -> None:
    w1, w2 = random(2, 2), random(3, 3)
    result = add_kron_linear(torch.zeros(0, 6, dtype=torch.float64), torch.zeros(0, 6, dtype=torch.float64), w1, w2)
    result.sum().backward()
    assert result.shape == (0, 6)
    assert w1.grad is not None
    assert not w1.grad.any()
