"""What is asked of a running training from outside: by signals, and by files put into its folder."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from types import FrameType
from typing import Any

from .outputs import Outputs
from .processes import Processes

logger = logging.getLogger(__name__)

# Ctrl-Break of Windows is SIGBREAK; a terminal that closes sends SIGHUP elsewhere.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
_SET_BY_LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


def leave_signals_to_parent(worker: int) -> None:
    """For a loader's worker: a terminal signals all its processes, and the step that is finished needs batches.

    SIGTERM keeps its usual effect, by which torch ends a worker that hangs. One whose parent is gone ends by itself.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


class Action(Enum):
    """What to do after the present step."""

    SAVE = "save"
    PREVIEW = "preview"
    STOP = "stop"


class Requests:
    """Looked at after every step.

    The first SIGINT, SIGTERM, SIGHUP or Ctrl-Break asks for the end; a second one leaves at once. The end of the
    launcher that started this process, which hands no signal on, asks for it too. A file `<output_name>-save`,
    `<output_name>-preview` or `<output_name>-stop` (or with `.txt`) in the run's folder asks for what it is called, and
    is taken away when seen.

    Of several processes, the main one looks for files; a signal to any of them counts for all.
    """

    def __init__(self, outputs: Outputs, processes: Processes):
        self._processes = processes
        self._files = {
            outputs.folder / f"{outputs.name}-{action.value}{suffix}": action
            for action in Action
            for suffix in ("", ".txt")
            if processes.is_main
        }
        self._launcher = os.getppid() if any(name in os.environ for name in _SET_BY_LAUNCHERS) else None
        self._noted: signal.Signals | None = None
        self.signal: signal.Signals | None = None
        """The signal that asked for the end, if one did, as all processes have agreed."""

    def forget_earlier(self) -> None:
        """Take away files that asked something of an earlier run, and came too late for it."""
        for path in self._files:
            if path.is_file():
                path.unlink(missing_ok=True)
                logger.warning("%s was there before this run and is not heeded.", path)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals inside of this, but those that the process was started to ignore, as with nohup.

        Python lets only the main thread do so; elsewhere files alone are heeded.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        found: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
        # None: set by what is not Python, and could not be put back.
        before = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}

        def note(number: int, frame: FrameType | None) -> None:
            for each, handler in before.items():
                signal.signal(each, handler)
            self._noted = signal.Signals(number)
            text = f"\n{self._noted.name}: finishing this step, then saving. Once more leaves at once."
            with contextlib.suppress(OSError):  # a terminal that is gone
                print(text, file=sys.stderr, flush=True)

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def take(self) -> Action | None:
        """What is asked for now; all processes get the same answer."""
        if self._launcher is not None and os.getppid() != self._launcher and self._noted is None:
            self._noted = signal.SIGTERM
        self.agree()
        if self.signal is not None:
            return Action.STOP
        return self._processes.from_main(self._asked_by_file())

    def agree(self) -> None:
        """Let all processes know of a signal to one of them; one that comes meanwhile counts the next time."""
        seen = self._processes.gather(self._noted)
        self.signal = next((number for number in seen if number is not None), None)

    @property
    def own_signal(self) -> signal.Signals | None:
        """The signal that came to this process, whether the others know of it or not."""
        return self._noted

    def _asked_by_file(self) -> Action | None:
        for path, action in self._files.items():
            if path.is_file():
                with contextlib.suppress(OSError):  # held open by who made it: then at a later step
                    path.unlink()
                    return action
        return None
