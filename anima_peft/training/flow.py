"""The rectified flow that Anima is trained on: how much noise, what the model sees, what it must answer.

Letters: B batch, C latent channels (16), h and w the latents' height and width, eps noise, z latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

SigmaMethod = Literal["sigmoid", "uniform", "shift", "flux_shift"]
SIGMA_METHODS: tuple[SigmaMethod, ...] = ("sigmoid", "uniform", "shift", "flux_shift")

# Resolution-dependent shift of FLUX (black-forest-labs/flux, sampling.py, get_schedule; diffusers' calculate_shift).
_MIN_TOKENS, _MAX_TOKENS = 256, 4096
_MIN_MU, _MAX_MU = 0.5, 1.15
_PATCH = 2


@dataclass(frozen=True)
class SigmaSampler:
    """Draws the noise level of one sample.

    Attributes:
        method: `sigmoid` is the logit-normal sigmoid(scale * n) with n ~ N(0, 1) (Esser et al. 2024, section 3.1);
            `uniform` is flat; `shift` bends the logit-normal by the constant `shift`; `flux_shift` bends it by the
            picture's size.
        sigmoid_scale: spread of the logit-normal.
        shift: k of `shift`; above 1 favours high noise.
    """

    method: SigmaMethod = "sigmoid"
    sigmoid_scale: float = 1.0
    shift: float = 1.0

    def __call__(self, generator: torch.Generator, latent_size: tuple[int, int]) -> float:
        """One sigma in (0, 1).

        Args:
            generator: CPU generator of the sample; one number is drawn.
            latent_size: (h, w).
        """
        if self.method == "uniform":
            return float(torch.rand((), generator=generator, dtype=torch.float64))
        normal = torch.randn((), generator=generator, dtype=torch.float64)
        sigma = float(torch.sigmoid(self.sigmoid_scale * normal))
        if self.method == "shift":
            return shift_sigma(sigma, self.shift)
        if self.method == "flux_shift":
            return shift_sigma(sigma, math.exp(resolution_mu(latent_size)))
        return sigma


def shift_sigma(sigma: float, k: float) -> float:
    """k * sigma / (1 + (k - 1) * sigma): Esser et al. 2024, equation 23; FLUX's time shift with k = e^mu."""
    return k * sigma / (1 + (k - 1) * sigma)


def resolution_mu(latent_size: tuple[int, int]) -> float:
    """FLUX's mu: linear in the number of tokens, 0.5 at 256 and 1.15 at 4096.

    Args:
        latent_size: (h, w).
    """
    tokens = (latent_size[0] // _PATCH) * (latent_size[1] // _PATCH)
    return _MIN_MU + (_MAX_MU - _MIN_MU) * (tokens - _MIN_TOKENS) / (_MAX_TOKENS - _MIN_TOKENS)


def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x = (1 - sigma) * z + sigma * eps.

    Args:
        latents: z, (B, C, h, w) float32.
        noise: eps, the same.
        sigma: (B,) float32.
    """
    sigma = sigma.view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigma) * latents + sigma * noise


def velocity(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The target dx/dsigma = eps - z, (B, C, h, w)."""
    return noise - latents


def flow_loss(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error of each sample, (B,) float32.

    The mean is over all latents whatever the mask, as in sd-scripts (library/custom_train_functions.py,
    `apply_masked_loss`): a small mask means a small loss, and an empty one means none instead of a division by zero.

    Args:
        prediction: the model's velocity, (B, C, h, w), any floating dtype.
        target: (B, C, h, w) float32.
        mask: weight of each latent, (B, 1, h, w) in [0, 1].
    """
    error = (prediction.float() - target.float()).square()
    return (error if mask is None else error * mask).flatten(1).mean(dim=1)
