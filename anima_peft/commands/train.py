"""`anima-peft train`: a run from its configuration."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Sequence

from ..config import load
from ..launched import is_main

logger = logging.getLogger(__name__)


def run(argv: Sequence[str]) -> None:
    """Train as the flags and files say; see `train_from`."""
    train_from(argv, prog="anima-peft train")


def train_from(argv: Sequence[str], prog: str) -> None:
    """Parse, train, and say what was written; with `--print_config`, only show what was parsed.

    The launchers and `anima-peft train` are this call.

    Args:
        argv: the words of the command line.
        prog: what the help calls the program.

    Raises:
        InputError: a fault in the configuration, the model, the pictures or the captions.
        TrainingError: the run cannot go on.
    """
    config = load(argv, prog=prog)
    if config.print_config:
        for warning in config.warnings:
            logger.warning(warning)
        if not is_main():
            return
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # as TOML is; a redirection on Windows would not be
        print(config.resolved, end="")
        return
    from ..training.outputs import written_text
    from ..training.run import train

    result = train(config)
    if not is_main():
        return
    print(f"\n{result.steps} steps; the adapter's size is {result.relative_delta:.2%} of the adapted weights.")
    print(written_text(result.adapter, result.log_folder))
