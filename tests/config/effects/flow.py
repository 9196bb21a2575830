"""Options of loss and noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from anima_peft.training.objective import flow_loss, noise_sampler, sigma_sampler

from .bench import SHAPE, Bench


def draws(bench: Bench, count: int = 200, **given: Any) -> torch.Tensor:
    sampler, generator = sigma_sampler(bench.options(**given)), torch.Generator().manual_seed(0)
    return torch.tensor([sampler(generator, (16, 16)) for _ in range(count)], dtype=torch.float64)


def noises(bench: Bench, seed: int = 0, **given: Any) -> dict[str, torch.Tensor]:
    return noise_sampler(bench.options(**given))(torch.Generator().manual_seed(seed), SHAPE)


def losses(bench: Bench, sigma: float = 0.3, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours, and the difference in float64."""
    generator = torch.Generator().manual_seed(3)
    prediction, target = torch.randn(2, 2, 16, 8, 6, generator=generator)
    found = flow_loss(bench.options(**given))(prediction, target, torch.full((2,), sigma))
    return found, (prediction - target).double()


def pseudo_huber(difference: torch.Tensor, c: float) -> torch.Tensor:
    return (2 * c * ((difference**2 + c**2).sqrt() - c)).flatten(1).mean(1).float()


def loss_type(bench: Bench) -> None:
    functional, close = torch.nn.functional, torch.testing.assert_close
    for kind, reference in (("l2", functional.mse_loss), ("l1", functional.l1_loss)):
        found, difference = losses(bench, loss_type=kind)
        close(found.mean().double(), reference(difference, torch.zeros_like(difference)))
    constant = {"huber_schedule": "constant", "huber_c": 0.2}
    found, difference = losses(bench, loss_type="huber", **constant)
    close(found, pseudo_huber(difference, 0.2))
    close(losses(bench, loss_type="smooth_l1", **constant)[0], pseudo_huber(difference, 0.2) / 0.2)
    # far below the threshold it is the squared error, far beyond it the absolute one
    close(losses(bench, loss_type="huber", huber_schedule="constant", huber_c=1e3)[0], losses(bench)[0])
    close(
        losses(bench, loss_type="smooth_l1", huber_schedule="constant", huber_c=1e-6)[0],
        2 * losses(bench, loss_type="l1")[0],
    )


def huber_c(bench: Bench) -> None:
    found, difference = losses(bench, loss_type="huber", huber_c=0.5)
    torch.testing.assert_close(found, pseudo_huber(difference, 0.5 * 0.7**2 + 0.5))


def huber_schedule(bench: Bench) -> None:
    for schedule, threshold in (("constant", 0.1), ("exponential", 0.1**0.3), ("snr", 0.9 * 0.7**2 + 0.1)):
        found, difference = losses(bench, loss_type="huber", huber_schedule=schedule)
        torch.testing.assert_close(found, pseudo_huber(difference, threshold))


def huber_scale(bench: Bench) -> None:
    found, difference = losses(bench, loss_type="huber", huber_schedule="exponential", huber_scale=3)
    torch.testing.assert_close(found, pseudo_huber(difference, 3 * 0.1**0.3))


def weighting_scheme(bench: Bench) -> None:
    plain = losses(bench)[0]
    for scheme in ("sigma_sqrt", "cosmap"):
        weight = compute_loss_weighting_for_sd3(scheme, torch.tensor(0.3))
        torch.testing.assert_close(losses(bench, weighting_scheme=scheme)[0], plain * weight)
    assert losses(bench, sigma=0.0, weighting_scheme="sigma_sqrt")[0].isfinite().all()
    density = {"timestep_sampling": "sigma", "weighting_scheme": "mode"}
    assert torch.equal(losses(bench, **density)[0], plain)
    assert not torch.equal(draws(bench, **density), draws(bench, timestep_sampling="sigma"))


