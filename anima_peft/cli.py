"""How a command ends: its exit code, and what the user can mend as one message.

0 done, 1 the run could not go on, 2 a fault in what was given; 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from anima_peft_command import main

from .errors import InputError, Interrupted, TrainingError
from .launched import is_local_main
from .terminal import LINE_BREAK, prepare_terminal
from .texts import escaped

__all__ = ["DONE", "FAILED", "FAULTY_INPUT", "INTERRUPTED", "main", "report_faults"]

DONE, FAILED, FAULTY_INPUT, INTERRUPTED = 0, 1, 2, 130


def report_faults(action: Callable[[], None]) -> int:
    """Run `action`; what the user can mend is printed as one message without a traceback.

    Of several processes on a machine, one speaks: the others know no more. Messages may repeat what stands in files of
    others: what a terminal would obey is escaped in them.

    Returns:
        The exit code.
    """
    prepare_terminal(logging.WARNING if is_local_main() else logging.ERROR)
    try:
        action()
    except InputError as error:
        _say(f"error: {error}")
        return FAULTY_INPUT
    except (TrainingError, OSError) as error:  # OSError: a full disk, a folder gone; its text names the file
        _say(f"error: {error}")
        return FAILED
    except Interrupted as end:
        _say(str(end))
        return end.exit_code
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    return DONE


def _say(text: str) -> None:
    if is_local_main():
        print(escaped(text, keep=LINE_BREAK), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
