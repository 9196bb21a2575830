"""A process that has imported everything, and forks one child for each run that it is told of.

Run as `python -m tests.training.forks`. It reads one run a line from standard input, as JSON, and answers with one
line: the child's exit code, or minus the signal that ended it. How often each of `POINTS` was passed goes into a file.
A start costs seconds, a fork nearly nothing, so that many runs can be killed. POSIX only.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker

from anima_peft import cli, files
from anima_peft.config import load
from anima_peft.data.cache import TensorCache
from anima_peft.training import state
from anima_peft.training.run import train
from anima_peft.training.saving import Saver

POINTS: dict[str, tuple[Any, str]] = {
    "flushing": (os, "fsync"),
    "putting in place": (os, "replace"),
    "renaming": (os, "rename"),
    "writing tensors": (files, "save_file"),
    "writing with torch": (torch, "save"),
    "removing": (shutil, "rmtree"),
    "writing a cache entry": (TensorCache, "write"),
    "saving": (Saver, "_write"),
    "dropping": (Saver, "_drop"),
    "saving by accelerate": (Accelerator, "save_state"),
    "saving a state": (state, "flush_tree"),
    "logging": (TensorBoardTracker, "log"),
    "ending the log": (Accelerator, "end_training"),
}
"""Where a run can be killed: module or class, and the function in it."""


def _watch(point: str, passed: Counter[str], kill: dict[str, Any]) -> None:
    owner, name = POINTS[point]
    real: Callable[..., Any] = getattr(owner, name)

    def end() -> None:
        os.kill(os.getpid(), signal.Signals[kill["signal"]])

    def call(*args: Any, **kwargs: Any) -> Any:
        passed[point] += 1
        now = kill.get("point") == point and kill["count"] == passed[point]
        if now and kill["moment"] == "before":
            end()
        result = real(*args, **kwargs)
        if now and kill["moment"] == "half" and kill["signal"] == "SIGKILL" and name in ("save_file", "save"):
            # What a kill inside of the writer leaves.
            path = next(arg for arg in args if isinstance(arg, (str, Path)))
            os.truncate(path, os.path.getsize(path) // 2)
        if now and kill["moment"] != "before":
            end()
        return result

    setattr(owner, name, call)


def _run(words: list[str], kill: dict[str, Any], counts: Path, output: Path) -> int:
    # Its own files: what the parent reads and writes is not for the child.
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(handle, number)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    passed: Counter[str] = Counter()
    for point in POINTS:
        _watch(point, passed, kill)
    if "after" in kill:

        def wait() -> None:
            time.sleep(kill["after"])
            os.kill(os.getpid(), signal.Signals[kill["signal"]])

        threading.Thread(target=wait, daemon=True).start()
    start = time.monotonic()
    code = cli.report_faults(lambda: _train(words))
    counts.write_text(json.dumps({"passed": passed, "seconds": time.monotonic() - start}), encoding="utf-8")
    return code


def _train(words: list[str]) -> None:
    train(load(words))


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        given = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = _run(given["words"], given["kill"], Path(given["counts"]), Path(given["output"]))
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


if __name__ == "__main__":
    main()
