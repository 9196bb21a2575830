"""Which adapters act and how strongly, fusing and its undoing, and the base weights after all of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from anima_peft.adapters import strengths
from anima_peft.adapters.factors import LoraFactors
from anima_peft.adapters.lora import LoraConfig
from anima_peft.errors import InputError
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import (
    CONDITIONER_MLP,
    MLP,
    MODULATION,
    SOME_MODULES,
    TO_Q,
    Factors,
    add_explicitly,
    as_file,
    assert_close,
    assert_same_weights,
    base_weights,
    explicit,
    output,
    random_factors,
    tiny_model,
)

# Two adapters that share some modules and have others of their own.
OF_A = SOME_MODULES
OF_B = (TO_Q, "blocks.1.self_attn.q_proj", CONDITIONER_MLP, "llm_adapter.blocks.1.mlp.0")


@pytest.fixture(scope="module")
def adapters() -> dict[str, Factors]:
    model = tiny_model()
    return {
        "a": random_factors(model, OF_A, seed=1, mixed=True),
        "b": random_factors(model, OF_B, seed=2, rank=3, alpha=1.5),
    }


@pytest.fixture
def model(adapters: dict[str, Factors]) -> AnimaTransformerModel:
    """The tiny model with both adapters loaded."""
    model = tiny_model()
    for name, factors in adapters.items():
        model.load_lora_adapter(as_file(factors, "kohya"), name)
    return model


def expected(adapters: dict[str, Factors], **weights: float | Callable[[str], float]) -> torch.Tensor:
    """Output with explicit weights; a strength may depend on a module's native name."""
    model = tiny_model()
    for name, weight in weights.items():
        for module, factors in adapters[name].items():
            add_explicitly(model, {module: factors}, weight(module.native) if callable(weight) else weight)
    return output(model)


def active(model: AnimaTransformerModel) -> list[str]:
    return strengths.active_adapters(model.components)


def test_loaded_adapters_act_together_with_strength_one(model, adapters) -> None:
    assert active(model) == ["a", "b"]
    assert_close(output(model), expected(adapters, a=1, b=1))
    assert strengths.list_adapters(model.components) == {"transformer": ["a", "b"], "text_conditioner": ["a", "b"]}


@pytest.mark.parametrize(
    ("names", "weights", "meaning"),
    [
        pytest.param("a", None, {"a": 1}, id="one by name"),
        pytest.param("b", 0.4, {"b": 0.4}, id="one with a number"),
        pytest.param(["a"], [2.0], {"a": 2}, id="one in lists"),
        pytest.param(["a", "b"], None, {"a": 1, "b": 1}, id="two"),
        pytest.param(["a", "b"], [0.3, 0.8], {"a": 0.3, "b": 0.8}, id="a number for each"),
        pytest.param(("b", "a"), (0.8, 0.3), {"a": 0.3, "b": 0.8}, id="in another order"),
        pytest.param(["a", "b"], 0.5, {"a": 0.5, "b": 0.5}, id="one number for both"),
        pytest.param(["a", "b"], [None, 0.5], {"a": 1, "b": 0.5}, id="no number for one"),
        pytest.param(["a", "b"], [-0.5, 0], {"a": -0.5}, id="negative and zero"),
        pytest.param([], None, {}, id="none"),
    ],
)
def test_numbers(model, adapters, names: Any, weights: Any, meaning: dict[str, float]) -> None:
    model.set_adapters(names, weights)
    assert_close(output(model), expected(adapters, **meaning))
    assert active(model) == sorted(meaning) if weights != [-0.5, 0] else ["a", "b"]


def by_prefix(**prefixes: float) -> Callable[[str], float]:
    """Strength of a module by the beginning of its native name (`__` for a dot); 1.0 elsewhere."""

    def strength(native: str) -> float:
        found = [p for p in prefixes if native.startswith(p.replace("__", "."))]
        return prefixes[max(found, key=len)] if found else 1.0

    return strength


