"""Base layers whose weights a library keeps in fewer bits."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight


def is_quantized(module: Any) -> bool:
    """Whether the layer's weight is a type of its own, to be asked for only through the layer's forward pass."""
    return type(module.weight) not in (torch.nn.Parameter, torch.Tensor)


def plain_weight(module: Any) -> torch.Tensor:
    """The layer's weight in floating point, detached; its own memory where it is not quantized."""
    weight: torch.Tensor = dequantize_module_weight(module)
    return weight.detach()


def weight_shape(module: Any) -> tuple[int, ...]:
    """Shape of the layer's weight, (out, in) for linears, however it is packed."""
    if isinstance(module, torch.nn.Linear):
        return module.out_features, module.in_features
    return tuple(module.weight.shape)
