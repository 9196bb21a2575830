"""What the tests of several adapters at once share."""

from __future__ import annotations

import pytest

from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.acting import OF_A, OF_B, with_both
from tests.adapters.adapting import (
    Factors,
    random_factors,
    tiny_model,
)


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
