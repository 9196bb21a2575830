"""Stage 1 of train_miniature.py: the VAE, on drawn pictures."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from types import MethodType

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from muon import Muon
from PIL import Image

from anima_peft.miniature.drawing import known_scenes, random_picture

STEPS, BATCH, WARMUP = 2500, 8, 30
MUON_RATE, ADAMW_RATE = 0.025, 2e-3
KL_WEIGHT = 2e-4
MEASURED = 1000
"""Pictures whose latents' mean and deviation are brought to the real VAE's."""
_SAVE_EVERY = 50


def drawn_batch(chance: random.Random, size: int) -> torch.Tensor:
    """Pictures (B, 3, 64, 64) float32 in [-1, 1]: half of them scenes the DiT will learn, half anything flat."""
    scenes = known_scenes()
    pictures = [
        random_picture(chance) if number % 2 else chance.choice(scenes).paint(layout=chance) for number in range(size)
    ]
    return to_pixels(pictures)


def to_pixels(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Tensor (B, 3, H, W) float32 in [-1, 1]."""
    array = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def use_flat_convolutions(vae: AutoencoderKLQwenImage) -> None:
    """Compute the VAE's causal 3-D convolutions of single pictures as 2-D ones: the same numbers, many times faster.

    Before the first frame there is only padding, so that the last slice of each kernel alone meets data.
    """

    def forward(self: torch.nn.Conv3d, x: torch.Tensor, cache_x: object = None) -> torch.Tensor:
        flat = x[:, :, 0].contiguous(memory_format=torch.channels_last)
        padding = self._padding[0]  # type: ignore[attr-defined]
        return torch.nn.functional.conv2d(flat, self.weight[:, :, -1], self.bias, padding=padding)[:, :, None]

    for module in vae.modules():
        if type(module).__name__ == "QwenImageCausalConv3d":
            module.forward = MethodType(forward, module)


def _optimizers(vae: AutoencoderKLQwenImage) -> list[torch.optim.Optimizer]:
    """Muon for the kernels that single pictures meet, AdamW for the rest."""
    kernels = [
        parameter
        for name, parameter in vae.named_parameters()
        if name.endswith("weight") and "time_conv" not in name  # norms have a `gamma`
    ]
    chosen = {id(kernel) for kernel in kernels}
    rest = [parameter for parameter in vae.parameters() if id(parameter) not in chosen]
    return [
        Muon(kernels, lr=MUON_RATE),
        torch.optim.AdamW(rest, lr=ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train_vae(work: Path, seed: int) -> Path:
    """Train the whole VAE, or go on training, or do nothing where it is done; returns the file of the weights."""
    torch.manual_seed(seed)
    vae = AutoencoderKLQwenImage(base_dim=8)
    with torch.no_grad():
        vae.quant_conv.bias[vae.config.z_dim :] = -6.0  # little noise at first, or the decoder learns to do without
        for module in vae.modules():
            if isinstance(module, torch.nn.Conv3d) and module.kernel_size[0] == 3:
                module.weight *= 3**0.5  # one frame of three brings all of the signal
    return _train(vae, work / "vae.pt", seed)


def _train(vae: AutoencoderKLQwenImage, done: Path, seed: int) -> Path:
    if done.exists():
        return done
    use_flat_convolutions(vae)
    optimizers, checkpoint, first = _optimizers(vae), done.with_suffix(".running.pt"), 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]
    start, mean = time.monotonic(), 0.0
    for step in range(first, STEPS):
        rate = min(1.0, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        for optimizer, peak in zip(optimizers, (MUON_RATE, ADAMW_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
        pixels = drawn_batch(random.Random(f"{seed}/{step}"), BATCH).unsqueeze(2)
        mode, log_variance = vae.quant_conv(vae.encoder(pixels)).chunk(2, dim=1)
        log_variance = log_variance.clamp(-20.0, 10.0)
        noise = torch.randn(mode.shape, generator=torch.Generator().manual_seed(step))
        decoded = vae.decoder(vae.post_quant_conv(mode + noise * (0.5 * log_variance).exp()))
        error = (decoded - pixels).square().mean()
        divergence = 0.5 * (mode.square() + log_variance.exp() - 1 - log_variance).mean()
        vae.zero_grad(set_to_none=True)
        (error + KL_WEIGHT * divergence).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        mean = error.item() if step == first else 0.98 * mean + 0.02 * error.item()
        if (step + 1) % _SAVE_EVERY == 0 or step + 1 == STEPS:
            states = [optimizer.state_dict() for optimizer in optimizers]
            torch.save({"model": vae.state_dict(), "optimizers": states, "step": step + 1}, checkpoint)
            spent = time.monotonic() - start
            print(f"{done.stem} {step + 1}/{STEPS} mse {mean:.5f} {spent:.0f} s", flush=True)
    torch.save(vae.state_dict(), done)
    return done


@torch.no_grad()
def build_normalised_vae(weights: Path, seed: int) -> AutoencoderKLQwenImage:
    """The trained VAE, its latents brought to the mean and deviation per channel that the real VAE's have.

    These 16 pairs are constants of the family (diffusers' defaults), by which every program normalises. What they
    should be here is measured on scenes and folded into the 1x1 convolutions on both sides of the latents.
    """
    vae = AutoencoderKLQwenImage(base_dim=8)
    vae.load_state_dict(torch.load(weights, weights_only=True))
    chance, scenes = random.Random(f"statistics/{seed}"), known_scenes()
    modes = []
    for _ in range(MEASURED // 50):
        pictures = [chance.choice(scenes).paint(layout=chance) for _ in range(50)]
        modes.append(vae.encode(to_pixels(pictures).unsqueeze(2)).latent_dist.mode())
    measured = torch.cat(modes).transpose(0, 1).flatten(1)
    mean, std = measured.mean(1), measured.std(1)
    scale, goal = torch.tensor(vae.config.latents_std) / std, torch.tensor(vae.config.latents_mean)
    before, after, channels = vae.quant_conv, vae.post_quant_conv, vae.config.z_dim
    before.weight[:channels] *= scale.view(-1, 1, 1, 1, 1)
    before.bias[:channels] = (before.bias[:channels] - mean) * scale + goal
    before.bias[channels:] += 2 * scale.log()
    after.bias += after.weight[:, :, 0, 0, 0] @ (mean - goal / scale)
    after.weight /= scale.view(1, -1, 1, 1, 1)
    return vae
