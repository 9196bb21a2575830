"""Every TOML below configs/ is read by the schema that training uses."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from anima_peft.config import load

CONFIGS = Path(__file__).parents[2] / "configs"
ALL = sorted(CONFIGS.rglob("*.toml"))
TRAIN_ARGS = [path for path in ALL if path.name.endswith("train_args.toml")]


def pair_of(train_args: Path) -> Path:
    return train_args.with_name(train_args.name.removesuffix("train_args.toml") + "dataset.toml")


def test_some_are_found_and_all_belong_to_a_pair() -> None:
    assert len(TRAIN_ARGS) >= 2
    assert sorted([*TRAIN_ARGS, *map(pair_of, TRAIN_ARGS)]) == ALL


@pytest.mark.parametrize("path", TRAIN_ARGS, ids=lambda path: path.name)
def test_it_loads_without_a_warning(path: Path) -> None:
    run = load(["--config_file", str(path), "--dataset_config", str(pair_of(path))])
    assert run.warnings == ()
    written = tomllib.loads(path.read_text(encoding="utf-8"))
    assert run.train.save.output_name == written["output_name"]
    assert "{time}" in run.train.save.output_dir  # a fresh folder each time


def test_the_miniature_draws_two_pictures() -> None:
    path = CONFIGS / "examples" / "anima_miniature_train_args.toml"
    lines = load(["--config_file", str(path), "--dataset_config", str(pair_of(path))]).train.log.compare_prompts
    assert [(line.width, line.height, line.steps, line.guidance_scale) for line in lines] == [(64, 64, 8, 1.0)] * 2
