"""The query and key norms' eps."""

from __future__ import annotations

import pytest
import torch

from anima_peft.models.precision import set_qk_norm_eps
from tests.components import tiny_conditioner, tiny_transformer


def qk_norms(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for name, module in transformer.named_modules() if name.endswith(("norm_q", "norm_k"))]


def test_sets_every_query_and_key_norm_and_no_other() -> None:
    transformer = tiny_transformer()
    others = {
        name: module.eps
        for name, module in transformer.named_modules()
        if hasattr(module, "eps") and not name.endswith(("norm_q", "norm_k"))
    }
    assert [norm.eps for norm in qk_norms(transformer)] == [1e-5] * 8  # what diffusers builds
    set_qk_norm_eps(transformer)
    assert [norm.eps for norm in qk_norms(transformer)] == [1e-6] * 8
    assert others == {name: module.eps for name, module in transformer.named_modules() if name in others}
    set_qk_norm_eps(transformer, 1e-5)
    assert [norm.eps for norm in qk_norms(transformer)] == [1e-5] * 8


def test_reaches_the_norm_below_an_adapter() -> None:
    transformer = tiny_transformer()
    attention = transformer.transformer_blocks[0].attn1
    norm = attention.norm_q
    attention.norm_q = torch.nn.Module()
    attention.norm_q.base_layer = norm
    set_qk_norm_eps(transformer)
    assert norm.eps == 1e-6


def test_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="norm_q"):
        set_qk_norm_eps(tiny_conditioner())
