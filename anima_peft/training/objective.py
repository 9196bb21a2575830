"""What the options make of noise levels, noise and loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .flow import NoiseSampler, SigmaSampler
from .losses import FlowLoss

if TYPE_CHECKING:
    from ..config import TrainOptions


def sigma_sampler(options: TrainOptions) -> SigmaSampler:
    """How the options draw noise levels."""
    flow = options.flow
    return SigmaSampler(
        flow.timestep_sampling,  # type: ignore[arg-type]  # one of its choices
        flow.sigmoid_scale,
        flow.discrete_flow_shift,
        options.loss.weighting_scheme,  # type: ignore[arg-type]
        flow.logit_mean,
        flow.logit_std,
        flow.mode_scale,
        flow.min_timestep / 1000,
        flow.max_timestep / 1000,
    )


def noise_sampler(options: TrainOptions) -> NoiseSampler:
    """How the options draw noise."""
    flow = options.flow
    return NoiseSampler(
        flow.noise_offset,
        flow.noise_offset_random_strength,
        flow.ip_noise_gamma,
        flow.ip_noise_gamma_random_strength,
    )


def flow_loss(options: TrainOptions) -> FlowLoss:
    """The options' loss."""
    loss = options.loss
    return FlowLoss(
        loss.loss_type,  # type: ignore[arg-type]  # one of its choices
        loss.huber_c,
        loss.huber_schedule,  # type: ignore[arg-type]
        loss.huber_scale,
        loss.weighting_scheme,  # type: ignore[arg-type]
    )
