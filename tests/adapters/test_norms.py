"""Norms with a trained delta: equal to plain operations, and what they keep in memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.normalization import RMSNorm

from anima_peft.adapters.deltas import DeltaLayer
from benchmarks.measure import saved_bytes

WIDTH = 32


def norms(kind: str, dtype: torch.dtype) -> tuple[DeltaLayer, DeltaLayer]:
    """The layer as it is, and one of plain operations, with two adapters of different strengths."""
    generator = torch.Generator().manual_seed(0)
    base: Any = RMSNorm(WIDTH, eps=1e-6) if kind == "diffusers" else torch.nn.RMSNorm(WIDTH, eps=1e-6)
    base.weight.data = 1 + 0.3 * torch.randn(WIDTH, generator=generator)
    base = base.to(dtype).requires_grad_(False)
    layers = []
    for each in (base, copy.deepcopy(base)):
        layer = DeltaLayer(each)
        for name, scale, seed in (("a", 0.5, 1), ("b", -1.5, 2)):
            layer.add_delta(name, "lora")
            delta = layer.lora_delta[name]
            delta.data = 0.1 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
            if dtype is torch.float64:
                delta.data = delta.data.double()
            layer.set_scale(name, scale)
        layer.set_adapter(["a", "b"])
        layers.append(layer)
    layers[1].base_layer.register_forward_hook(lambda *_: None)
    return layers[0], layers[1]


def outcome(layer: DeltaLayer, x: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    result = layer(x)
    result.backward(gradient)
    assert x.grad is not None
    return [result.detach(), x.grad, *(layer.lora_delta[name].grad for name in "ab")]


@pytest.mark.parametrize("kind", ["diffusers", "torch"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_as_plain_operations(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    if kind == "diffusers" and dtype is torch.float64:
        tolerance = 1e-6  # its variance is float32's
    layer, plain = norms(kind, dtype)
    x, gradient = torch.randn(2, 2, 3, 5, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(
        dtype
    )
    for ours, theirs in zip(outcome(layer, x, gradient), outcome(plain, x, gradient), strict=True):
        assert ours.dtype == theirs.dtype
        assert float((ours - theirs).norm() / theirs.norm()) < tolerance


def test_gradients_against_differences() -> None:
    layer, _ = norms("torch", torch.float64)
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_a_delta_of_zero_changes_no_bit() -> None:
    layer, _ = norms("diffusers", torch.bfloat16)
    for name in "ab":
        layer.lora_delta[name].data.zero_()
    x = torch.randn(7, WIDTH, dtype=torch.bfloat16)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_its_input_is_kept(dtype: torch.dtype) -> None:
    layer, plain = norms("diffusers", dtype)
    x = torch.randn(256, WIDTH, dtype=dtype, requires_grad=True)
    known = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    small = 4 * WIDTH * 4  # the deltas' sum
    assert saved_bytes(lambda: layer(x), known) <= x.nbytes + small
    assert saved_bytes(lambda: plain(x), known) > 2 * x.nbytes
