"""Muon: momentum whose every step is made orthogonal, so that a matrix learns its weak directions as fast as others.

Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. torch's own `torch.optim.Muon` takes matrices
only; here convolutions too, as matrices of output by input channels times kernel. On the miniature's VAE it needs about
half of AdamW's steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

_QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of the post's Newton-Schulz iteration
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """For parameters of two and more dimensions; norms, biases and embeddings go to AdamW.

    Of a kernel in three dimensions (O, I, T, H, W) only the last frame is changed: the others never meet a single
    picture.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take one step; `closure` is not called."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"])  # Nesterov's
                part = parameter[:, :, -1] if parameter.ndim == 5 else parameter
                update = update[:, :, -1] if parameter.ndim == 5 else update
                matrix = update.reshape(len(update), -1)
                scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                part.add_(orthogonalised(matrix).view_as(part), alpha=-group["lr"] * scale)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """About the nearest matrix with orthonormal rows or columns: all singular values near 1, directions kept."""
    a, b, c = _QUINTIC
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
