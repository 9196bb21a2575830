"""The stand-in for torchvision."""

from __future__ import annotations

import sys

import pytest
import torch
from diffusers.models.transformers import transformer_cosmos

from anima_peft.models.compat import ensure_cosmos_without_torchvision
from tests.components import TEXT_WIDTH, tiny_transformer


def forward() -> torch.Tensor:
    with torch.no_grad():
        return tiny_transformer()(
            hidden_states=torch.ones(1, 16, 1, 4, 6),
            timestep=torch.tensor([0.5]),
            encoder_hidden_states=torch.ones(1, 8, TEXT_WIDTH),
            padding_mask=torch.zeros(1, 1, 32, 48),
            return_dict=False,
        )[0]


def test_the_dit_runs_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transformer_cosmos, "transforms", raising=False)
    with pytest.raises(NameError):  # the fault of the stock class that the stand-in mends
        forward()
    before = "torchvision" in sys.modules
    ensure_cosmos_without_torchvision()
    supplied = transformer_cosmos.transforms
    ensure_cosmos_without_torchvision()
    assert transformer_cosmos.transforms is supplied
    assert forward().shape == (1, 16, 1, 4, 6)
    assert ("torchvision" in sys.modules) == before


def test_an_installed_torchvision_is_left_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = object()
    monkeypatch.setattr(transformer_cosmos, "transforms", installed, raising=False)
    ensure_cosmos_without_torchvision()
    assert transformer_cosmos.transforms is installed


def test_resizes_to_the_nearest_pixel_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transformer_cosmos, "transforms", raising=False)
    ensure_cosmos_without_torchvision()
    transforms = transformer_cosmos.transforms
    mask = torch.arange(6.0).view(1, 1, 2, 3)
    larger = transforms.functional.resize(mask, [4, 6], interpolation=transforms.InterpolationMode.NEAREST)
    assert torch.equal(larger, mask.repeat_interleave(2, 2).repeat_interleave(2, 3))
    with pytest.raises(NotImplementedError, match="bilinear"):
        transforms.functional.resize(mask, [4, 6], interpolation="bilinear")
