"""Every TOML below configs/, and every one in the documents, is read by the schema that training uses."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from anima_peft.config import load
from tests.docs.pages import blocks

from .conftest import values_of

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
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


def test_the_miniature_draws_three_pictures() -> None:
    path = CONFIGS / "examples" / "anima_miniature_train_args.toml"
    lines = load(["--config_file", str(path), "--dataset_config", str(pair_of(path))]).train.log.compare_prompts
    assert [(line.width, line.height, line.steps, line.guidance_scale) for line in lines] == [(64, 64, 12, 3.0)] * 3


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])


BLOCKS = [
    (block.page, block.line, block.code)
    for page in PAGES
    for block in blocks(page)
    if block.language == "toml" and not block.needs  # other programs' files say so
]


def test_documents_hold_configurations_of_every_kind() -> None:
    assert len(BLOCKS) >= 6
    keys = [tomllib.loads(block).keys() for _, _, block in BLOCKS]
    assert sum("datasets" in found for found in keys) >= 2
    assert sum({"model", "training"} <= found for found in keys) >= 2
    assert sum("network_module" in found for found in keys) >= 2


@pytest.mark.parametrize(("page", "line", "block"), BLOCKS, ids=[f"{page}:{line}" for page, line, _ in BLOCKS])
def test_a_configuration_in_a_document(
    load_with, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str, line: int, block: str
) -> None:
    """Whole files are read as they are; parts of train args beside what a run needs at least."""
    document = tomllib.loads(block)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a prompt\n", encoding="utf-8")  # the name that documents use
    if "datasets" in document:
        run = load_with(dataset=block)
        assert run.datasets[0].subsets
    elif "model" in document:
        path = tmp_path / "root.toml"
        path.write_text(block, encoding="utf-8")
        run = load(["--config_file", str(path)])
        assert not any("left out" in warning for warning in run.warnings)
    else:
        run = load_with(document)
        assert all(values_of(run)[key] == value for key, value in document.items() if key in ("output_name", "seed"))
