"""Adapters deleted and unloaded: the others act on, and the base weights are those from before."""

from __future__ import annotations

import pytest
import torch

from anima_peft.adapters import strengths
from anima_peft.adapters.lora import LoraConfig
from anima_peft.errors import InputError
from tests.adapters.acting import TOLERANCES, active, expected, with_both
from tests.adapters.adapting import (
    as_file,
    assert_close,
    assert_same_weights,
    base_weights,
    explicit,
    output,
    tiny_model,
)


def test_deleting_the_last_adapter_restores_the_model_bit_for_bit(adapters) -> None:
    for dtype in TOLERANCES:
        original = tiny_model(dtype)
        model = with_both(adapters, dtype)
        model.set_adapters(["a", "b"], [0.3, 0.8])
        output(model)
        model.delete_adapters(["a", "b"])
        assert_same_weights(dict(model.state_dict()), dict(original.state_dict()))
        assert [type(module) for module in model.modules()] == [type(module) for module in original.modules()]
        assert torch.equal(output(model), output(original))
        assert not hasattr(model.transformer, "peft_config")
        assert not model.transformer._hf_peft_config_loaded


@pytest.mark.parametrize("acting", [["a", "b"], ["b"]], ids=str)
def test_deleting_one_leaves_the_others_as_strong_as_they_were(adapted, adapters, acting: list[str]) -> None:
    base = base_weights(adapted)
    adapted.set_adapters(acting, [0.3, 0.8][-len(acting) :])
    adapted.delete_adapters("a")
    assert active(adapted) == ["b"]
    assert_close(output(adapted), expected(adapters, b=0.8))
    assert_same_weights(base_weights(adapted), base)
    assert not [name for name in adapted.state_dict() if ".a." in name]
    adapted.load_lora_adapter(as_file(adapters["a"], "kohya"), "a")
    assert_close(output(adapted), expected(adapters, a=1, b=0.8))


def test_deleting_the_only_active_one_leaves_none_active(adapted) -> None:
    adapted.set_adapters("a")
    adapted.delete_adapters("a")
    assert active(adapted) == []
    assert torch.equal(output(adapted), output(tiny_model()))


def test_deleting_an_unknown_one_deletes_none(adapted) -> None:
    before = output(adapted)
    with pytest.raises(InputError, match="no adapter named 'c' to delete"):
        adapted.delete_adapters(["a", "c"])
    assert torch.equal(output(adapted), before)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_unloading_restores_the_model_bit_for_bit(adapters, dtype: torch.dtype) -> None:
    original = tiny_model(dtype)
    model = with_both(adapters, dtype)
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear", train_text_conditioner=True), "new")
    model.unload_lora()
    assert_same_weights(dict(model.state_dict()), dict(original.state_dict()))
    assert torch.equal(output(model), output(original))
    assert strengths.adapter_names(model.components) == []
    model.unload_lora()  # nothing there: nothing to do
    model.load_lora_adapter(as_file(adapters["a"], "kohya"))
    if dtype == torch.float32:
        assert_close(output(model), output(explicit(adapters["a"])))
