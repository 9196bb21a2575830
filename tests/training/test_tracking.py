"""Weights & Biases beside TensorBoard: what it is told, and what it is never told."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from anima_peft.cli import FAULTY_INPUT, report_faults
from anima_peft.training.outputs import Outputs
from anima_peft.training.report.history import read_history
from anima_peft.training.run import train
from tests.wandb_stand_in import WandbStandIn

from .conftest import Configure

KEY = "f00d" * 10


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> WandbStandIn:
    stand_in = WandbStandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def test_all_logs_get_the_same(configure: Configure, wandb: WandbStandIn, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red circle --w 32 --h 32 --s 1 --l 1\n", encoding="utf-8")
    flags = ["--max_train_steps", "2", "--sample_prompts", str(prompts), "--sample_every_n_steps", "2"]
    result = train(configure("--log_with", "all", "--wandb_api_key", KEY, *flags))
    record = read_history(Outputs(result.adapter.parent, "test").record)
    losses = {step: values["loss"] for step, values in wandb.values if "loss" in values}
    assert losses == pytest.approx(record.curves["loss"], rel=1e-5)
    assert [values for step, values in wandb.values if "loss" not in values] == [
        {"preview 1: red circle": [(32, 32, 3)]}
    ]
    assert wandb.finished
    assert wandb.arguments["key"] == KEY
    assert result.log_folder is not None
    assert wandb.arguments["name"] == result.log_folder.name
    assert wandb.arguments["config"]["learning_rate"] == 5e-3
    assert str(tmp_path) not in str(wandb.arguments["config"])
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


def test_without_the_package_nothing_is_begun(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else real(name, *a))
    assert report_faults(lambda: train(configure("--log_with", "wandb", "--max_train_steps", "1"))) == FAULTY_INPUT
    assert '"wandb" needs the package wandb (pip install wandb)' in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("fault", ["refuses", "unknown argument"])
def test_what_wandb_refuses_is_told_in_one_sentence(
    configure: Configure,
    wandb: WandbStandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    def refuse(**_: Any) -> None:
        raise wandb.errors.Error("no key")

    flags = ["--log_with", "wandb", "--max_train_steps", "1"]
    if fault == "refuses":
        monkeypatch.setattr(wandb, "init", refuse)
        expected = "Weights & Biases cannot be started (no key). Log in by `wandb login`"
    else:
        file = tmp_path / "tracker.toml"
        file.write_text('[wandb]\nteam = "a"\n', encoding="utf-8")
        flags += ["--log_tracker_config", str(file)]
        expected = "log_tracker_config: wandb.init takes no team"
    # The stand-in's `init` has no **kwargs of its own once it is replaced.
    assert report_faults(lambda: train(configure(*flags))) == FAULTY_INPUT
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.glob("output/test*"))


@pytest.mark.slow
def test_with_wandb_itself_offline(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(configure("--max_train_steps", "2", "--log_with", "wandb", "--wandb_api_key", KEY))
    (run,) = (tmp_path / "output" / "logs" / "wandb").glob("offline-run-*/*.wandb")
    assert b"gradient_norm" in run.read_bytes()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
