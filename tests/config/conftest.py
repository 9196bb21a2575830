"""A complete, valid configuration in a temporary folder, to be varied by each test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import toml

from anima_peft.config import RunConfig, load
from anima_peft.config.loading import OPTIONS
from anima_peft.errors import InputError

from .root_style import OLDER, PLACES

TRAIN_ARGS = {
    "anima_transformer": "models/anima",
    "network_module": "networks.lora_anima",
    "learning_rate": 1e-4,
    "output_dir": "out",
    "output_name": "lora",
}
PICTURES = '[[datasets.subsets]]\nimage_dir = "pictures"\n'
DATASET = "[[datasets]]\n" + PICTURES
PROMPTS = str(Path(__file__).with_name("prompts.txt"))

Load = Callable[..., RunConfig]


def values_of(run: RunConfig) -> dict[str, Any]:
    """Every option of a run by name, tuples as lists, but for the secret ones."""
    flat = {name: value for group in asdict(run.train).values() for name, value in group.items()}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in flat.items()
        if not OPTIONS[name].rules.secret
    }


@pytest.fixture
def load_with(tmp_path: Path) -> Load:
    """Loads the valid configuration with some train args replaced (None leaves one out), or other texts, or flags."""

    def run(train: dict[str, Any] | str | None = None, dataset: str = DATASET, argv: tuple[str, ...] = ()) -> RunConfig:
        if not isinstance(train, str):
            merged = {**TRAIN_ARGS, **(train or {})}
            train = toml.dumps({key: value for key, value in merged.items() if value is not None})
        train_file, dataset_file = tmp_path / "train.toml", tmp_path / "dataset.toml"
        train_file.write_text(train, encoding="utf-8")
        dataset_file.write_text(dataset, encoding="utf-8")
        return load(["--config_file", str(train_file), "--dataset_config", str(dataset_file), *argv])

    return run


def faults_of(error: InputError) -> list[str]:
    """The faults of a report, whose heading counts them."""
    heading, *lines = str(error).split("\n  - ")
    count = "1 fault " if len(lines) == 1 else f"{len(lines)} faults "
    assert f"The configuration has {count}" in heading + " "
    return lines


def dataset(keys: str = "", subset: str = "", general: str = "") -> str:
    """A dataset TOML with further keys of its three tables."""
    return f"[general]\n{general}\n[[datasets]]\n{keys}\n{PICTURES}{subset}\n"


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    """A file of the older one-file layout."""
    path = tmp_path / "旧 root.toml"
    path.write_text(OLDER.format(**PLACES), encoding="utf-8")
    return path
