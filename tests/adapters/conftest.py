"""Fixtures of the tests of adapters."""

from __future__ import annotations

from typing import Any

import pytest

from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import tiny_model
from tests.components import tiny_pipeline_components


@pytest.fixture(scope="module")
def model() -> AnimaTransformerModel:
    """For its names and sizes; never changed. Tests that change theirs have a fixture of their own."""
    return tiny_model()


@pytest.fixture
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of small files need not reach the disk."""
    monkeypatch.setattr("anima_peft.files.os.fsync", lambda _: None)


@pytest.fixture(scope="module")
def other_parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a pipeline has beside the two parts that adapters live on."""
    parts = tiny_pipeline_components(tmp_path_factory.mktemp("components"))
    return {name: part for name, part in parts.items() if name not in ("transformer", "text_conditioner")}
