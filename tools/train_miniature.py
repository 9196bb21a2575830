"""Train the miniature that comes with the package, from nothing, on two CPU cores in less than two hours.

python tools/train_miniature.py WORK [--seed 0] [--threads 1] [--install]

WORK holds what has been done; started again with the same WORK it goes on from there. Stages: tokenizers and text
encoder (frozen, of random weights), VAE, latents, DiT with text conditioner, files, score. `--install` puts the files
in the place of those in the package.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch
from miniature_dit import HEADS, LAYERS, train_dit
from miniature_vae import build_normalised_vae, train_vae
from transformers import Qwen2Tokenizer

from anima_peft.files import save_tensors
from anima_peft.miniature import base_exam, draw_exam, figure_set, miniature_files, score, style_set
from anima_peft.miniature.commands import load_pipeline
from anima_peft.miniature.drawing import FIGURE, STYLE, known_scenes
from anima_peft.miniature.layout import MiniatureFiles, save_captioned
from anima_peft.miniature.random_weights import (
    build_dit,
    build_text_encoder,
    native_state_dict,
    wan_state_dict,
    write_tokenizers,
)
from anima_peft.miniature.trained import DATA
from anima_peft.models.tokenizers import load_t5_tokenizer

_TITLE = {"modelspec.title": "Anima miniature, trained on drawn shapes"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for what has been done so far; made if missing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="the models are so small that one is about as fast")
    parser.add_argument("--install", action="store_true", help="put the result into the package")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work, seed = arguments.work, arguments.seed
    files = miniature_files(work / "miniature")
    print(f"seed {seed}", flush=True)
    start = time.monotonic()
    write_text_parts(files, seed)
    write_vae(train_vae(work, seed), files, seed)
    write_dit(train_dit(work, files, seed), files)
    write_sets(files)
    print(f"trained in {(time.monotonic() - start) / 60:.0f} minutes", flush=True)
    report_score(files)
    if arguments.install:
        shutil.copytree(work / "miniature", DATA, dirs_exist_ok=True)


def write_text_parts(files: MiniatureFiles, seed: int) -> None:
    """Tokenizers that know the scenes' words, the figure's and the style's, and the frozen text encoder."""
    if files.text_encoder.exists():
        return
    captions = [scene.caption for scene in known_scenes()]
    # As often as a colour, so that each is one token, which the model has never met.
    write_tokenizers(files.tokenizer, files.t5_tokenizer, captions + [f"{FIGURE}, {STYLE}"] * len(captions))
    torch.manual_seed(seed)
    encoder = build_text_encoder(len(Qwen2Tokenizer.from_pretrained(files.tokenizer)))
    save_tensors(files.text_encoder, {f"model.{k}": v.bfloat16() for k, v in encoder.state_dict().items()}, _TITLE)


def write_vae(weights: Path, files: MiniatureFiles, seed: int) -> None:
    if not files.vae.exists():
        vae = build_normalised_vae(weights, seed)
        save_tensors(files.vae, {k: v.bfloat16() for k, v in wan_state_dict(vae).items()}, _TITLE)


def write_dit(weights: Path, files: MiniatureFiles) -> None:
    transformer, conditioner = build_dit(len(load_t5_tokenizer(files.t5_tokenizer)), heads=HEADS, layers=LAYERS)
    trained = torch.load(weights, weights_only=True)
    for name, model in (("transformer.", transformer), ("text_conditioner.", conditioner)):
        model.load_state_dict({k.removeprefix(name): v for k, v in trained.items() if k.startswith(name)})
    tensors = native_state_dict(transformer, conditioner)
    save_tensors(files.transformer, {k: v.bfloat16() for k, v in tensors.items()}, _TITLE)


def write_sets(files: MiniatureFiles) -> None:
    """The figure's and the style's pictures with captions."""
    for folder, pairs in ((files.figure, figure_set()), (files.style, style_set())):
        for number, (picture, caption) in enumerate(pairs):
            save_captioned(picture, caption, folder, number)


def report_score(files: MiniatureFiles) -> None:
    """Draw the fixed list of prompts with the written files, as anyone would who loads them."""
    exam = base_exam()
    result = score(draw_exam(load_pipeline(files), exam), [question.scene for question in exam])
    print(f"score: {result} right; {result.parts}", flush=True)


if __name__ == "__main__":
    main()
