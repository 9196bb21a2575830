"""What all rooms' tests share."""

from __future__ import annotations

import os

import huggingface_hub.constants
import pytest
import torch

from anima_peft.miniature import MiniatureFiles, write_random_miniature

# The models are so small that a second thread costs more than it gives.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> MiniatureFiles:
    """A small Anima of random weights in single files, with pictures. Read-only: tests copy what they change."""
    return write_random_miniature(tmp_path_factory.mktemp("miniature"))


@pytest.fixture
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where hundreds of small files are written: to wait for the disk at each would be most of the time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches for a hub; those of the downloads have their own on the loopback."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
