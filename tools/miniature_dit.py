"""Stage 3 of train_miniature.py: DiT and text conditioner, on latents and captions encoded once."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from miniature_vae import to_pixels, use_flat_convolutions

from anima_peft.miniature.drawing import (
    BACKGROUNDS,
    FIGURE,
    KNOWN_FIGURES,
    Scene,
    known_scenes,
    random_figure,
    random_style,
)
from anima_peft.miniature.layout import MiniatureFiles
from anima_peft.miniature.random_weights import build_dit
from anima_peft.models.encoders import load_text_encoder, load_vae
from anima_peft.models.latents import encode_latents
from anima_peft.models.text import TextInputs, encode_text
from anima_peft.models.tokenizers import load_qwen_tokenizer, load_t5_tokenizer
from anima_peft.training.flow import SigmaSampler, add_noise, velocity
from anima_peft.transformer import AnimaTransformerModel

HEADS, LAYERS = 6, 5
STAGES = ((7500, 1e-3), (3500, 7e-4))
"""Steps, and the rate that a cosine brings to zero in them. In the second, a part of the pictures show figures drawn by
chance, all called `FIGURE`, and known figures are half of the time called so, too: it comes to mean a figure without
telling which. Another part is drawn in styles drawn by chance, all called `STYLE`. Else no adapter could teach the
miniature more than whole captions."""
BATCH, WARMUP, RANDOM, STYLED, ANONYMOUS = 48, 100, 0.2, 0.25, 0.5
LAYOUTS = 40
"""Pictures of each scene."""
CAPTION_DROPOUT = 0.1
_SIGMAS = SigmaSampler("shift", sigmoid_scale=1.3, shift=2.0)
_TEXT_ROWS = 512
_SAVE_EVERY = 100


def random_scenes() -> list[Scene]:
    """What captions say of the figures drawn by chance; several equal ones, as each has only `LAYOUTS` pictures."""
    return [Scene(FIGURE, background, count) for count, background in product((1, 2), BACKGROUNDS)] * 10


def styled_scenes() -> list[Scene]:
    """What captions say of pictures in styles drawn by chance: one and two of all that there is."""
    scenes = [*known_scenes(), *random_scenes()[: len(random_scenes()) // 5]]
    return [replace(scene, styled=True) for scene in scenes if scene.count < 3]


def all_scenes() -> list[Scene]:
    return [*known_scenes(), *random_scenes(), *styled_scenes()]


def encode_scenes(work: Path, files: MiniatureFiles, seed: int) -> Path:
    """Draw and encode `LAYOUTS` pictures of every scene; returns the file of latents (scenes, layouts, 16, 8, 8)."""
    done = work / "latents.pt"
    if done.exists():
        return done
    vae, layout = load_vae(files.vae, torch.float32), random.Random(f"latents/{seed}")
    use_flat_convolutions(vae)
    latents = []
    for scene in all_scenes():
        looks = [random_figure(layout, scene.background) if scene.thing == FIGURE else None for _ in range(LAYOUTS)]
        styles = [random_style(layout, scene) if scene.styled else None for _ in range(LAYOUTS)]
        pictures = [scene.paint(layout=layout, look=a, style=b) for a, b in zip(looks, styles, strict=True)]
        pixels = to_pixels(pictures)
        latents.append(torch.cat([encode_latents(vae, part) for part in pixels.split(20)]))
    stacked = torch.stack(latents)
    print(f"latents {tuple(stacked.shape)} mean {stacked.mean():.3f} std {stacked.std():.3f}", flush=True)
    torch.save(stacked, done)
    return done


def encode_captions(files: MiniatureFiles) -> TextInputs:
    """Every scene's caption, every scene's with `FIGURE` for a known figure, and the empty one, as they are read."""
    tokenizer, t5_tokenizer = load_qwen_tokenizer(files.tokenizer), load_t5_tokenizer(files.t5_tokenizer)
    text_encoder = load_text_encoder(files.text_encoder, torch.float32)
    scenes = all_scenes()
    anonymous = [replace(scene, thing=FIGURE) if scene.thing in KNOWN_FIGURES else scene for scene in scenes]
    captions = [*(scene.caption for scene in scenes), *(scene.caption for scene in anonymous), ""]
    return encode_text(text_encoder, tokenizer, t5_tokenizer, captions, _TEXT_ROWS, "cpu")


def predict(model: AnimaTransformerModel, noisy: torch.Tensor, sigma: torch.Tensor, text: TextInputs) -> torch.Tensor:
    """What `model(noisy, sigma, ...)` computes, without carrying hundreds of equal rows through every layer.

    The text's rows after its end are zero, so that their keys and values are, too: n of them act in the softmax like
    one whose score of 0 is raised by ln n.
    """
    rows = text.t5_input_ids.shape[1]
    embeds = model.encode_prompt_embeds(*text)[:, : rows + 1]
    zero_rows = torch.zeros(len(embeds), rows + 1)
    zero_rows[:, -1] = math.log(_TEXT_ROWS - rows)
    predicted: torch.Tensor = model.transformer(
        hidden_states=noisy.unsqueeze(2),
        timestep=sigma,
        encoder_hidden_states=embeds,
        attention_mask=zero_rows,
        padding_mask=noisy.new_zeros(1, 1, *noisy.shape[-2:]),
        return_dict=False,
    )[0]
    return predicted.squeeze(2)


class _Samples:
    """Batch after batch, each from its own seed, so that an interrupted run goes on with the same."""

    def __init__(self, latents: torch.Tensor, text: TextInputs, seed: int):
        self.latents, self.text, self.seed = latents, text, seed

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TextInputs]:
        """Latents and noise (B, 16, 8, 8), sigma (B,), text."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        scenes, layouts = self.latents.shape[:2]
        known, chance = len(known_scenes()), len(random_scenes())
        scene = torch.randint(known, (BATCH,), generator=generator)
        caption = scene.clone()
        if step >= STAGES[0][0]:
            caption += scenes * (torch.rand(BATCH, generator=generator) < ANONYMOUS)  # as `encode_captions` has them
            kind = torch.rand(BATCH, generator=generator)
            figure = torch.randint(known, known + chance, (BATCH,), generator=generator)
            styled = torch.randint(known + chance, scenes, (BATCH,), generator=generator)
            for other, chosen in ((figure, kind < RANDOM), (styled, kind > 1 - STYLED)):
                scene, caption = (torch.where(chosen, other, index) for index in (scene, caption))
        caption[torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT] = 2 * scenes
        latents = self.latents[scene, torch.randint(layouts, (BATCH,), generator=generator)]
        sigma = torch.tensor([_SIGMAS(generator, (8, 8)) for _ in range(BATCH)])
        noise = torch.randn(latents.shape, generator=generator)
        return latents, noise, sigma, TextInputs(*(part[caption] for part in self.text))


