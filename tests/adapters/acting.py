"""Two adapters that share some modules and have others of their own, on the tiny model."""

from __future__ import annotations

from collections.abc import Callable

import torch

from anima_peft.adapters import strengths
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import (
    CONDITIONER_MLP,
    SOME_MODULES,
    TO_Q,
    Factors,
    add_explicitly,
    as_file,
    output,
    tiny_model,
)

OF_A = SOME_MODULES
OF_B = (TO_Q, "blocks.1.self_attn.q_proj", CONDITIONER_MLP, "llm_adapter.blocks.1.mlp.0")


def expected(adapters: dict[str, Factors], **weights: float | Callable[[str], float]) -> torch.Tensor:
    """Output with explicit weights; a strength may depend on a module's native name."""
    model = tiny_model()
    for name, weight in weights.items():
        for module, factors in adapters[name].items():
            add_explicitly(model, {module: factors}, weight(module.native) if callable(weight) else weight)
    return output(model)


def active(model: AnimaTransformerModel) -> list[str]:
    return strengths.active_adapters(model.components)


# of outputs, by the dtype of the weights
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def with_both(adapters: dict[str, Factors], dtype: torch.dtype = torch.float32) -> AnimaTransformerModel:
    """The tiny model with both adapters loaded."""
    model = tiny_model(dtype)
    for name, factors in adapters.items():
        model.load_lora_adapter(as_file(factors, "kohya"), name)
    return model