def by_diffusers(scheme: str, shift: float = 1.0, **numbers: float) -> torch.Tensor:
    """The same draws as sd-scripts and diffusers' training scripts make them: an index into the scheduler's sigmas."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    generator = torch.Generator().manual_seed(0)
    places = [
        compute_density_for_timestep_sampling(
            scheme,
            1,
            numbers.get("logit_mean", 0.0),
            numbers.get("logit_std", 1.0),
            numbers.get("mode_scale", 1.29),
            generator=generator,
        )
        for _ in range(200)
    ]
    return scheduler.sigmas[(torch.cat(places) * 1000).long()].double()


def timestep_sampling(bench: Bench) -> None:
    found = draws(bench, timestep_sampling="sigma", discrete_flow_shift=3)
    torch.testing.assert_close(found, by_diffusers("none", shift=3.0), atol=1e-6, rtol=0)


def logit_mean(bench: Bench) -> None:
    given = {"timestep_sampling": "sigma", "weighting_scheme": "logit_normal", "logit_mean": 0.7}
    torch.testing.assert_close(draws(bench, **given), by_diffusers("logit_normal", logit_mean=0.7), atol=1e-6, rtol=0)


def logit_std(bench: Bench) -> None:
    given = {"timestep_sampling": "sigma", "weighting_scheme": "logit_normal", "logit_std": 2}
    torch.testing.assert_close(draws(bench, **given), by_diffusers("logit_normal", logit_std=2.0), atol=1e-6, rtol=0)


def mode_scale(bench: Bench) -> None:
    given = {"timestep_sampling": "sigma", "weighting_scheme": "mode", "mode_scale": 0.5}
    torch.testing.assert_close(draws(bench, **given), by_diffusers("mode", mode_scale=0.5), atol=1e-6, rtol=0)


def min_timestep(bench: Bench) -> None:
    for sampling in ("sigmoid", "uniform", "shift", "flux_shift", "sigma"):
        whole, upper = (draws(bench, timestep_sampling=sampling, min_timestep=least) for least in (0, 600))
        torch.testing.assert_close(upper, 0.6 + 0.4 * whole)


def max_timestep(bench: Bench) -> None:
    for sampling in ("sigmoid", "uniform", "shift", "flux_shift", "sigma"):
        whole, lower = (draws(bench, timestep_sampling=sampling, max_timestep=most) for most in (1000, 250))
        torch.testing.assert_close(lower, 0.25 * whole)


def noise_offset(bench: Bench) -> None:
    offsets = torch.stack([noises(bench, s, noise_offset=0.5)["noise"] - noises(bench, s)["noise"] for s in range(40)])
    torch.testing.assert_close(offsets, offsets[..., :1, :1].expand_as(offsets), atol=1e-6, rtol=0)
    assert offsets[..., 0, 0].std().item() == pytest.approx(0.5, rel=0.1)


def noise_offset_random_strength(bench: Bench) -> None:
    given = {"noise_offset": 0.5, "noise_offset_random_strength": True}
    offsets = torch.stack([noises(bench, s, **given)["noise"] - noises(bench, s)["noise"] for s in range(40)])
    spread = offsets[..., 0, 0].std(dim=1)
    assert spread.min() < 0.1 < 0.4 < spread.max()
    assert offsets[..., 0, 0].std().item() == pytest.approx(0.5 / math.sqrt(3), rel=0.2)


def ip_noise_gamma(bench: Bench) -> None:
    plain, perturbed = noises(bench), noises(bench, ip_noise_gamma=0.2)
    assert plain.keys() == {"noise"}
    assert torch.equal(perturbed["noise"], plain["noise"])
    assert (perturbed["input_noise"] - perturbed["noise"]).std().item() == pytest.approx(0.2, rel=0.1)


def ip_noise_gamma_random_strength(bench: Bench) -> None:
    given = {"ip_noise_gamma": 0.2, "ip_noise_gamma_random_strength": True}
    found = [noises(bench, seed, **given) for seed in range(20)]
    spread = torch.stack([(noise["input_noise"] - noise["noise"]).std() for noise in found])
    assert spread.min() < 0.06 < 0.14 < spread.max() < 0.22


def sigmoid_scale(bench: Bench) -> None:
    plain, wide = draws(bench), draws(bench, sigmoid_scale=1.3)
    torch.testing.assert_close(torch.logit(wide), 1.3 * torch.logit(plain))


def discrete_flow_shift(bench: Bench) -> None:
    plain, shifted = draws(bench), draws(bench, timestep_sampling="shift", discrete_flow_shift=3)
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))


EFFECTS: dict[str, Callable[[Bench], None]] = {
    case.__name__: case
    for case in (
        loss_type,
        huber_c,
        huber_schedule,
        huber_scale,
        weighting_scheme,
        timestep_sampling,
        logit_mean,
        logit_std,
        mode_scale,
        min_timestep,
        max_timestep,
        noise_offset,
        noise_offset_random_strength,
        ip_noise_gamma,
        ip_noise_gamma_random_strength,
        sigmoid_scale,
        discrete_flow_shift,
    )
}
"""By option."""