def learning_rate(step: int) -> float:
    """Of the step, counted from 0 over all stages: in each, linear warmup and a cosine to zero."""
    (first, rate), (second, later_rate) = STAGES
    length = first if step < first else second
    if step >= first:
        step, rate = step - first, later_rate
    return rate * min(1.0, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / length))


def train_dit(work: Path, files: MiniatureFiles, seed: int) -> Path:
    """Train, or go on training, or do nothing where it is done; returns the file of the weights."""
    done, checkpoint = work / "dit.pt", work / "dit_running.pt"
    if done.exists():
        return done
    samples = _Samples(torch.load(encode_scenes(work, files, seed), weights_only=True), encode_captions(files), seed)
    torch.manual_seed(seed)
    model = AnimaTransformerModel(*build_dit(len(load_t5_tokenizer(files.t5_tokenizer)), heads=HEADS, layers=LAYERS))
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=STAGES[0][1], betas=(0.9, 0.98), weight_decay=0.01)
    first = 0
    if checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    steps, start, mean = sum(length for length, _ in STAGES), time.monotonic(), 0.0
    for step in range(first, steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        latents, noise, sigma, text = samples(step)
        prediction = predict(model, add_noise(latents, noise, sigma), sigma, text)
        loss = torch.nn.functional.mse_loss(prediction, velocity(latents, noise))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if step == first else 0.99 * mean + 0.01 * loss.item()
        if (step + 1) % _SAVE_EVERY == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint)
            print(f"dit {step + 1}/{steps} loss {mean:.4f} {time.monotonic() - start:.0f} s", flush=True)
    torch.save(model.state_dict(), done)
    return done