PLACES: dict[str, tuple[dict[str, float], Callable[[str], float]]] = {
    "nothing named": ({}, by_prefix()),
    "the conditioner": ({"text_conditioner": 0.2}, by_prefix(llm_adapter=0.2)),
    "both components": (
        {"transformer": 0.5, "text_conditioner": 0.2},
        by_prefix(llm_adapter=0.2, blocks=0.5, final_layer=0.5),
    ),
    "a native block": ({"blocks.1": 0.1}, by_prefix(blocks__1=0.1)),
    "a diffusers block": ({"transformer_blocks.1": 0.1}, by_prefix(blocks__1=0.1)),
    "a block with its component": ({"transformer.transformer_blocks.1": 0.1}, by_prefix(blocks__1=0.1)),
    "a native block of the conditioner": ({"llm_adapter.blocks.1": 0.1}, by_prefix(llm_adapter__blocks__1=0.1)),
    "a block of the conditioner": ({"text_conditioner.blocks.1": 0.1}, by_prefix(llm_adapter__blocks__1=0.1)),
    "a layer outside the blocks": ({"proj_out": 0.1}, by_prefix(final_layer=0.1)),
    "the longest place counts": (
        {"transformer": 0.5, "blocks.1": 0.1, "blocks.0": 0.0},
        by_prefix(blocks=0.5, final_layer=0.5, blocks__1=0.1, blocks__0=0.0),
    ),
    "a place without an adapter": ({"time_embed": 0.1}, by_prefix()),
}


@pytest.mark.parametrize(("places", "meaning"), PLACES.values(), ids=PLACES)
def test_numbers_by_place(model, adapters, places: dict[str, float], meaning: Callable[[str], float]) -> None:
    model.set_adapters(["a", "b"], [places, 0.7])
    assert_close(output(model), expected(adapters, a=meaning, b=0.7))


def test_block_one_is_not_block_ten() -> None:
    places = strengths._Strengths(
        {"blocks.1": 0.5},
        {
            "transformer": torch.nn.ModuleDict(
                {"transformer_blocks": torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(12))}
            )
        },
    )
    assert [places.at("transformer", f"transformer_blocks.{block}.ff") for block in (1, 10, 11)] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        pytest.param("c", None, "no adapter named 'c'; loaded are: a, b", id="unknown adapter"),
        pytest.param(["a", "c", "d"], None, "no adapter named 'c', 'd'", id="unknown adapters"),
        pytest.param(["a", "b"], [1.0], "2 adapters but 1 strengths", id="too few"),
        pytest.param("a", [1.0, 2.0], "1 adapters but 2 strengths", id="too many"),
        pytest.param(["a", "a"], [1.0, 0.5], "named twice: a, a", id="twice"),
        pytest.param("a", {"blocks.2": 0.5}, "no place named 'blocks.2'", id="no such block"),
        pytest.param("a", {"llm_adapter.blocks.2": 0.5}, "no place named", id="no such block of the conditioner"),
        pytest.param("a", {"down": 0.5}, "no place named 'down'", id="another model's place"),
        pytest.param("a", {"blocks.0": "much"}, "a strength must be a finite number, not 'much'", id="text in a place"),
        pytest.param("a", {"transformer": {"blocks.0": 1.0}}, "must be a finite number", id="a place in a place"),
        pytest.param("a", "0.5", "must be a finite number, not '0.5'", id="text"),
        pytest.param("a", True, "must be a finite number, not True", id="a switch"),
        pytest.param("a", float("nan"), "must be a finite number, not nan", id="NaN"),
        pytest.param("a", float("inf"), "must be a finite number, not inf", id="infinity"),
    ],
)
def test_strengths_that_mean_nothing_are_refused_and_change_nothing(
    model, names: Any, weights: Any, message: str
) -> None:
    model.set_adapters("b", 0.4)
    before = output(model)
    with pytest.raises(InputError, match=message):
        model.set_adapters(names, weights)
    assert torch.equal(output(model), before)


