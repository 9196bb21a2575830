"""Files that cannot be read, are not TOML, stand in each other's place or are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from anima_peft.config import load
from anima_peft.errors import InputError

from .conftest import faults_of


@pytest.mark.parametrize("argv", [["--config", "old.toml"], ["--seed", "1", "--config=old.toml"]])
def test_the_old_flag_names_the_migration(argv: list[str]) -> None:
    with pytest.raises(InputError) as report:
        load(argv)
    assert "python tools/convert_anima_root_to_kohya.py --input old_root.toml --output_dir converted" in str(
        report.value
    )


def test_no_dataset_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dataset_config: required, but not given"):
        load(["--learning_rate", "1"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = 1\nb = \n", "train.toml, line 2: not TOML: Invalid value"),
        (b"a = 1\na = 2\n", "train.toml, line 2: not TOML: Cannot overwrite a value"),
        (b'vae = "C:\\models\\vae.safetensors"\n', "line 1: not TOML: Unescaped '\\' in a string; write Windows paths"),
        (b"a = 1\nb = '''\nx", "train.toml, line 3: not TOML"),
        (b"a = 1\nb = '\xe9'\n", "train.toml, line 2: not UTF-8; save the file as UTF-8"),
        (b"a = " + b"9" * 5000, "train.toml, not TOML"),
        (None, "train.toml: cannot be read (No such file or directory)"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    train, dataset = tmp_path / "train.toml", tmp_path / "dataset.toml"
    if content is not None:
        train.write_bytes(content)
    dataset.write_bytes(b"[[datasets]]\n")
    with pytest.raises(InputError) as report:
        load(["--config_file", str(train), "--dataset_config", str(dataset)])
    first, second = faults_of(report.value)
    assert message in first
    assert second.startswith("datasets[0].subsets: expected at least one table")


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path, load_with) -> None:
    load_with({"seed": 7})
    for name in ("train.toml", "dataset.toml"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"))
    run = load(["--config_file", str(tmp_path / "train.toml"), "--dataset_config", str(tmp_path / "dataset.toml")])
    assert run.train.loop.seed == 7


def test_files_in_each_others_place(tmp_path: Path, load_with) -> None:
    load_with()
    train, dataset = str(tmp_path / "train.toml"), str(tmp_path / "dataset.toml")
    with pytest.raises(InputError) as report:
        load(["--config_file", dataset, "--dataset_config", train])
    first, second = faults_of(report.value)
    assert first == f"datasets: belongs into the dataset TOML; {dataset} was given as the train args"
    assert second == f"datasets: missing, and {train}, which was given as the dataset TOML, holds train args"
