"""Signals to runs that were started as users start them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import Configure

ROOT = Path(__file__).parents[2]
LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
SCRIPT = str(ROOT / "examples" / "train_anima_lora.py")
SECONDS = 240

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX; Windows knows Ctrl-Break only"),
]


@pytest.mark.parametrize(
    ("command", "number", "whole_group", "exit_codes"),
    [
        (["-m", "anima_peft.cli", "train"], signal.SIGTERM, False, {143}),
        (["-m", "anima_peft.cli", "train"], signal.SIGINT, True, {130}),
        ([*LAUNCH, SCRIPT], signal.SIGTERM, False, {-signal.SIGTERM, 143}),
        # The launcher prints a traceback of its own and is gone before the run has saved.
        ([*LAUNCH, SCRIPT], signal.SIGINT, True, {1, 130, -signal.SIGINT}),
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
    resolved = tmp_path / "config.toml"
    resolved.write_text(configure("--max_train_steps", "3000", "--save_every_n_steps", "2").resolved, encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, *command, "--config_file", str(resolved)],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
        # A shell's background, where the tests may run, ignores it, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        first = tmp_path / "output" / "test-step00000002.safetensors"
        end = time.monotonic() + SECONDS
        while not first.exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.05)
        (os.killpg if whole_group else os.kill)(process.pid, number)
        _, errors = process.communicate(timeout=SECONDS)  # until the last process that writes there is gone
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode in exit_codes, errors
    found = re.search(r"Stopped after step (\d+) of 3000; go on with --resume (.*-state)", errors)
    assert found is not None, errors
    assert Path(found[2]).name == f"test-step{int(found[1]):08d}-state"
    assert (Path(found[2]) / "progress.json").is_file()
    assert Path(found[2].removesuffix("-state") + ".safetensors").is_file()
    assert not list((tmp_path / "output").glob(".*"))
