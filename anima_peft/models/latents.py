"""Between pictures and the normalised latents that the DiT works on.

Letters: B pictures, H and W height and width in pixels, h = H/8 and w = W/8.
"""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def encode_latents(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pictures to normalised latents.

    The posterior's mode is taken, not a sample, and the normalisation runs in fp32 whatever the VAE's dtype: the
    latents are what training regresses to.

    Args:
        vae: an `AutoencoderKLQwenImage`, on the device of `pixels`.
        pixels: (B, 3, H, W) of any float dtype in [-1, 1]; H and W multiples of 8.

    Returns:
        Latents (B, 16, h, w) fp32, with about zero mean and unit variance per channel.

    Raises:
        ValueError: another number of dimensions, or sides that the VAE cannot divide.
    """
    stride = vae.spatial_compression_ratio
    if pixels.ndim != 4 or pixels.shape[-2] % stride or pixels.shape[-1] % stride:
        raise ValueError(
            f"Pictures have shape {tuple(pixels.shape)}. Expected (B, 3, H, W) with H and W multiples of {stride}."
        )
    mean, std = _channel_statistics(vae, pixels.device)
    mode = vae.encode(pixels.to(vae.dtype).unsqueeze(2)).latent_dist.mode()
    return ((mode.float() - mean) / std).squeeze(2)


@torch.no_grad()
def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode normalised latents to pictures.

    Args:
        vae: an `AutoencoderKLQwenImage`, on the device of `latents`.
        latents: (B, 16, h, w) or (B, 16, 1, h, w) of any float dtype, as the DiT or `encode_latents` gives them.

    Returns:
        Pictures (B, 3, H, W) in the VAE's dtype, clamped to [-1, 1].

    Raises:
        ValueError: another number of dimensions, or more than one frame.
    """
    if latents.ndim == 4:
        latents = latents.unsqueeze(2)
    if latents.ndim != 5 or latents.shape[2] != 1:
        raise ValueError(f"Latents have shape {tuple(latents.shape)}. Expected (B, 16, h, w) or (B, 16, 1, h, w).")
    mean, std = _channel_statistics(vae, latents.device)
    # Not `latents * std`: dividing by the reciprocal is diffusers' arithmetic, and equal to it to the last bit.
    latents = latents.float() / (1.0 / std) + mean
    pictures: torch.Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return pictures[:, :, 0]


def _channel_statistics(vae: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the raw latents, (1, 16, 1, 1, 1) fp32, from the VAE's own config."""
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, dtype=torch.float32, device=device)
    std = torch.tensor(vae.config.latents_std, dtype=torch.float32, device=device)
    return mean.view(shape), std.view(shape)
