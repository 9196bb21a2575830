"""What ends a command with one clear message and without a traceback."""

from __future__ import annotations

from collections.abc import Iterable


class InputError(ValueError):
    """A fault in what the user gave: a file, a key, an option, a picture.

    Its text names the file or key, what was expected and what to do. The command line prints it without a
    traceback and ends with exit code 2; everything else that escapes is a bug of ours.
    """

    @classmethod
    def from_faults(cls, heading: str, faults: Iterable[str]) -> InputError:
        """One error that lists every fault, so that a user mends all of them in one go."""
        return cls("\n".join([heading, *(f"  - {fault}" for fault in faults)]))


class Interrupted(Exception):
    """A run that was asked to end before its time, and has saved what it had.

    Attributes:
        exit_code: 128 and the signal's number, as shells have it; 0 where no signal asked.
    """

    def __init__(self, text: str, signal_number: int = 0):
        super().__init__(text)
        self.exit_code = 128 + signal_number if signal_number else 0


class TrainingError(RuntimeError):
    """A run that cannot go on, for a reason that its text explains; not a fault of the configuration's form."""
