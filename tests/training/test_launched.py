"""Signals to runs that were started as users start them."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest

from .conftest import Configure
from .launching import LAUNCH, SCRIPT, end, kill, start, wait_for, written

LAUNCHER = [*LAUNCH, "--num_processes", "1", "--cpu"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX; Windows knows Ctrl-Break only"),
]


@pytest.mark.parametrize(
    ("command", "number", "whole_group", "exit_codes"),
    [
        (["-m", "anima_peft.cli", "train"], signal.SIGTERM, False, {143}),
        (["-m", "anima_peft.cli", "train"], signal.SIGINT, True, {130}),
        ([*LAUNCHER, SCRIPT], signal.SIGTERM, False, {-signal.SIGTERM, 143}),
        # The launcher prints a traceback of its own and is gone before the run has saved.
        ([*LAUNCHER, SCRIPT], signal.SIGINT, True, {1, 130, -signal.SIGINT}),
    ],
    ids=["SIGTERM", "SIGINT", "SIGTERM to the launcher alone", "SIGINT to the launcher's group"],
)
def test_a_signal_saves_and_ends(
    configure: Configure,
    tmp_path: Path,
    command: list[str],
    number: signal.Signals,
    whole_group: bool,
    exit_codes: set[int],
) -> None:
    config = written(configure, tmp_path, "--max_train_steps", "3000", "--save_every_n_steps", "2")
    run = start(tmp_path, [*command, "--config_file", config])
    try:
        wait_for(tmp_path / "output" / "test-step00000002.safetensors", run)
        (os.killpg if whole_group else os.kill)(run.pid, number)
        _, errors = end(run)
    finally:
        kill(run)
    assert run.returncode in exit_codes, errors
    found = re.search(r"Stopped after step (\d+) of 3000; go on with --resume (.*-state)", errors)
    assert found is not None, errors
    assert Path(found[2]).name == f"test-step{int(found[1]):08d}-state"
    assert (Path(found[2]) / "progress.json").is_file()
    assert Path(found[2].removesuffix("-state") + ".safetensors").is_file()
    assert not list((tmp_path / "output").glob(".*"))
