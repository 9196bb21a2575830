"""The flow's maths against float64 and against the densities it is meant to draw from."""

import math

import pytest
import torch

from anima_peft.training.flow import (
    SigmaSampler,
    add_noise,
    resolution_mu,
    shift_sigma,
    velocity,
)
from anima_peft.training.losses import FlowLoss

GENERATOR = torch.Generator()


def draws(sampler: SigmaSampler, size: tuple[int, int] = (128, 128), count: int = 20_000) -> torch.Tensor:
    generator = GENERATOR.manual_seed(0)
    return torch.tensor([sampler(generator, size) for _ in range(count)], dtype=torch.float64)


def test_noising_target_and_loss_equal_float64() -> None:
    generator = torch.Generator().manual_seed(1)
    latents, noise, prediction = (torch.randn(3, 16, 8, 6, generator=generator) for _ in range(3))
    sigma = torch.tensor([0.0, 0.3, 1.0])

    noisy = add_noise(latents, noise, sigma)
    loss = FlowLoss()(prediction, velocity(latents, noise), sigma)

    z, eps, v, s = latents.double(), noise.double(), prediction.double(), sigma.double()[:, None, None, None]
    torch.testing.assert_close(noisy.double(), (1 - s) * z + s * eps, atol=1e-6, rtol=0)
    torch.testing.assert_close(loss.double(), ((v - (eps - z)) ** 2).mean(dim=(1, 2, 3)), atol=1e-6, rtol=1e-6)
    assert torch.equal(noisy[0], latents[0])
    assert torch.equal(noisy[2], noise[2])


def test_target_is_the_derivative_of_the_path() -> None:
    generator = torch.Generator().manual_seed(2)
    latents, noise = (torch.randn(1, 16, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    step = 1e-6
    at, beyond = torch.tensor([0.4], dtype=torch.float64), torch.tensor([0.4 + step], dtype=torch.float64)
    slope = (add_noise(latents, noise, beyond) - add_noise(latents, noise, at)) / step
    torch.testing.assert_close(slope, velocity(latents, noise), atol=1e-8, rtol=1e-8)


def test_half_precision_predictions_are_compared_in_float32() -> None:
    prediction = torch.full((1, 16, 4, 4), 300.0, dtype=torch.float16)  # its square is beyond float16
    assert FlowLoss()(prediction, torch.zeros(1, 16, 4, 4), torch.zeros(1)).tolist() == [90_000.0]


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.3])
def test_sigmoid_is_logit_normal(scale: float) -> None:
    logits = torch.logit(draws(SigmaSampler("sigmoid", sigmoid_scale=scale)))
    assert logits.mean().item() == pytest.approx(0, abs=0.03)
    assert logits.std().item() == pytest.approx(scale, rel=0.03)


def test_uniform_is_flat() -> None:
    sigmas = draws(SigmaSampler("uniform"))
    counts = torch.histc(sigmas, bins=10, min=0, max=1)
    assert counts.sum() == len(sigmas)
    assert (counts / len(sigmas) - 0.1).abs().max() < 0.01


def test_shift_bends_the_logit_normal_by_its_factor() -> None:
    plain, shifted = draws(SigmaSampler("sigmoid")), draws(SigmaSampler("shift", shift=3.0))
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    # In logits the bend is a plain addition of log k.
    torch.testing.assert_close(torch.logit(shifted), torch.logit(plain) + math.log(3.0))


@pytest.mark.parametrize(("side", "mu"), [(32, 0.5), (128, 1.15), (64, 0.5 + 0.65 * (1024 - 256) / 3840)])
def test_flux_shift_follows_the_number_of_tokens(side: int, mu: float) -> None:
    assert resolution_mu((side, side)) == pytest.approx(mu)
    plain, shifted = draws(SigmaSampler("sigmoid"), count=100), draws(SigmaSampler("flux_shift"), (side, side), 100)
    torch.testing.assert_close(torch.logit(shifted), torch.logit(plain) + mu)


def test_a_shift_of_one_changes_nothing() -> None:
    assert [shift_sigma(s, 1.0) for s in (0.0, 0.25, 1.0)] == [0.0, 0.25, 1.0]
