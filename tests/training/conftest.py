"""Runs on the miniature, configured as a user would: by files and flags."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from anima_peft.config import RunConfig, load
from anima_peft.miniature import MiniatureFiles

DATASET = """
[[datasets]]
resolution = 64
batch_size = 4
enable_bucket = true
min_bucket_reso = 32
max_bucket_reso = 128
bucket_reso_steps = 16
[[datasets.subsets]]
image_dir = '{image_dir}'
"""

Configure = Callable[..., RunConfig]
Logged = list[tuple[int, dict[str, float]]]


@pytest.fixture(scope="session")
def pictures(miniature: MiniatureFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures whose cache the tests of this room share."""
    folder = tmp_path_factory.mktemp("图片 with spaces") / "set"
    shutil.copytree(miniature.pictures, folder)
    return folder


@pytest.fixture
def uneven(pictures: Path, tmp_path: Path) -> Path:
    """Pictures in buckets of 4, 3 and 1, without a cache: batches of 4 go round among 2 processes as 2, 1 or none."""
    folder = tmp_path / "图 片"
    shutil.copytree(pictures, folder, ignore=shutil.ignore_patterns(".anima_cache"))
    for stem in ("06", "05", "08", "11"):
        (folder / f"{stem}.png").unlink()
    return folder


@pytest.fixture
def configure(miniature: MiniatureFiles, pictures: Path, tmp_path: Path) -> Configure:
    """Build a configuration: `configure("--max_train_steps", "3", image_dir=folder, subset="flip_aug = true")`."""

    def build(*flags: str, image_dir: Path = pictures, output_dir: Path | None = None, subset: str = "") -> RunConfig:
        dataset = tmp_path / "dataset.toml"
        dataset.write_text(DATASET.format(image_dir=image_dir) + subset, encoding="utf-8")
        given = {
            "dataset_config": dataset,
            "anima_transformer": miniature.transformer,
            "vae": miniature.vae,
            "qwen": miniature.text_encoder,
            "qwen_tokenizer_dir": miniature.tokenizer,
            "t5_tokenizer_dir": miniature.t5_tokenizer,
            "network_module": "networks.lora_anima",
            "network_dim": 4,
            "learning_rate": 5e-3,
            "mixed_precision": "no",
            "output_dir": output_dir or tmp_path / "output",
            "output_name": "test",
            "log_with": "none",
        }
        words = [
            word for name, value in given.items() for word in (f"--{name}", str(value)) if f"--{name}" not in flags
        ]
        return load([*words, *flags])

    return build


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Logged:
    """What is logged at which step, but for speed and memory."""
    values: Logged = []

    def log(self: Accelerator, numbers: dict[str, float], step: int, **_: Any) -> None:
        timeless = {name: value for name, value in numbers.items() if "per_second" not in name and "memory" not in name}
        values.append((step, timeless))

    monkeypatch.setattr(Accelerator, "log", log)
    return values
