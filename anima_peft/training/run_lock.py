"""One run at a time in a folder under a name: a lock of the operating system, which goes with its process."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from ..errors import InputError
from ..files import require_writable
from .outputs import Outputs

logger = logging.getLogger(__name__)


@contextmanager
def run_lock(outputs: Outputs) -> Iterator[None]:
    """Keep other runs from these outputs inside of this.

    However a process ends, the system takes its lock: a killed run is in nobody's way. Afterwards the lock's file is
    gone, and so is a folder that was made for it and has stayed empty.

    Raises:
        InputError: another run is at work there, or the folder cannot be written to.
    """
    require_writable("output_dir", outputs.folder)
    made = [folder for folder in (outputs.folder, *outputs.folder.parents) if not folder.exists()]
    outputs.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(outputs.lock, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"output_dir: another run is writing {outputs.final} and what belongs to it. Wait for its end, stop it "
            f"(a file {outputs.name}-stop in its folder does so), or choose another output_dir or output_name."
        ) from error
    except (OSError, NotImplementedError) as error:  # so some network and FUSE drives
        logger.warning("%s: this drive knows no locks (%s); nothing notices a second run here.", outputs.folder, error)
    try:
        yield
    finally:
        if lock.is_locked:
            # Before it is let go: afterwards the file might be another run's. Windows deletes no file that is open;
            # there, letting go does it.
            with contextlib.suppress(OSError):
                outputs.lock.unlink()
            with contextlib.suppress(OSError):  # a drive that is gone; the lock goes with the process
                lock.release()
        for folder in made:
            with contextlib.suppress(OSError):  # in use
                folder.rmdir()


def is_running(outputs: Outputs) -> bool:
    """Whether a run, of this process or another, has the lock of these outputs; nothing is written to find out."""
    if not outputs.lock.exists():
        return False
    try:
        with FileLock(outputs.lock, timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # a folder that may only be read, or a drive without locks
        return False
