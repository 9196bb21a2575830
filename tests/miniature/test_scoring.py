"""The pixel check calls drawn pictures right, blurred ones too, and others wrong."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from anima_peft.miniature import Scene, base_exam, figure_exam, figure_set, judge, score, style_exam, style_set
from anima_peft.miniature.drawing import FIGURE, SHAPES, known_scenes, shape_scenes

KNOWN = shape_scenes()
STYLED = [replace(scene, styled=True) for scene in KNOWN if scene.background != "black"]
FIGURES = [Scene(FIGURE, background, count) for background in ("white", "grey", "black") for count in (1, 2)]


def blurred(picture: Image.Image) -> Image.Image:
    """As the VAE leaves pictures: soft edges, and noise of a few grey levels."""
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6))).astype(np.float64)
    pixels += np.random.default_rng(0).normal(0, 8, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("scenes", [KNOWN, STYLED, FIGURES * 4], ids=["known", "styled", "figure"])
def test_drawn_pictures_are_right(scenes: list[Scene]) -> None:
    layout = random.Random(3)
    pictures = [scene.paint(layout=layout) for scene in scenes]
    assert score(pictures, scenes).share == 1.0
    assert score([blurred(picture) for picture in pictures], scenes).share > 0.95


def test_no_picture_passes_for_another_scene() -> None:
    layout = random.Random(4)
    scenes = [*random.Random(0).sample(KNOWN, 16), *STYLED[::18], *FIGURES]
    for scene in scenes:
        picture = scene.paint(layout=layout)
        assert [other.caption for other in scenes if judge(picture, other).right] == [scene.caption]


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("background", {"background": "grey"}),
        ("colour", {"colour": "green"}),
        ("count", {"count": 3}),
        ("shape", {"thing": "square"}),
        ("style", {"styled": True}),
    ],
)
def test_each_part_is_judged(part: str, change: dict[str, object]) -> None:
    scene = Scene("circle", "white", 2, "red")
    assert not getattr(judge(replace(scene, **change).paint(), scene), part)


@pytest.mark.parametrize("picture", [Image.new("RGB", (64, 64), "white"), Image.effect_noise((64, 64), 80)])
def test_nothing_and_noise_are_wrong(picture: Image.Image) -> None:
    assert score([picture] * len(KNOWN), KNOWN).right == 0


def test_half_a_figure_is_none() -> None:
    picture = Scene(FIGURE, "white").paint()
    earless = picture.copy()
    earless.paste("white", (0, 0, 64, 22))
    plain = Image.fromarray(np.where(np.asarray(picture)[..., 2:] == 190, (240, 120, 20), picture).astype(np.uint8))
    for wrong in (earless, plain):
        assert not judge(wrong, Scene(FIGURE, "white")).shape


def test_exams_are_long_and_ask_for_what_the_sets_do_not_show() -> None:
    assert len(base_exam()) >= 60
    assert {question.scene.thing for question in base_exam()} == set(SHAPES)
    for exam, shown in ((figure_exam(), figure_set()), (style_exam(), style_set())):
        assert 16 <= len(shown) <= 32
        assert len(exam) >= 30
        assert len({question.seed for question in exam}) == len(exam)
        captions = {caption for _, caption in shown}
        assert not {question.scene.caption for question in [*exam, *base_exam()]} & captions
    both = {caption for _, caption in [*figure_set(), *style_set()]}
    assert not {question.scene.caption for question in figure_exam(styled=True)} & both


def test_no_known_caption_has_the_words_of_the_sets() -> None:
    known = {word for scene in known_scenes() for word in scene.caption.replace(",", "").split()}
    assert not known & {"momo", "comiq", "style"}
