"""The loss of a prediction: its shape, and its weight by noise level.

Letters: B batch, C latent channels, h and w the latents' height and width, sigma the noise level in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3

LossType = Literal["l2", "l1", "huber", "smooth_l1"]
HuberSchedule = Literal["snr", "exponential", "constant"]
WeightingScheme = Literal["none", "sigma_sqrt", "cosmap", "logit_normal", "mode"]

_LEAST_SIGMA = 1e-3  # the lowest of a schedule's 1000 noise levels: sigma^-2 would be without bounds below


@dataclass(frozen=True)
class FlowLoss:
    """Loss of each sample.

    With d = prediction - target and the threshold c, as sd-scripts has them (library/train_util.py,
    conditional_loss):
        l2: d^2; l1: |d|
        huber: 2 c (sqrt(d^2 + c^2) - c), the pseudo-Huber loss of Khrapov et al. 2024: d^2 for |d| << c, 2 c |d| beyond
        smooth_l1: the same over c

    Attributes:
        kind: the shape.
        huber_c: the threshold at pure noise.
        huber_schedule: the threshold by noise level: `constant`; `exponential`, huber_c^sigma; or `snr`,
            (1 - huber_c) (1 - sigma)^2 + huber_c, which is (1 - huber_c) / (1 + SNR^-1/2)^2 + huber_c for the flow's
            SNR = ((1 - sigma) / sigma)^2.
        huber_scale: multiplies the threshold.
        weighting: of sigma (Esser et al. 2024, section 3.1): `sigma_sqrt` is sigma^-2, `cosmap`
            2 / (pi (1 - 2 sigma + 2 sigma^2)); the others weight nothing.
    """

    kind: LossType = "l2"
    huber_c: float = 0.1
    huber_schedule: HuberSchedule = "snr"
    huber_scale: float = 1.0
    weighting: WeightingScheme = "none"

    def __call__(self, prediction: torch.Tensor, target: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """(B,) float32.

        Args:
            prediction: the model's velocity, (B, C, h, w), any floating dtype.
            target: (B, C, h, w) float32.
            sigma: (B,) float32.
        """
        difference = prediction.float() - target.float()
        if self.kind == "l2":
            loss = difference.square()
        elif self.kind == "l1":
            loss = difference.abs()
        else:
            c = self.threshold(sigma).view(-1, *[1] * (difference.ndim - 1))
            # d^2 / (sqrt(d^2 + c^2) + c) is sqrt(d^2 + c^2) - c without the cancellation of small d
            loss = 2 * difference.square() / ((difference.square() + c.square()).sqrt() + c)
            if self.kind == "huber":
                loss = loss * c
        per_sample = loss.flatten(1).mean(dim=1)
        return per_sample if self.weighting == "none" else per_sample * self.weight(sigma)

    def threshold(self, sigma: torch.Tensor) -> torch.Tensor:
        """c at each noise level, (B,) float32."""
        if self.huber_schedule == "exponential":
            c = self.huber_c**sigma
        elif self.huber_schedule == "snr":
            c = (1 - self.huber_c) * (1 - sigma).square() + self.huber_c
        else:
            c = torch.full_like(sigma, self.huber_c)
        return c * self.huber_scale

    def weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """The weight at each noise level, (B,) float32."""
        return compute_loss_weighting_for_sd3(self.weighting, sigma.clamp(min=_LEAST_SIGMA))
