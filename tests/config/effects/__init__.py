"""For each option, what changes when it does."""

from __future__ import annotations

from collections.abc import Callable

from . import flow, network, optimization
from .bench import Bench

EFFECTS: dict[str, Callable[[Bench], None]] = {**optimization.EFFECTS, **flow.EFFECTS, **network.EFFECTS}
"""By option; each case fails where the option does nothing."""
