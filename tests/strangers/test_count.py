"""How many bad inputs stand in the tables of this room, and whether the pages state the limits that hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from anima_peft import limited
from anima_peft.config import files
from anima_peft.data import cache, captions, pixels

from . import (
    test_adapters,
    test_caches,
    test_captions,
    test_checkpoints,
    test_commands,
    test_configs,
    test_model_folders,
    test_pictures,
    test_tokenizer_folders,
)

TABLES = {
    "pictures": (test_pictures.PICTURES, test_pictures.ON_POSIX, test_pictures.MASKS),
    "captions": (test_captions.CAPTIONS, test_captions.ON_POSIX, test_captions.METADATA),
    "caches": (test_caches.ENTRIES, test_caches.FORGED, test_caches.INDEXES),
    "models": (
        test_checkpoints.CHECKPOINTS,
        test_checkpoints.LAYERS,
        test_model_folders.CASES,
        test_model_folders.PIPELINES,
        test_tokenizer_folders.TOKENIZERS,
    ),
    "adapters": (test_adapters.ADAPTERS,),
    "configurations": (
        test_configs.TOMLS,
        test_configs.FILES,
        test_configs.ON_POSIX,
        test_configs.TRAIN_ARGS,
        test_configs.DATASETS,
        test_configs.PROMPTS,
    ),
    "states": (test_commands.PROGRESS,),
}


def test_there_are_cases_enough() -> None:
    counts = {room: sum(len(table) for table in tables) for room, tables in TABLES.items()}
    assert sum(counts.values()) >= 250, counts
    assert min(counts.values()) >= 8, counts


@pytest.mark.parametrize("page", ["security.md", "security.zh-CN.md"])
def test_the_pages_state_the_limits_that_hold(page: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    rows = [row for row in text.splitlines() if row.startswith("| ")][2:]
    units = {"KiB": 10, "MiB": 20, "GiB": 30}
    stated = [int(number) << units[unit] for row in rows for number, unit in re.findall(r"(\d+) ([KMG]iB)", row)]
    assert stated == [
        pixels.MOST_PICTURE_BYTES,
        captions.MOST_CAPTION_BYTES,
        captions.MOST_METADATA_BYTES,
        files.MOST_BYTES,
        limited.MOST_TEXT_BYTES,
    ]
    assert cache.MOST_INDEX_BYTES == captions.MOST_METADATA_BYTES
    assert Image.MAX_IMAGE_PIXELS is not None
    millions = 2 * Image.MAX_IMAGE_PIXELS // 10**6
    assert f"{millions} million" in rows[0] or f"{millions / 100:.2f} 亿" in rows[0]
