"""Runs as users start them: a process of their own, with what it says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .conftest import Configure

ROOT = Path(__file__).parents[2]
LAUNCH = ["-m", "accelerate.commands.launch"]
SCRIPT = str(ROOT / "examples" / "train_anima_lora.py")
SECONDS = 240


def written(configure: Configure, folder: Path, *flags: str) -> str:
    """The resolved configuration as a file."""
    file = folder / "config.toml"
    file.write_text(configure(*flags).resolved, encoding="utf-8")
    return str(file)


def start(folder: Path, words: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Python with these words, at work in `folder`, as the leader of a group of processes."""
    return subprocess.Popen(
        [sys.executable, *words],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            **(environment or {}),
        },
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
        # A shell's background, where the tests may run, ignores it, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(file: Path, run: subprocess.Popen[str]) -> None:
    """Until the run has written a file."""
    latest = time.monotonic() + SECONDS
    while not file.exists():
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < latest
        time.sleep(0.05)


def end(run: subprocess.Popen[str]) -> tuple[str, str]:
    """Standard output and error, once the last process that writes there is gone."""
    try:
        return run.communicate(timeout=SECONDS)
    finally:
        kill(run)


def kill(run: subprocess.Popen[str]) -> None:
    """The whole group, if it is still there."""
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
