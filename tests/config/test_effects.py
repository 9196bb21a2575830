"""Every option of the training has its effect; the cases are in `effects`."""

from __future__ import annotations

from pathlib import Path

import pytest

from anima_peft.config import (
    EmaOptions,
    FlowOptions,
    LossOptions,
    NetworkOptions,
    OptimizerOptions,
    ScheduleOptions,
)
from anima_peft.config.options import options_of

from .effects import EFFECTS
from .effects.bench import Bench

IN_WHOLE_RUNS = {"max_grad_norm"}
GROUPS_HERE = (NetworkOptions, FlowOptions, LossOptions, OptimizerOptions, ScheduleOptions, EmaOptions)


def test_every_option_of_these_groups_has_a_case() -> None:
    expected = {option.name for group in GROUPS_HERE for option in options_of(group)}
    assert EFFECTS.keys() | IN_WHOLE_RUNS == expected | {"xformers", "attn_mode"}


@pytest.mark.parametrize("name", EFFECTS)
def test_effect(load_with, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    EFFECTS[name](Bench(load_with, tmp_path, monkeypatch))
