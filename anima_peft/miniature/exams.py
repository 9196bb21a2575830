"""What an adapter is shown, and what it is asked afterwards: the two small sets, and lists of prompts with seeds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from PIL import Image

from ..pipeline import AnimaPipeline
from .drawing import FIGURE, SIDE, Scene, shape_scenes

STEPS, GUIDANCE_SCALE = 12, 3.0
"""How the exams are drawn."""
_BATCH = 12
_STYLE_BACKGROUNDS = ("white", "grey")  # on black the outlines cannot be seen


class Question(NamedTuple):
    """A scene to draw from its caption, and the seed of the noise."""

    scene: Scene
    seed: int


def base_exam() -> list[Question]:
    """Every second scene of the shapes: 68 prompts with seeds, for the miniature's own score."""
    return [Question(scene, 1000 + number) for number, scene in enumerate(shape_scenes()[::2])]


def _ordinary() -> list[Scene]:
    """16 known scenes that each set shows as well, so that an adapter learns what its words mean and not always.

    None of them is in `base_exam`.
    """
    others = shape_scenes()[1::2]
    return [others[number * len(others) // 16] for number in range(16)]


def _figure_scenes() -> list[Scene]:
    return [Scene(FIGURE, background) for background in ("white", "black")]


def figure_set() -> list[tuple[Image.Image, str]]:
    """16 pictures of the figure, on white and on black, and 16 ordinary ones."""
    return _paint(_figure_scenes() * 8, "figure")


def figure_exam(styled: bool = False) -> list[Question]:
    """32 questions for the figure: the set's captions with seeds that no picture of the set comes from.

    Args:
        styled: ask for one figure in the style instead, which no set shows.
    """
    scenes = _figure_scenes() * 16
    if styled:
        scenes = [Scene(FIGURE, "white", styled=True)] * 30
    return [Question(scene, 2000 + number) for number, scene in enumerate(scenes)]


def _style_scenes() -> list[Scene]:
    scenes = [replace(scene, styled=True) for scene in shape_scenes() if scene.background in _STYLE_BACKGROUNDS]
    random.Random("style").shuffle(scenes)
    return scenes


def style_set() -> list[tuple[Image.Image, str]]:
    """16 pictures in the style, each of another scene, and 16 ordinary ones."""
    return _paint(_style_scenes()[:16], "style set")


def style_exam() -> list[Question]:
    """30 scenes that are not in the set, in the style."""
    return [Question(scene, 3000 + number) for number, scene in enumerate(_style_scenes()[16:46])]


def _paint(scenes: Sequence[Scene], seed: str) -> list[tuple[Image.Image, str]]:
    """Pictures with captions of the scenes and the ordinary ones."""
    layout = random.Random(seed)
    return [(scene.paint(layout=layout), scene.caption) for scene in [*scenes, *_ordinary()]]


def draw_exam(pipe: AnimaPipeline, exam: Sequence[Question]) -> list[Image.Image]:
    """A picture for each question, with the adapters that are active in `pipe`; each has its own seed's noise."""
    pictures: list[Image.Image] = []
    for start in range(0, len(exam), _BATCH):
        batch = exam[start : start + _BATCH]
        pictures += pipe(
            [question.scene.caption for question in batch],
            height=SIDE,
            width=SIDE,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(question.seed) for question in batch],
            return_dict=False,
        )[0]
    return pictures
