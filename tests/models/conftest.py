"""A tiny model's weights in a single file, to be varied by each test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from anima_peft.miniature import native_state_dict
from tests.components import tiny_conditioner, tiny_transformer

Tensors = dict[str, torch.Tensor]
Save = Callable[[Tensors], Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes tensors to a file and returns its path."""

    def write(tensors: Tensors) -> Path:
        path = tmp_path / "model.safetensors"
        save_file(tensors, path)
        return path

    return write


@pytest.fixture(scope="module")
def native() -> Tensors:
    """A tiny model's weights under bare native names."""
    return native_state_dict(tiny_transformer(), tiny_conditioner(), prefix="")
