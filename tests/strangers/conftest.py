"""What the tests of bad input share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

MOST_MEMORY = 6 * 2**30  # bytes, on top of what the process has


@pytest.fixture(autouse=True)
def nothing_is_flushed(unflushed: None) -> None:
    """No power is cut here."""


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """What wants more is told that there is none, which no test here takes for an answer."""
    try:
        import resource
    except ImportError:  # Windows
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if Path("/proc").exists() else 0
    )
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, before[1]) if used else before)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
