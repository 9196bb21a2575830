"""The rectified flow that Anima is trained on: how much noise, what the model sees, what it must answer.

Letters: B batch, C latent channels (16), h and w the latents' height and width, eps noise, z latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from .losses import WeightingScheme

SigmaMethod = Literal["sigmoid", "uniform", "shift", "flux_shift", "sigma"]

# Resolution-dependent shift of FLUX (black-forest-labs/flux, sampling.py, get_schedule; diffusers' calculate_shift).
_MIN_TOKENS, _MAX_TOKENS = 256, 4096
_MIN_MU, _MAX_MU = 0.5, 1.15
_PATCH = 2

_LEVELS = 1000  # of the schedule that `sigma` draws from


@dataclass(frozen=True)
class SigmaSampler:
    """Draws the noise level of one sample.

    Attributes:
        method: `sigmoid` is the logit-normal sigmoid(scale * n) with n ~ N(0, 1) (Esser et al. 2024, section 3.1);
            `uniform` is flat; `shift` bends the logit-normal by the constant `shift`; `flux_shift` bends it by the
            picture's size; `sigma` takes one of the 1000 noise levels of diffusers' FlowMatchEulerDiscreteScheduler
            with `shift`, with the density of `density`.
        sigmoid_scale: spread of the logit-normal.
        shift: k of `shift` and `sigma`; above 1 favours high noise.
        density: of `sigma` (Esser et al. 2024, section 3.1, by diffusers): `logit_normal` with `logit_mean` and
            `logit_std`, `mode` with `mode_scale`; flat with the others. 0 is the end of pure noise.
        lowest, highest: what is drawn in [0, 1] is stretched over this range.
    """

    method: SigmaMethod = "sigmoid"
    sigmoid_scale: float = 1.0
    shift: float = 1.0
    density: WeightingScheme = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    lowest: float = 0.0
    highest: float = 1.0

    def __call__(self, generator: torch.Generator, latent_size: tuple[int, int]) -> float:
        """One sigma in [`lowest`, `highest`].

        Args:
            generator: CPU generator of the sample; one number is drawn.
            latent_size: (h, w).
        """
        return self.lowest + (self.highest - self.lowest) * self._draw(generator, latent_size)

    def _draw(self, generator: torch.Generator, latent_size: tuple[int, int]) -> float:
        if self.method == "uniform":
            return float(torch.rand((), generator=generator, dtype=torch.float64))
        if self.method == "sigma":
            place = compute_density_for_timestep_sampling(
                self.density, 1, self.logit_mean, self.logit_std, self.mode_scale, generator=generator
            )
            level = _LEVELS - min(int(place * _LEVELS), _LEVELS - 1)
            return shift_sigma(level / _LEVELS, self.shift)
        normal = torch.randn((), generator=generator, dtype=torch.float64)
        sigma = float(torch.sigmoid(self.sigmoid_scale * normal))
        if self.method == "shift":
            return shift_sigma(sigma, self.shift)
        if self.method == "flux_shift":
            return shift_sigma(sigma, math.exp(resolution_mu(latent_size)))
        return sigma


@dataclass(frozen=True)
class NoiseSampler:
    """Draws the noise of one sample.

    Attributes:
        offset: a shift of each channel as a whole, normal with this deviation (Guttenberg 2023, "Diffusion with Offset
            Noise"; sd-scripts' `noise_offset`).
        offset_random_strength: the deviation is uniform between 0 and `offset`, for each sample anew.
        perturbation: deviation of the noise that the model's input has beyond its target's (Ning et al. 2023;
            sd-scripts' `ip_noise_gamma`).
        perturbation_random_strength: likewise uniform between 0 and `perturbation`.
    """

    offset: float = 0.0
    offset_random_strength: bool = False
    perturbation: float = 0.0
    perturbation_random_strength: bool = False

    def __call__(self, generator: torch.Generator, shape: torch.Size) -> dict[str, torch.Tensor]:
        """`noise`, (C, h, w) float32, and with a perturbation `input_noise`, which the model sees instead.

        Args:
            generator: CPU generator of the sample; plain noise is drawn first, so that it is the same in any case.
            shape: (C, h, w).
        """

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float32)

        def strength(most: float, is_random: bool) -> float:
            return most * float(torch.rand((), generator=generator)) if is_random else most

        noise = normal(*shape)
        if self.offset:
            noise = noise + strength(self.offset, self.offset_random_strength) * normal(shape[0], 1, 1)
        if not self.perturbation:
            return {"noise": noise}
        further = strength(self.perturbation, self.perturbation_random_strength) * normal(*shape)
        return {"noise": noise, "input_noise": noise + further}


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