def test_a_strength_stays_until_it_is_set_again(model, adapters) -> None:
    model.set_adapters("a", 0.3)
    model.set_adapters("b", 0.6)
    model.set_adapters(["a", "b"])
    assert_close(output(model), expected(adapters, a=1, b=1))
    model.set_adapters("a", 0.3)
    model.load_lora_adapter(as_file(adapters["b"], "kohya"), "third")
    assert_close(output(model), expected(adapters, a=0.3, b=1))


def test_switching_off_and_on(model, adapters) -> None:
    model.set_adapters(["a", "b"], [0.3, 0.8])
    before = output(model)
    strengths.set_enabled(model.components, False)
    assert torch.equal(output(model), output(tiny_model()))
    for refused in (
        lambda: model.add_adapter(LoraConfig(r=2), "new"),
        lambda: model.load_lora_adapter(as_file(adapters["a"], "kohya"), "new"),
        lambda: model.fuse_lora(),
    ):
        with pytest.raises(InputError, match=r"the adapters are switched off; call enable_lora\(\)"):
            refused()
    strengths.set_enabled(model.components, True)
    assert torch.equal(output(model), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_setting_adapters_switches_them_on(model, adapters) -> None:
    strengths.set_enabled(model.components, False)
    model.set_adapters("a", 0.3)
    assert_close(output(model), expected(adapters, a=0.3))


TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def narrow(adapters: dict[str, Factors], dtype: torch.dtype) -> AnimaTransformerModel:
    model = tiny_model(dtype)
    for name, factors in adapters.items():
        model.load_lora_adapter(as_file(factors, "kohya"), name)
    return model


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("lora_scale", [1.0, 0.5])
def test_fusing_and_unfusing(adapters, dtype: torch.dtype, lora_scale: float) -> None:
    model = narrow(adapters, dtype)
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


def test_the_scale_of_one_fusing_is_forgotten(model, adapters) -> None:
    model.set_adapters(["a", "b"], [0.6, 0.9])
    model.fuse_lora(0.1)
    model.unfuse_lora()
    assert_close(output(model), expected(adapters, a=0.6, b=0.9))
    model.fuse_lora()
    assert_close(output(model), expected(adapters, a=0.6, b=0.9))


@pytest.mark.parametrize("names", ["a", ["a"], ["a", "a"]], ids=str)
def test_fusing_by_name(model, adapters, names: Any) -> None:
    model.set_adapters("a", 0.5)
    model.fuse_lora(adapter_names=names)
    assert strengths.fused_adapters(model.components) == {"a"}
    assert_close(output(model), expected(adapters, a=0.5))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        pytest.param(["a"], "b would cease to act", id="an active one left out"),
        pytest.param(["c"], "no adapter to fuse: 'c'", id="unknown"),
        pytest.param([], "none is active", id="none"),
    ],
)
def test_fusing_what_cannot_be_fused_changes_nothing(model, names: list[str], message: str) -> None:
    base, before = base_weights(model), output(model)
    with pytest.raises(InputError, match=message):
        model.fuse_lora(adapter_names=names)
    assert torch.equal(output(model), before)
    assert_same_weights(base_weights(model), base)


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
def test_while_fused_nothing_that_would_be_without_effect_is_done(model, adapters, name: str) -> None:
    model.fuse_lora()
    fused = output(model)
    with pytest.raises(InputError, match=rf"{name}: adapters are fused \(a, b\); call unfuse_lora\(\) first"):
        OPERATIONS[name](model, adapters["a"])
    assert torch.equal(output(model), fused)
    model.unfuse_lora()
    assert_close(output(model), expected(adapters, a=1, b=1))


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


def test_fused_by_diffusers_own_methods(model, adapters) -> None:
    model.transformer.fuse_lora(adapter_names=["a", "b"])
    assert strengths.fused_adapters(model.components) == {"a", "b"}
    model.unfuse_lora()
    assert_close(output(model), expected(adapters, a=1, b=1))


