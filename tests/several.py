"""Runs in several processes: forks of this one, which cost nothing to start, as a launcher would start them."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

from anima_peft.cli import report_faults
from anima_peft.config import RunConfig
from anima_peft.training.run import train

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}  # by the host's name gloo may find another device, or none


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def in_processes(count: int, action: Callable[..., object], *arguments: Any) -> None:
    """Call `action` in so many forks of this process, as `torchrun` would start them on a machine without cards.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of them failed; has its traceback.
    """
    start_processes(_as_launched, (count, free_port(), action, arguments), count, start_method="fork")


def _as_launched(
    process: int, count: int, port: int, action: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    given |= {"RANK": process, "LOCAL_RANK": process, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1, **LOOPBACK}
    os.environ.update({name: str(value) for name, value in given.items()})
    torch.set_num_threads(1)
    action(*arguments)


def this_process() -> int:
    """The number of the process that calls."""
    return int(os.environ.get("RANK", "0"))


def report(config: RunConfig, folder: Path) -> None:
    """Train as the command line does; exit code and what was said go into `<folder>/<process>.txt`."""
    with (folder / f"{this_process()}.txt").open("w", encoding="utf-8") as file:
        logging.getLogger().handlers.clear()  # those of pytest, which would keep ours away
        with contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
            code = report_faults(lambda: print(train(config).steps, "steps"))
        file.write(f"\nexit code {code}")


def reported(folder: Path, process: int) -> str:
    """What `report` has written."""
    return (folder / f"{process}.txt").read_text(encoding="utf-8")
