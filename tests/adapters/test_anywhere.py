"""Adapters on others' objects: diffusers' modular pipeline, bare parts, mappings; and what is none of Anima's."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance
from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook, apply_group_offloading
from diffusers.modular_pipelines.anima import AnimaAutoBlocks

from anima_peft import delete_adapters, load_adapter, set_adapters, unload_adapters
from anima_peft.adapters.anywhere import components_of
from anima_peft.errors import InputError
from anima_peft.pipeline import AnimaPipeline
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import (
    SOME_MODULES,
    TO_Q,
    Snapshot,
    add_explicitly,
    as_file,
    assert_close,
    assert_same_weights,
    base_weights,
    factors_of_kind,
    output,
    random_factors,
    tensors_by_key,
    tiny_model,
)

TOLERANCE = 1e-5


@pytest.fixture
def model() -> AnimaTransformerModel:
    return tiny_model()


def modular(model: AnimaTransformerModel, other_parts: dict[str, Any]) -> Any:
    pipe = AnimaAutoBlocks().init_pipeline()
    pipe.update_components(**other_parts, **model.components, guider=ClassifierFreeGuidance(guidance_scale=4.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def explicit_of(of: Callable[[str], bool], strengths: Callable[[str], float] = lambda _: 1.0) -> torch.Tensor:
    """The output with LoRA added to the weights of those modules whose native name is wanted."""
    model = tiny_model()
    for name, factors in factors_of_kind(model, "LoRA").items():
        if of(name.native):
            add_explicitly(model, {name: factors}, strengths(name.native))
    return output(model)


HOLDERS: dict[str, Callable[[AnimaTransformerModel, dict[str, Any]], Any]] = {
    "AnimaTransformerModel": lambda model, _: model,
    "AnimaPipeline": lambda model, parts: AnimaPipeline(**parts, **model.components),
    "AnimaModularPipeline": modular,
    "a mapping": lambda model, _: dict(model.components),
    "any object": lambda model, _: SimpleNamespace(**model.components, vae=None),
    "a compiled model": lambda model, _: torch.compile(model, backend="eager"),
    "compiled parts": lambda model, _: {c: torch.compile(m, backend="eager") for c, m in model.components.items()},
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_the_same_output_on_every_holder(
    model: AnimaTransformerModel, other_parts: dict[str, Any], holder: str
) -> None:
    target, base = HOLDERS[holder](model, other_parts), base_weights(model)
    tensors = tensors_by_key(factors_of_kind(model, "LoRA"))
    assert load_adapter(target, tensors, adapter_name="mine") == "mine"
    assert_close(output(model), explicit_of(lambda _: True), TOLERANCE)
    assert load_adapter(target, tensors, strength=0.5) == "default_0"
    assert_close(output(model), explicit_of(lambda _: True, lambda _: 1.5), TOLERANCE)
    set_adapters(target, ["mine", "default_0"], [-0.25, 1.0])
    assert_close(output(model), explicit_of(lambda _: True, lambda _: 0.75), TOLERANCE)
    delete_adapters(target, "mine")
    assert_close(output(model), explicit_of(lambda _: True), TOLERANCE)
    unload_adapters(target)
    assert_same_weights(dict(model.state_dict()), base)
    assert torch.equal(output(model), output(tiny_model()))


def test_the_modular_pipeline_draws_with_it_as_ours_does(
    model: AnimaTransformerModel, other_parts: dict[str, Any]
) -> None:
    call = {"prompt": "a red circle", "height": 32, "width": 48, "num_inference_steps": 2}

    def draw(pipe: Any, **out: str) -> Any:
        return pipe(**call, generator=torch.Generator().manual_seed(0), **out)

    stock, tensors = modular(model, other_parts), tensors_by_key(factors_of_kind(model, "LoKr low-rank"))
    before = draw(stock, output="latents")
    load_adapter(stock, tensors, adapter_name="mine")
    ours = AnimaPipeline(**other_parts, **tiny_model().components)
    ours.set_progress_bar_config(disable=True)
    ours.load_lora_weights(tensors)
    after = draw(stock, output="latents")
    assert torch.equal(after, draw(ours, output_type="latent").images)
    assert (after - before).abs().max() > 0.01
    unload_adapters(stock)
    assert torch.equal(draw(stock, output="latents"), before)


def in_conditioner(native: str) -> bool:
    return native.startswith("llm_adapter.")


@pytest.mark.parametrize("part", ["transformer", "text_conditioner"])
def test_a_bare_part_takes_its_own_adapters_and_refuses_the_others(model: AnimaTransformerModel, part: str) -> None:
    bare, of_conditioner = getattr(model, part), part == "text_conditioner"
    modules = tuple(native for native in SOME_MODULES if in_conditioner(native) == of_conditioner)
    for style in ("kohya", "comfy", "diffusers", "original bare"):
        factors = random_factors(model, modules)
        load_adapter(bare, as_file(factors, style), strength=0.5)
        expected = tiny_model()
        add_explicitly(expected, factors, 0.5)
        assert_close(output(model), output(expected), TOLERANCE)
        unload_adapters(bare)
    before = Snapshot.of(model.components)
    with pytest.raises(InputError, match="names no known module or part"):
        load_adapter(bare, as_file(random_factors(model), "kohya"))
    assert Snapshot.of(model.components) == before


STRENGTHS: dict[str, tuple[Any, Callable[[str], float]]] = {
    "a number": (0.3, lambda _: 0.3),
    "zero": (0, lambda _: 0.0),
    "a component": ({"text_conditioner": 0.2}, lambda n: 0.2 if in_conditioner(n) else 1.0),
    "a block, natively": ({"blocks.1": 0.2}, lambda n: 0.2 if n.startswith("blocks.1.") else 1.0),
    "a block": ({"transformer_blocks.0": -0.2}, lambda n: -0.2 if n.startswith("blocks.0.") else 1.0),
    "a conditioner's block": (
        {"llm_adapter.blocks.1": 0.2},
        lambda n: 0.2 if n.startswith("llm_adapter.blocks.1.") else 1.0,
    ),
    "a part and a block of it": (
        {"transformer": 0.5, "blocks.0": 2.0},
        lambda n: 1.0 if in_conditioner(n) else 2.0 if n.startswith("blocks.0.") else 0.5,
    ),
    "a layer": ({"transformer_blocks.0.attn1.to_q": 0.1}, lambda n: 0.1 if n == TO_Q else 1.0),
}


@pytest.mark.parametrize(("strength", "expected"), STRENGTHS.values(), ids=STRENGTHS)
def test_strengths_by_place_and_what_they_do_not_name_has_one(
    model: AnimaTransformerModel, strength: Any, expected: Callable[[str], float]
) -> None:
    tensors = tensors_by_key(factors_of_kind(model, "LoRA"))
    load_adapter(model, tensors, "mine", strength)
    assert_close(output(model), explicit_of(lambda _: True, expected), TOLERANCE)
    load_adapter(model, tensors, "mine", 0.0, hotswap=True)
    assert_close(output(model), output(tiny_model()), TOLERANCE)
    set_adapters(model, "mine", strength)
    assert_close(output(model), explicit_of(lambda _: True, expected), TOLERANCE)


def test_a_hotswap_keeps_the_strength_unless_one_is_given(model: AnimaTransformerModel) -> None:
    tensors = tensors_by_key(factors_of_kind(model, "LoRA"))
    load_adapter(model, tensors, "mine", 0.3)
    load_adapter(model, tensors, "mine", hotswap=True)
    assert_close(output(model), explicit_of(lambda _: True, lambda _: 0.3), TOLERANCE)


@pytest.mark.parametrize(
    "strength", [float("nan"), float("inf"), "0.5", True, {"blocks.7": 1.0}, {"nowhere": 1.0}, {"blocks.0": None}]
)
def test_what_is_no_strength_is_refused_before_anything_is_loaded(model: AnimaTransformerModel, strength: Any) -> None:
    before = Snapshot.of(model.components)
    with pytest.raises(InputError, match=r"a strength must be|no place named"):
        load_adapter(model, tensors_by_key(factors_of_kind(model, "LoRA")), strength=strength)
    assert Snapshot.of(model.components) == before


def test_a_file_that_is_refused_leaves_the_modular_pipeline_as_it_was(
    model: AnimaTransformerModel, other_parts: dict[str, Any]
) -> None:
    pipe = modular(model, other_parts)
    tensors = tensors_by_key(factors_of_kind(model, "LoRA"))
    load_adapter(pipe, tensors, "mine", 0.5)
    before = Snapshot.of(components_of(pipe))
    with pytest.raises(InputError, match="names no known module"):
        load_adapter(pipe, tensors | {"lora_unet_blocks_9_mlp_layer1.alpha": torch.ones(())})
    assert Snapshot.of(components_of(pipe)) == before


def test_layers_change_below_group_offloading(model: AnimaTransformerModel, other_parts: dict[str, Any]) -> None:
    pipe = modular(model, other_parts)
    for part in model.components.values():
        apply_group_offloading(part, onload_device=torch.device("cpu"), offload_type="leaf_level")
    load_adapter(pipe, tensors_by_key(factors_of_kind(model, "LoRA")), "mine")
    assert_close(output(model), explicit_of(lambda _: True), TOLERANCE)
    unload_adapters(pipe)
    assert torch.equal(output(model), output(tiny_model()))
    for part in model.components.values():
        assert _get_top_level_group_offload_hook(part) is not None


FOREIGN: dict[str, tuple[Any, str]] = {
    "a layer": (torch.nn.Linear(2, 2), r"Linear cannot carry an Anima adapter \(no part of Anima in it\)"),
    "a pipeline of another model": (
        SimpleNamespace(transformer=torch.nn.Linear(2, 2), text_encoder=torch.nn.Linear(2, 2)),
        "transformer is a Linear",
    ),
    "a pipeline with a UNet": (SimpleNamespace(unet=torch.nn.Linear(2, 2)), "no part of Anima in it"),
    "a text encoder alone": ({"text_encoder": torch.nn.Linear(2, 2)}, "no part of Anima in it"),
    "parts in the wrong places": (
        {"transformer": tiny_model().text_conditioner},
        "transformer is a AnimaTextConditioner",
    ),
    "an unknown name": ({"unet": tiny_model().transformer}, "unet is a CosmosTransformer3DModel"),
    "a path": ("model.safetensors", "str cannot carry an Anima adapter"),
    "nothing": (None, "NoneType cannot carry"),
}


@pytest.mark.parametrize(("target", "words"), FOREIGN.values(), ids=FOREIGN)
def test_what_is_none_of_animas_is_refused(target: Any, words: str) -> None:
    for act in (lambda: load_adapter(target, {}), lambda: unload_adapters(target), lambda: set_adapters(target, "a")):
        with pytest.raises(InputError, match=words):
            act()