def test_deleting_the_last_adapter_restores_the_model_bit_for_bit(adapters) -> None:
    for dtype in TOLERANCES:
        original = tiny_model(dtype)
        model = narrow(adapters, dtype)
        model.set_adapters(["a", "b"], [0.3, 0.8])
        output(model)
        model.delete_adapters(["a", "b"])
        assert_same_weights(dict(model.state_dict()), dict(original.state_dict()))
        assert [type(module) for module in model.modules()] == [type(module) for module in original.modules()]
        assert torch.equal(output(model), output(original))
        assert not hasattr(model.transformer, "peft_config")
        assert not model.transformer._hf_peft_config_loaded


@pytest.mark.parametrize("acting", [["a", "b"], ["b"]], ids=str)
def test_deleting_one_leaves_the_others_as_strong_as_they_were(model, adapters, acting: list[str]) -> None:
    base = base_weights(model)
    model.set_adapters(acting, [0.3, 0.8][-len(acting) :])
    model.delete_adapters("a")
    assert active(model) == ["b"]
    assert_close(output(model), expected(adapters, b=0.8))
    assert_same_weights(base_weights(model), base)
    assert not [name for name in model.state_dict() if ".a." in name]
    model.load_lora_adapter(as_file(adapters["a"], "kohya"), "a")
    assert_close(output(model), expected(adapters, a=1, b=0.8))


def test_deleting_the_only_active_one_leaves_none_active(model) -> None:
    model.set_adapters("a")
    model.delete_adapters("a")
    assert active(model) == []
    assert torch.equal(output(model), output(tiny_model()))


def test_deleting_an_unknown_one_deletes_none(model) -> None:
    before = output(model)
    with pytest.raises(InputError, match="no adapter named 'c' to delete"):
        model.delete_adapters(["a", "c"])
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_unloading_restores_the_model_bit_for_bit(adapters, dtype: torch.dtype) -> None:
    original = tiny_model(dtype)
    model = narrow(adapters, dtype)
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear", train_text_conditioner=True), "new")
    model.unload_lora()
    assert_same_weights(dict(model.state_dict()), dict(original.state_dict()))
    assert torch.equal(output(model), output(original))
    assert strengths.adapter_names(model.components) == []
    model.unload_lora()  # nothing there: nothing to do
    model.load_lora_adapter(as_file(adapters["a"], "kohya"))
    if dtype == torch.float32:
        assert_close(output(model), output(explicit(adapters["a"])))


def test_adapters_on_one_component_alone(adapters) -> None:
    model = tiny_model()
    for name, modules in (("in dit", (TO_Q, MLP, MODULATION)), ("in conditioner", (CONDITIONER_MLP,))):
        model.load_lora_adapter(as_file(random_factors(model, modules), "kohya"), name)
    assert strengths.list_adapters(model.components) == {
        "transformer": ["in dit"],
        "text_conditioner": ["in conditioner"],
    }
    assert active(model) == ["in dit", "in conditioner"]
    model.set_adapters("in conditioner", 0.5)
    assert_close(output(model), output(explicit(random_factors(model, (CONDITIONER_MLP,)), 0.5)))
    model.delete_adapters("in conditioner")
    assert not hasattr(model.text_conditioner, "peft_config")
    model.set_adapters("in dit")
    assert_close(output(model), output(explicit(random_factors(tiny_model(), (TO_Q, MLP, MODULATION)))))


def test_two_adapters_are_the_sum_of_their_deltas(model, adapters) -> None:
    both = dict(copy.copy(adapters["a"]))
    for name, f in adapters["b"].items():
        if name not in both:
            both[name] = f
            continue
        first = both[name]
        # One adapter of both ranks with the scales folded in.
        down = torch.cat([first.down, f.down])
        up = torch.cat([first.up * first.scale * 0.4, f.up * f.scale * 0.7], dim=1)
        both[name] = LoraFactors(down, up, float(down.shape[0]))
    for name, f in both.items():
        strength = 1.0 if name in adapters["a"] and name in adapters["b"] else 0.4 if name in adapters["a"] else 0.7
        both[name] = LoraFactors(f.down, f.up * strength, f.alpha)
    single = tiny_model()
    single.load_lora_adapter(as_file(both, "kohya"))
    model.set_adapters(["a", "b"], [0.4, 0.7])
    assert_close(output(model), output(single))
