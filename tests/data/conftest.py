"""Small picture folders with captions, in paths with spaces and Chinese and Japanese names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anima_peft.data import DatasetSpec, Picture, SubsetSpec


def noise_image(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """An RGB picture of random colours."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def written(pictures: Iterable[Picture]) -> list[tuple[Picture, str]]:
    """The captions as they are written, each with its picture."""
    return [(picture, picture.caption) for picture in pictures]


@pytest.fixture
def make_pictures(tmp_path: Path) -> Callable[..., Path]:
    """Writes pictures of the given names and sizes, with captions, and returns their folder."""

    def make(folder: str, pictures: dict[str, tuple[int, int]], captions: bool = True) -> Path:
        path = tmp_path / folder
        path.mkdir(parents=True)
        for seed, (name, size) in enumerate(pictures.items()):
            noise_image(size, seed).save(path / name)
            if captions:
                (path / name).with_suffix(".txt").write_text(f"caption of {name}", encoding="utf-8")
        return path

    return make


@pytest.fixture
def folder(make_pictures: Callable[..., Path]) -> Path:
    """Three pictures for two buckets of `spec`, one of them shared."""
    return make_pictures("data set/画像", {"1 一.png": (64, 64), "2 二.png": (50, 50), "10 十.png": (128, 32)})


@pytest.fixture
def spec(folder: Path) -> DatasetSpec:
    return DatasetSpec(
        subsets=(SubsetSpec(folder, num_repeats=2, flip_aug=True),),
        resolution=(64, 64),
        batch_size=2,
        enable_bucket=True,
        min_bucket_reso=32,
        max_bucket_reso=128,
        bucket_reso_steps=32,
    )
