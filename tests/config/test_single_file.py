"""A file of the older one-file layout, read as it is."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import toml

from anima_peft.cli import DONE
from anima_peft.config import load
from anima_peft.errors import InputError

from .conftest import values_of
from .root_style import NEWER, OLDER, PLACES, convert


@pytest.mark.parametrize("text", [OLDER, NEWER], ids=["older", "newer"])
def test_a_single_file_is_the_same_as_its_conversion(text: str, old_file: Path, tmp_path: Path) -> None:
    old_file.write_text(text.format(**PLACES), encoding="utf-8")
    assert convert("--input", old_file, "--output_dir", tmp_path / "new") == DONE
    files = sorted(tmp_path.rglob("*"))
    single = load(["--config_file", str(old_file)])
    two = load(["--config_file", str(tmp_path / "new" / "train_args.toml")])
    assert (single.train, single.datasets) == (two.train, two.datasets)
    assert single.warnings[0].startswith("The file has the older one-file layout")
    assert any("output.save_every" in warning for warning in single.warnings)
    assert any(warning.startswith(("wandb.enabled", "training.epochs")) for warning in single.warnings)
    assert sorted(tmp_path.rglob("*")) == files
    assert load(["--config_file", str(old_file), "--seed", "9"]).train.loop.seed == 9


def test_flags_give_an_effect_to_what_had_none(old_file: Path) -> None:
    """The file's warmup does nothing at a constant rate, which the command line changes."""
    words = ["--config_file", str(old_file)]
    assert values_of(load(words))["lr_warmup_steps"] == 0
    changed = load([*words, "--lr_scheduler", "cosine"])
    assert values_of(changed)["lr_warmup_steps"] == 0.05
    assert not any("lr_warmup_ratio" in warning for warning in changed.warnings)


def test_its_pictures_yield_to_another_dataset_config(old_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "elsewhere"\n')
    run_config = load(["--config_file", str(old_file), "--dataset_config", str(other)])
    (dataset,) = run_config.datasets
    assert (dataset.subsets[0].image_dir, dataset.resolution) == (Path("elsewhere"), (1024, 1024))
    assert dataset.batch_size == 2  # [training] still says so
    assert any(text.startswith('dataset.data_dir = "C:') for text in run_config.warnings)
    without = tomllib.loads(OLDER.format(**PLACES))
    del without["dataset"]
    old_file.write_text(toml.dumps(without), encoding="utf-8")
    assert load(["--config_file", str(old_file), "--dataset_config", str(other)]).datasets == run_config.datasets


def test_faults_of_a_single_file_name_its_own_keys(old_file: Path) -> None:
    document = tomllib.loads(OLDER.format(**PLACES))
    document["lora"] |= {"lora_rank": 0, "network_type": "lokr", "lokr_factor": 0}
    document["training"] |= {"learning_rate": "fast", "batch_size": 0}
    document["dataset"] |= {"resolution": 1, "reso_step": 24, "data_dir": ""}
    old_file.write_text(toml.dumps(document), encoding="utf-8")
    with pytest.raises(InputError) as report:
        load(["--config_file", str(old_file)])
    assert [fault.split(":")[0] for fault in str(report.value).split("\n  - ")[1:]] == [
        "dataset.data_dir",
        "lora.lora_rank",
        "training.learning_rate",
        "lora.lokr_factor",
        "dataset.resolution",
        "training.batch_size",
        "dataset.reso_step",
    ]
