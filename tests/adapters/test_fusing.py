"""Adapters fused into the weights: by scale and name, undone, and what is refused meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from anima_peft.adapters import strengths
from anima_peft.adapters.lora import LoraConfig
from anima_peft.errors import InputError
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.acting import TOLERANCES, expected, with_both
from tests.adapters.adapting import (
    Factors,
    as_file,
    assert_close,
    assert_same_weights,
    base_weights,
    output,
    tiny_model,
)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("lora_scale", [1.0, 0.5])
def test_fusing_and_unfusing(adapters, dtype: torch.dtype, lora_scale: float) -> None:
    model = with_both(adapters, dtype)
    model.set_adapters(["a", "b"], [0.6, 0.9])
    base, unfused = base_weights(model), output(model).float()
    model.fuse_lora(lora_scale)
    assert strengths.fused_adapters(model.components) == {"a", "b"}
    fused = output(model).float()
    assert_close(fused, expected(adapters, a=0.6 * lora_scale, b=0.9 * lora_scale), 2 * TOLERANCES[dtype])
    assert (fused - output(tiny_model())).abs().max() > 0.1
    model.unfuse_lora()
    assert strengths.fused_adapters(model.components) == set()
    assert_close(output(model).float(), unfused, TOLERANCES[dtype])
    for name, weight in base_weights(model).items():
        # One rounding when the delta is added, one when it is taken off again.
        limit = 2 * torch.finfo(dtype).eps * float(base[name].abs().max() + 2)
        assert (weight.float() - base[name].float()).abs().max() <= limit, name


def test_the_scale_of_one_fusing_is_forgotten(adapted, adapters) -> None:
    adapted.set_adapters(["a", "b"], [0.6, 0.9])
    adapted.fuse_lora(0.1)
    adapted.unfuse_lora()
    assert_close(output(adapted), expected(adapters, a=0.6, b=0.9))
    adapted.fuse_lora()
    assert_close(output(adapted), expected(adapters, a=0.6, b=0.9))


@pytest.mark.parametrize("names", ["a", ["a"], ["a", "a"]], ids=str)
def test_fusing_by_name(adapted, adapters, names: Any) -> None:
    adapted.set_adapters("a", 0.5)
    adapted.fuse_lora(adapter_names=names)
    assert strengths.fused_adapters(adapted.components) == {"a"}
    assert_close(output(adapted), expected(adapters, a=0.5))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        pytest.param(["a"], "b would cease to act", id="an active one left out"),
        pytest.param(["c"], "no adapter to fuse: 'c'", id="unknown"),
        pytest.param([], "none is active", id="none"),
    ],
)
def test_fusing_what_cannot_be_fused_changes_nothing(adapted, names: list[str], message: str) -> None:
    base, before = base_weights(adapted), output(adapted)
    with pytest.raises(InputError, match=message):
        adapted.fuse_lora(adapter_names=names)
    assert torch.equal(output(adapted), before)
    assert_same_weights(base_weights(adapted), base)


def test_nothing_to_fuse_or_unfuse() -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="none is active"):
        model.fuse_lora()
    with pytest.raises(InputError, match="no adapter is fused"):
        model.unfuse_lora()


OPERATIONS: dict[str, Callable[[AnimaTransformerModel, Factors], object]] = {
    "set_adapters": lambda model, _: model.set_adapters("a", 0.5),
    "fuse_lora": lambda model, _: model.fuse_lora(),
    "delete_adapters": lambda model, _: model.delete_adapters("a"),
    "unload": lambda model, _: model.unload_lora(),
    "add_adapter": lambda model, _: model.add_adapter(LoraConfig(r=2), "new"),
    "load_lora_adapter": lambda model, factors: model.load_lora_adapter(as_file(factors, "kohya"), "new"),
    "disable_lora": lambda model, _: strengths.set_enabled(model.components, False),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_while_fused_nothing_that_would_be_without_effect_is_done(adapted, adapters, name: str) -> None:
    adapted.fuse_lora()
    fused = output(adapted)
    with pytest.raises(InputError, match=rf"{name}: adapters are fused \(a, b\); call unfuse_lora\(\) first"):
        OPERATIONS[name](adapted, adapters["a"])
    assert torch.equal(output(adapted), fused)
    adapted.unfuse_lora()
    assert_close(output(adapted), expected(adapters, a=1, b=1))


def test_a_fusing_that_fails_midway_is_undone(adapters) -> None:
    model = tiny_model()
    parameters = model.add_adapter(LoraConfig(r=2, init_lora_weights=False))
    model.load_lora_adapter(as_file(adapters["a"], "kohya"), "a")
    base = base_weights(model)
    before = output(model)
    last = parameters[-1].detach()
    right = last.clone()
    last[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"fuse_lora: .*default"):
        model.fuse_lora(0.1)
    last.copy_(right)
    assert strengths.fused_adapters(model.components) == set()
    for name, weight in base_weights(model).items():
        torch.testing.assert_close(weight, base[name], rtol=0, atol=1e-6)
    assert_close(output(model), before)


def test_fused_by_diffusers_own_methods(adapted, adapters) -> None:
    adapted.transformer.fuse_lora(adapter_names=["a", "b"])
    assert strengths.fused_adapters(adapted.components) == {"a", "b"}
    adapted.unfuse_lora()
    assert_close(output(adapted), expected(adapters, a=1, b=1))
