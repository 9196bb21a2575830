"""Files of the older one-file layout, both generations: converted, and trained from both ways."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anima_peft.commands.migrate import migrate_file
from anima_peft.config import load
from anima_peft.miniature import MiniatureFiles
from anima_peft.models.encoders import load_text_encoder
from anima_peft.training.run import train

from ..config.root_style import NEWER, OLDER


@pytest.fixture(scope="module")
def places(miniature: MiniatureFiles, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The miniature as such files name it: the text encoder is a folder with its tokenizer; two pictures."""
    folder = tmp_path_factory.mktemp("older")
    load_text_encoder(miniature.text_encoder).save_pretrained(folder / "qwen")
    shutil.copytree(miniature.tokenizer, folder / "qwen", dirs_exist_ok=True)
    (folder / "图片").mkdir()
    for number in range(2):
        for suffix in (".png", ".txt"):
            shutil.copy(miniature.pictures / f"{number:02d}{suffix}", folder / "图片")
    return {
        "transformer": miniature.transformer,
        "vae": miniature.vae,
        "text_encoder": folder / "qwen",
        "t5_tokenizer": miniature.t5_tokenizer,
        "pictures": folder / "图片",
    }


@pytest.mark.parametrize(
    ("text", "steps", "files"),
    [
        # an epoch of 2 pictures, each twice, in buckets of their own
        (OLDER, 2, {"old_lora.safetensors", "old_lora-000001.safetensors", "old_lora-000001-state", "old_lora-state"}),
        (NEWER, 2, {"newer_lokr.safetensors"}),
    ],
    ids=["older", "newer"],
)
def test_it_converts_and_trains(
    text: str, steps: int, files: set[str], places: dict[str, Path], tmp_path: Path
) -> None:
    old = tmp_path / "old.toml"
    old.write_text(text.format(**places, output=tmp_path / "single"), encoding="utf-8")
    migrate_file(["--input", str(old), "--output_dir", str(tmp_path / "new")], prog="convert")
    flags = ["--log_with", "none"]
    single = train(load(["--config_file", str(old), *flags]))
    two_files = ["--config_file", str(tmp_path / "new" / "train_args.toml"), "--output_dir", str(tmp_path / "two")]
    two = train(load([*two_files, *flags]))

    assert single.steps == two.steps == steps
    for folder in ("single", "two"):
        assert files <= {path.name for path in (tmp_path / folder).iterdir()}
    one, other = load_file(single.adapter), load_file(two.adapter)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert single.relative_delta == two.relative_delta > 0
