"""The script that trains the miniature runs from nothing to files that draw, and goes on where it was stopped."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

from anima_peft.miniature import miniature_files
from anima_peft.miniature.commands import load_pipeline
from anima_peft.miniature.drawing import known_scenes

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/train_miniature.py with two steps for each part, on two scenes."""
    monkeypatch.syspath_prepend(TOOLS)
    modules = [importlib.import_module(name) for name in ("train_miniature", "miniature_vae", "miniature_dit")]
    train, vae, dit = modules
    monkeypatch.setattr(vae, "STEPS", 2)
    monkeypatch.setattr(dit, "STAGES", ((1, 1e-3), (1, 1e-3)))
    for module in (vae, dit):
        monkeypatch.setattr(module, "BATCH", 2)
        monkeypatch.setattr(module, "known_scenes", lambda: known_scenes()[:2])
    monkeypatch.setattr(vae, "MEASURED", 50)
    monkeypatch.setattr(dit, "LAYOUTS", 2)
    monkeypatch.setattr(dit, "_SAVE_EVERY", 1)
    monkeypatch.setattr(train, "report_score", lambda files: None)
    return train


def test_the_script_is_there_to_run(script: ModuleType) -> None:
    assert callable(script.main)


@pytest.mark.slow
def test_miniature_is_trained_from_nothing(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_miniature.py", str(tmp_path)])
    script.main()
    files = miniature_files(tmp_path / "miniature")
    assert load_pipeline(files)("red circle", height=64, width=64, num_inference_steps=1).images[0].size == (64, 64)
    whole = load_file(files.transformer)
    capsys.readouterr()
    for name in ("dit.pt", "dit_running.pt"):
        (tmp_path / name).unlink()
    files.transformer.unlink()
    dit = sys.modules["miniature_dit"]

    def interrupted(step: int) -> float:
        if step == 1:
            raise KeyboardInterrupt
        return rate(step)

    rate = dit.learning_rate
    monkeypatch.setattr(dit, "learning_rate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main()
    monkeypatch.setattr(dit, "learning_rate", rate)
    script.main()
    assert "dit 1/2" not in capsys.readouterr().out.partition("dit 2/2")[0].rpartition("seed 0")[2]
    again = load_file(files.transformer)
    assert all((again[name] == whole[name]).all() for name in whole)
