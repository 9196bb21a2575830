"""What an adapter is shown, and what it is asked afterwards: the two small sets, and lists of prompts with seeds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from PIL import Image

from ..pipeline import AnimaPipeline
from .drawing import BACKGROUNDS, FIGURE, KNOWN_FIGURES, SIDE, Scene, shape_scenes

STEPS, GUIDANCE_SCALE = 12, 3.0
"""How the exams are drawn."""
_BATCH = 12
_SHOWN, _HELD_OUT = ("white", "black", "sky", "lime"), ("grey", "pink")
"""Backgrounds on which the figure's set shows it, and those on which it is asked for."""
_STYLE_BACKGROUNDS = tuple(name for name in BACKGROUNDS if name != "black")
_STYLE_MOST = 2
"""Things in a styled picture. Of three on a dusky ground, or of any on a black one, the VAE loses the shapes."""


class Question(NamedTuple):
    """A scene to draw from its caption, and the seed of the noise."""

    scene: Scene
    seed: int


def base_exam() -> list[Question]:
    """68 scenes of the shapes, each another one, with seeds, for the miniature's own score."""
    return [Question(scene, 1000 + number) for number, scene in enumerate(_shuffled()[:68])]


def _ordinary() -> list[Scene]:
    """16 known scenes that each set shows as well, so that an adapter learns what its words mean and not always.

    None of them is in `base_exam`.
    """
    return _shuffled()[68:84]


def _shuffled() -> list[Scene]:
    scenes = shape_scenes()
    random.Random("exam").shuffle(scenes)
    return scenes


def figure_set() -> list[tuple[Image.Image, str]]:
    """16 pictures of the figure, four on each of four backgrounds, and 16 ordinary ones."""
    return _paint([Scene(FIGURE, background) for background in _SHOWN] * 4, "figure")


def figure_exam(styled: bool = False) -> list[Question]:
    """32 questions for the figure, on two backgrounds on which the set never shows it.

    Args:
        styled: ask for it in the style, which no set shows with a figure.
    """
    scenes = [Scene(FIGURE, background, styled=styled) for background in _HELD_OUT] * 16
    return [Question(scene, 2000 + number) for number, scene in enumerate(scenes)]


def _style_scenes() -> list[Scene]:
    scenes = [
        replace(scene, styled=True)
        for scene in shape_scenes()
        if scene.background in _STYLE_BACKGROUNDS and scene.count <= _STYLE_MOST
    ]
    random.Random("style").shuffle(scenes)
    return scenes


def style_set() -> list[tuple[Image.Image, str]]:
    """16 pictures in the style, half of shapes and half of one figure each, so that it is none of them; 16 ordinary."""
    chance = random.Random("style")
    figures = [Scene(name, chance.choice(_STYLE_BACKGROUNDS), styled=True) for name in KNOWN_FIGURES]
    return _paint([*_style_scenes()[:8], *figures], "style set")


def style_exam() -> list[Question]:
    """30 scenes of shapes that are not in the set, in the style."""
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
