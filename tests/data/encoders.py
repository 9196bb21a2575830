"""Encoders that compute next to nothing, and what they are given."""

from __future__ import annotations

from pathlib import Path

import torch

from anima_peft.data import (
    DatasetSpec,
    plan_captions,
    plan_latents,
    scan,
)

from .conftest import written


def encode_latents(pixels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(pixels, 8).mean(1, keepdim=True).expand(-1, 16, -1, -1)


def encode_captions(captions: list[str]) -> list[dict[str, torch.Tensor]]:
    return [{"prompt_embeds": torch.ones(len(caption), 4)} for caption in captions]


def draw_sigma(generator: torch.Generator, size: tuple[int, int]) -> float:
    return torch.rand((), generator=generator).item() * size[0] / 64


class CountingVae:
    """Means of 8 x 8 pixels, repeated to 16 channels; remembers the batches' shapes."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.fail_at = fail_at

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        if len(self.batches) == self.fail_at:
            raise KeyboardInterrupt
        self.batches.append(tuple(pixels.shape))
        return encode_latents(pixels)


class CountingText:
    def __init__(self) -> None:
        self.captions: list[str] = []

    def __call__(self, captions: list[str]) -> list[dict[str, torch.Tensor]]:
        self.captions += captions
        return [{"prompt_embeds": torch.full((len(caption), 4), float(len(caption)))} for caption in captions]


def encode(spec: DatasetSpec, cache_dir: Path | None = None, **keys: str) -> tuple[list[tuple[int, ...]], list[str]]:
    """What two fresh encoders are given when a run needs `spec`."""
    pictures = scan([spec], cache_dir=cache_dir, progress=False)
    vae, text = CountingVae(), CountingText()
    latents = plan_latents(pictures, model=keys.get("vae", "vae 1"), cache_dir=cache_dir)
    captions = plan_captions(
        written(pictures),
        model=keys.get("text", "qwen 1"),
        options={"length": keys.get("length", 512)},
        cache_dir=cache_dir,
    )
    expected = latents.missing, captions.missing
    latents.encode(vae, batch_size=2, progress=False)
    captions.encode(text, batch_size=2, progress=False)
    assert expected == (sum(shape[0] for shape in vae.batches), len(text.captions))
    assert latents.missing == captions.missing == 0
    return vae.batches, text.captions
