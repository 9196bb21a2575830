"""The TOML file of `log_tracker_config`: further arguments of `wandb.init`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .files import read_toml
from .reading import Faults
from .schema import Found

_TABLE = "wandb"
# What other options say, or the run itself.
_SAID_ELSEWHERE = {"project": "log_tracker_name", "dir": "logging_dir"}


def read_tracker_arguments(found: Mapping[str, Found], faults: Faults) -> Mapping[str, Any]:
    """The table [wandb] of the file that `log_tracker_config` names; its other keys are for wandb to check."""
    given = found.get("log_tracker_config")
    if given is None or not isinstance(given.value, str):
        return {}
    try:
        document = read_toml(Path(given.value))
    except InputError as fault:
        faults.add(given.path, str(fault))
        return {}
    table = document.get(_TABLE)
    if document.keys() != {_TABLE} or not isinstance(table, Mapping):
        faults.add(given.path, f"{given.value}: expected one table, [{_TABLE}], with arguments of wandb.init")
        return {}
    for key, option in _SAID_ELSEWHERE.items():
        if key in table:
            faults.add(given.path, f"{given.value}: {_TABLE}.{key} has no effect; set {option}")
    return table
