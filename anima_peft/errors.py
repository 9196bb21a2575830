"""What ends a command with one clear message and without a traceback."""

from __future__ import annotations

from collections.abc import Iterable


class InputError(ValueError):
    """A fault in what the user gave: a file, a key, an option, a picture.

    Its text names the file or key, what was expected and what to do. The command line prints it without a
    traceback and ends with exit code 2; everything else that escapes is a bug of ours.
    """

    @classmethod
    def from_faults(cls, heading: str, faults: Iterable[str], most: int | None = None) -> InputError:
        """One error that lists every fault, so that a user mends all of them in one go.

        Args:
            heading: the first line.
            faults: a line each.
            most: how many are listed; the others are counted.
        """
        listed = list(faults)
        lines = listed[:most] + ([] if most is None or len(listed) <= most else [f"… and {len(listed) - most} more"])
        return cls("\n".join([heading, *(f"  - {line}" for line in lines)]))


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
