"""Which of the processes this is that a launcher has started, before torch and accelerate are there to ask.

The names are those of `torchrun`, whose settings `accelerate launch` passes on.
"""

from __future__ import annotations

import os


def is_main() -> bool:
    """Whether this is the only process or the first of all: the one that says what a run has brought."""
    return int(os.environ.get("RANK", "0")) == 0


def is_local_main() -> bool:
    """Whether this is the only process or the first of its machine: the one that warns and reports faults."""
    return int(os.environ.get("LOCAL_RANK", "0")) <= 0
