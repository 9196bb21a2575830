"""What stands in for torchvision where it is not installed."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from diffusers.models.transformers import transformer_cosmos

_NEAREST = "nearest"


def ensure_cosmos_without_torchvision() -> None:
    """Let `CosmosTransformer3DModel` run where torchvision is absent. Calling it again changes nothing.

    diffusers' module imports `torchvision.transforms` only where it is installed, but its `forward` always uses that
    name, for one nearest-neighbour resize of the padding mask, and raises NameError without it. torchvision has no
    build for a CPU-only torch, so the two attributes that `forward` reads are supplied here. An installed
    torchvision is left in place, and this function never imports it.
    """
    if not hasattr(transformer_cosmos, "transforms"):
        transformer_cosmos.transforms = SimpleNamespace(
            functional=SimpleNamespace(resize=_resize_nearest),
            InterpolationMode=SimpleNamespace(NEAREST=_NEAREST),
        )


def _resize_nearest(image: torch.Tensor, size: Sequence[int], interpolation: str = _NEAREST) -> torch.Tensor:
    """`torchvision.transforms.functional.resize` for a tensor (B, C, H, W), nearest neighbour only."""
    if interpolation != _NEAREST:
        raise NotImplementedError(
            f"resize with interpolation={interpolation!r} needs torchvision; without it only 'nearest' is provided."
        )
    return torch.nn.functional.interpolate(image, size=tuple(size), mode=_NEAREST)
