"""What the tests of bad input share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here, and to wait for the disk at every entry is most of the time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
