"""Every option of the training has its effect; the cases are in `effects_training`."""

from __future__ import annotations

from pathlib import Path

import pytest

from anima_peft.config.loading import OPTIONS

from .effects_training import EFFECTS, Bench


def test_the_cases_are_of_options() -> None:
    assert EFFECTS.keys() <= OPTIONS.keys()


@pytest.mark.parametrize("name", EFFECTS)
def test_effect(load_with, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    EFFECTS[name](Bench(load_with, tmp_path, monkeypatch))
