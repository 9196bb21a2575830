"""The page about a run, drawn from its record and what lies beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import TrainingError
from ..outputs import Outputs
from ..record import Record, recording
from .page import write_report

__all__ = ["reporting", "write_report"]

logger = logging.getLogger(__name__)


@contextmanager
def reporting(record: Record, outputs: Outputs) -> Iterator[None]:
    """Record what happens inside, and write the report of it, also where it fails; a run without a step has none.

    Raises:
        TrainingError: all went well but the writing of the report.
    """
    try:
        with recording(record):
            yield
    except Exception:
        if record.is_on_disk:
            try:
                write_report(outputs)
            except OSError as fault:
                logger.warning("%s could not be written (%s).", outputs.report, fault)
        raise
    if record.is_on_disk:
        try:
            write_report(outputs)
        except OSError as error:
            raise TrainingError(
                f"{outputs.final} is saved; its report could not be written ({error}). "
                f"`anima-peft report {outputs.folder} --name {outputs.name}` writes it."
            ) from error
