"""Pictures to latents and back, against diffusers' own encoding and decoding of Anima."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.modular_pipelines import PipelineState
from diffusers.modular_pipelines.anima.decoders import AnimaVaeDecoderStep
from diffusers.modular_pipelines.anima.encoders import encode_vae_image

from anima_peft.models.latents import decode_latents, encode_latents
from tests.components import tiny_vae


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLQwenImage:
    return tiny_vae()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def stock_decode(vae: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    state = PipelineState()
    state.set("latents", latents)
    return AnimaVaeDecoderStep()(SimpleNamespace(vae=vae), state)[1].get("images")


def test_encoding_equals_the_stock_step(vae: AutoencoderKLQwenImage, pixels: torch.Tensor) -> None:
    latents = encode_latents(vae, pixels)
    stock = encode_vae_image(pixels, vae, None, torch.device("cpu"), torch.float32).detach()
    assert latents.shape == (2, 16, 4, 6)
    assert torch.equal(latents, stock.squeeze(2))
    assert not latents.requires_grad


def test_decoding_equals_the_stock_step(vae: AutoencoderKLQwenImage, pixels: torch.Tensor) -> None:
    latents = encode_latents(vae, pixels)
    pictures = decode_latents(vae, latents)
    assert pictures.shape == pixels.shape
    assert torch.equal(pictures, stock_decode(vae, latents.unsqueeze(2)))
    assert torch.equal(pictures, decode_latents(vae, latents.unsqueeze(2)))


def test_the_mode_is_normalised_per_channel(vae: AutoencoderKLQwenImage, pixels: torch.Tensor) -> None:
    with torch.no_grad():
        mean = vae.quant_conv(vae.encoder(pixels.unsqueeze(2)))[:, :16, 0]
    latents = encode_latents(vae, pixels)
    for channel in range(16):
        expected = (mean[:, channel] - vae.config.latents_mean[channel]) / vae.config.latents_std[channel]
        torch.testing.assert_close(latents[:, channel], expected, atol=1e-5, rtol=1e-5)


def test_a_bf16_vae_is_normalised_in_fp32(pixels: torch.Tensor) -> None:
    vae = tiny_vae().to(torch.bfloat16)
    latents = encode_latents(vae, pixels)
    assert latents.dtype == torch.float32
    with torch.no_grad():
        mode = vae.encode(pixels.to(torch.bfloat16).unsqueeze(2)).latent_dist.mode().squeeze(2)
    mean, std = (torch.tensor(values).view(1, 16, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    assert torch.equal(latents, (mode.float() - mean) / std)
    assert decode_latents(vae, latents).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 30, 32), (1, 3, 32, 36), (1, 3, 1, 32, 32)])
def test_pictures_of_a_wrong_shape_are_refused(vae: AutoencoderKLQwenImage, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        encode_latents(vae, torch.zeros(shape))


@pytest.mark.parametrize("shape", [(16, 4, 4), (1, 16, 2, 4, 4)])
def test_latents_of_a_wrong_shape_are_refused(vae: AutoencoderKLQwenImage, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, 16, h, w\)"):
        decode_latents(vae, torch.zeros(shape))
