"""The older one-file layout converted by the command: files written, refused clearly, never overwritten."""

from __future__ import annotations

import runpy
import sys
import tomllib
from pathlib import Path

import pytest
import toml

from anima_peft.cli import DONE, FAULTY_INPUT
from anima_peft.config import load

from .root_style import NEWER, OLDER, PLACES, convert


@pytest.mark.parametrize("text", [OLDER, NEWER], ids=["older", "newer"])
def test_the_command_writes_what_the_trainer_takes(
    text: str, old_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old_file.write_text(text.format(**PLACES), encoding="utf-8")
    assert convert("--input", old_file, "--output_dir", tmp_path / "new") == DONE
    out, _ = capsys.readouterr()
    train_args, dataset = tmp_path / "new" / "train_args.toml", tmp_path / "new" / "dataset.toml"
    assert out.startswith(f"train args: {train_args}\ndataset: {dataset}\n")
    config = load(["--config_file", str(train_args)])
    assert f"# dataset: {dataset}" in config.resolved.splitlines()
    assert config.datasets[0].subsets[0].image_dir == Path(PLACES["pictures"])
    said = [line for line in out.splitlines() if line.startswith("left out: ")]
    if text is OLDER:
        assert config.train.save.save_every_n_epochs == 1
        assert config.train.save.output_name == "old_lora"
        for key in (
            "dataset.max_ar",
            "lora.lokr_use_tucker",
            "training.log_every",
            "wandb.enabled",
            "lora.lokr_factor",
        ):
            assert any(line.startswith(f"left out: {key} = ") for line in said), key
        assert any("training.lr_warmup_ratio" in line and "has no effect with lr_scheduler" in line for line in said)
    else:
        assert config.train.save.save_every_n_steps == 200
        assert config.train.network.network_dim == 100000
        assert [line.split(" = ")[0].removeprefix("left out: ") for line in said] == [
            "training.epochs",
            "training.persistent_data_loader_workers",
        ]


def test_the_tool_is_the_command(old_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = Path(__file__).parents[2] / "tools" / "convert_anima_root_to_kohya.py"
    monkeypatch.setattr(sys, "argv", [tool.name, "--input", str(old_file), "--output_dir", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(tool), run_name="__main__")
    assert leaving.value.code == DONE
    assert (tmp_path / "new" / "train_args.toml").is_file()


def test_names_and_the_default_folder(old_file: Path) -> None:
    assert convert("--input", old_file, "--train_args_name", "a.toml", "--dataset_name", "b.toml") == DONE
    assert sorted(path.name for path in (old_file.parent / "kohya_converted").iterdir()) == ["a.toml", "b.toml"]


def test_outputs_are_not_overwritten_unless_asked(
    old_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new").mkdir()
    mine = tmp_path / "new" / "dataset.toml"
    mine.write_text("mine")
    assert convert("--input", old_file, "--output_dir", tmp_path / "new") == FAULTY_INPUT
    assert "dataset.toml exist already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["dataset.toml"]
    assert mine.read_text() == "mine"
    assert convert("--input", old_file, "--output_dir", tmp_path / "new", "--overwrite") == DONE
    assert "[[datasets]]" in mine.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "content", "message"),
    [
        ((), None, "cannot be read"),
        ((), "a = ", "line 1: not TOML"),
        ((), "seed = 1\n", "not of the older one-file layout"),
        ((), '[model]\ntransformer_path = "t"\n[dataset]\ndata_dir = "p"\n', "model.t5_tokenizer_dir: required"),
        (("--train_args_name", "a/b.toml"), OLDER, '--train_args_name: expected a file name without "/"'),
        (("--train_args_name", "x.toml", "--dataset_name", "x.toml"), OLDER, "are both x.toml"),
    ],
)
def test_clear_errors_and_nothing_written(
    words: tuple[str, ...], content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "old.toml"
    if content is not None:
        source.write_text(content, encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    assert convert("--input", source, *words) == FAULTY_INPUT
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_input_is_never_overwritten(old_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = old_file.read_bytes()
    words = ("--output_dir", old_file.parent, "--dataset_name", old_file.name, "--overwrite")
    assert convert("--input", old_file, *words) == FAULTY_INPUT
    assert "is the input" in capsys.readouterr().err
    assert old_file.read_bytes() == before


def test_what_the_trainer_does_not_take_is_said(
    old_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tomllib.loads(OLDER.format(**PLACES))
    document["lora"]["lora_rank"] = 0
    document["training"].pop("learning_rate")
    old_file.write_text(toml.dumps(document).replace("C:\\p", "C:/p"), encoding="utf-8")
    assert convert("--input", old_file, "--output_dir", tmp_path / "new") == DONE
    out, err = capsys.readouterr()
    assert "dataset.toml" in out
    assert err.startswith("to mend before training, in the new files: The configuration has 2 faults")
    assert "network_dim: expected an integer of at least 1, got 0" in err
    assert "learning_rate: required" in err
