"""Which adapters act, and how strongly, as a whole and by place."""

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
from tests.adapters.acting import active, expected
from tests.adapters.adapting import (
    CONDITIONER_MLP,
    MLP,
    MODULATION,
    TO_Q,
    as_file,
    assert_close,
    explicit,
    output,
    random_factors,
    tiny_model,
)


def test_loaded_adapters_act_together_with_strength_one(adapted, adapters) -> None:
    assert active(adapted) == ["a", "b"]
    assert_close(output(adapted), expected(adapters, a=1, b=1))
    assert strengths.list_adapters(adapted.components) == {"transformer": ["a", "b"], "text_conditioner": ["a", "b"]}


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
def test_numbers(adapted, adapters, names: Any, weights: Any, meaning: dict[str, float]) -> None:
    adapted.set_adapters(names, weights)
    assert_close(output(adapted), expected(adapters, **meaning))
    assert active(adapted) == sorted(meaning) if weights != [-0.5, 0] else ["a", "b"]


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
def test_numbers_by_place(adapted, adapters, places: dict[str, float], meaning: Callable[[str], float]) -> None:
    adapted.set_adapters(["a", "b"], [places, 0.7])
    assert_close(output(adapted), expected(adapters, a=meaning, b=0.7))


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
    adapted, names: Any, weights: Any, message: str
) -> None:
    adapted.set_adapters("b", 0.4)
    before = output(adapted)
    with pytest.raises(InputError, match=message):
        adapted.set_adapters(names, weights)
    assert torch.equal(output(adapted), before)


def test_a_strength_stays_until_it_is_set_again(adapted, adapters) -> None:
    adapted.set_adapters("a", 0.3)
    adapted.set_adapters("b", 0.6)
    adapted.set_adapters(["a", "b"])
    assert_close(output(adapted), expected(adapters, a=1, b=1))
    adapted.set_adapters("a", 0.3)
    adapted.load_lora_adapter(as_file(adapters["b"], "kohya"), "third")
    assert_close(output(adapted), expected(adapters, a=0.3, b=1))


def test_switching_off_and_on(adapted, adapters) -> None:
    adapted.set_adapters(["a", "b"], [0.3, 0.8])
    before = output(adapted)
    strengths.set_enabled(adapted.components, False)
    assert torch.equal(output(adapted), output(tiny_model()))
    for refused in (
        lambda: adapted.add_adapter(LoraConfig(r=2), "new"),
        lambda: adapted.load_lora_adapter(as_file(adapters["a"], "kohya"), "new"),
        lambda: adapted.fuse_lora(),
    ):
        with pytest.raises(InputError, match=r"the adapters are switched off; call enable_lora\(\)"):
            refused()
    strengths.set_enabled(adapted.components, True)
    assert torch.equal(output(adapted), before)
    assert not any(parameter.requires_grad for parameter in adapted.parameters())


def test_setting_adapters_switches_them_on(adapted, adapters) -> None:
    strengths.set_enabled(adapted.components, False)
    adapted.set_adapters("a", 0.3)
    assert_close(output(adapted), expected(adapters, a=0.3))


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


def test_two_adapters_are_the_sum_of_their_deltas(adapted, adapters) -> None:
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
    adapted.set_adapters(["a", "b"], [0.4, 0.7])
    assert_close(output(adapted), output(single))
