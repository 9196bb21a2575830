"""What several of the adapters' tests build on."""

from __future__ import annotations

from typing import Any

import pytest

from anima_peft.adapters.naming import ModuleTable
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.acting import OF_A, OF_B, with_both
from tests.adapters.adapting import Factors, Snapshot, random_factors, table, tiny_model
from tests.components import tiny_pipeline_components


@pytest.fixture(scope="module")
def model() -> AnimaTransformerModel:
    """The tiny model, for its names and sizes: left as it is. Tests that change one have another of this name."""
    return tiny_model()


@pytest.fixture(scope="module")
def modules(model: AnimaTransformerModel) -> ModuleTable:
    """Its modules' names."""
    return table(model)


@pytest.fixture(scope="module")
def untouched(model: AnimaTransformerModel) -> Snapshot:
    """What it was before the tests."""
    return Snapshot.of(model.components)


@pytest.fixture(scope="module")
def adapters() -> dict[str, Factors]:
    """Two adapters by name, for modules of which they share some."""
    model = tiny_model()
    return {
        "a": random_factors(model, OF_A, seed=1, mixed=True),
        "b": random_factors(model, OF_B, seed=2, rank=3, alpha=1.5),
    }


@pytest.fixture
def adapted(adapters: dict[str, Factors]) -> AnimaTransformerModel:
    """The tiny model with both adapters loaded."""
    return with_both(adapters)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All parts of a pipeline by their names."""
    return tiny_pipeline_components(tmp_path_factory.mktemp("components"))


@pytest.fixture(scope="module")
def other_parts(parts: dict[str, Any]) -> dict[str, Any]:
    """Those on which no adapter of the DiT and the conditioner lives."""
    return {name: part for name, part in parts.items() if name not in ("transformer", "text_conditioner")}
