"""Every kind of adapter file: LoHa, whole differences, biases, old norms, and all of them together."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.loha import LohaModule
from safetensors.torch import save_file

from anima_peft.adapters import injection
from anima_peft.adapters.exchange import read_adapter
from anima_peft.adapters.factors import LoHaFactors, tensors_of
from anima_peft.adapters.naming import ModuleTable
from anima_peft.adapters.reading import AdapterFile, parse
from anima_peft.errors import InputError
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import (
    BIASED,
    CONDITIONER_MLP,
    KINDS_OF_FACTORS,
    QUERY_NORM,
    STYLES,
    TO_Q,
    Snapshot,
    Tensors,
    add_explicitly,
    as_file,
    assert_close,
    assert_same_weights,
    base_weights,
    dense,
    factors_of_kind,
    kohya_stem,
    output,
    random_factors,
    table,
    tensors_by_key,
    tiny_model,
)

TOLERANCE = 1e-5
tiny_model_shared = cache(tiny_model)  # for its names and sizes; never changed
kinds = pytest.mark.parametrize("kind", KINDS_OF_FACTORS)


@pytest.fixture(scope="module")
def modules() -> ModuleTable:
    return table(tiny_model_shared())


def explicitly(*adapters: tuple[Mapping[Any, Any], float]) -> torch.Tensor:
    model = tiny_model()
    for factors, strength in adapters:
        add_explicitly(model, factors, strength)
    return output(model)


@kinds
def test_every_kind_gives_the_explicit_weights_output(kind: str, tmp_path: Path) -> None:
    model, base = tiny_model(), output(tiny_model())
    factors = factors_of_kind(model, kind)
    save_file(tensors_by_key(factors), tmp_path / "a.safetensors")
    model.load_lora_adapter(tmp_path / "a.safetensors")
    assert_close(output(model), explicitly((factors, 1.0)), TOLERANCE)
    assert (output(model) - base).abs().max() > 1e-2
    assert list(read_adapter(model.components, "default")) == list(factors)


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]


@kinds
def test_every_kind_in_every_style_and_dtype_is_read(kind: str, modules: ModuleTable) -> None:
    factors = factors_of_kind(tiny_model_shared(), kind)
    for style, dtype in product(STYLES, DTYPES):
        tensors = {key: tensor.to(dtype) for key, tensor in tensors_by_key(factors, style).items()}
        found = parse(AdapterFile("a file", tensors), modules)
        assert list(found) == list(factors)
        for name, expected in factors.items():
            rounded = [tensor.to(dtype) for tensor in tensors_of(expected)]
            assert all(map(torch.equal, tensors_of(found[name]), rounded))
            assert found[name].scale == expected.scale


@kinds
def test_strength_switching_fusing_and_deletion(kind: str) -> None:
    model = tiny_model()
    base, without = base_weights(model), output(model)
    factors = factors_of_kind(model, kind)
    model.load_lora_adapter(tensors_by_key(factors), "one")
    for strength in (0.5, -0.3, 0.0):
        model.set_adapters("one", strength)
        assert_close(output(model), explicitly((factors, strength)), TOLERANCE)
    model.set_adapters("one", 0.5)
    model.fuse_lora()
    assert_close(output(model), explicitly((factors, 0.5)), TOLERANCE)
    model.unfuse_lora()
    assert_close(output(model), explicitly((factors, 0.5)), TOLERANCE)
    again = tiny_model()
    again.load_lora_adapter(tensors_by_key(factors), "one")
    again.delete_adapters("one")
    assert_same_weights(dict(again.state_dict()), base)
    assert torch.equal(output(again), without)
    assert [type(module) for module in again.modules()] == [type(module) for module in tiny_model().modules()]


# DoRA rescales what is already there, so that it is no sum with another adapter.
PAIRS = [(kind, "LoHa") for kind in KINDS_OF_FACTORS if kind != "DoRA"] + [
    ("LoHa", "LoRA"),
    ("norms", "norms"),
    ("biases", "LoRA and biases"),
    ("full difference and biases", "LoRA and biases"),
]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=map(" and ".join, PAIRS))
def test_two_adapters_on_one_module_add_up(first: str, second: str) -> None:
    model = tiny_model()
    base, without = base_weights(model), output(model)
    one, two = factors_of_kind(model, first, seed=1), factors_of_kind(model, second, seed=2, rank=3)
    model.load_lora_adapter(tensors_by_key(one), "one")
    model.load_lora_adapter(tensors_by_key(two, "diffusers"), "two")
    assert_close(output(model), explicitly((one, 1.0), (two, 1.0)), TOLERANCE)
    model.set_adapters(["one", "two"], [0.5, -0.7])
    assert_close(output(model), explicitly((one, 0.5), (two, -0.7)), TOLERANCE)
    model.fuse_lora()
    assert_close(output(model), explicitly((one, 0.5), (two, -0.7)), TOLERANCE)
    model.unfuse_lora()
    model.delete_adapters("one")
    assert_close(output(model), explicitly((two, -0.7)), TOLERANCE)
    alone = tiny_model()
    alone.load_lora_adapter(tensors_by_key(two), "two")
    assert [type(module) for module in model.modules()] == [type(module) for module in alone.modules()]
    model.delete_adapters("two")
    for name, tensor in model.state_dict().items():  # fusing has rounded them
        torch.testing.assert_close(tensor, base[name], atol=1e-6, rtol=0)
    assert_close(output(model), without, TOLERANCE)


def test_several_kinds_in_one_file() -> None:
    model = tiny_model()
    factors: dict[Any, Any] = {}
    for number, kind in enumerate(("LoRA", "LoKr low-rank", "LoHa", "full difference", "LoKr full")):
        of_kind = factors_of_kind(model, kind)
        factors |= {list(of_kind)[number]: list(of_kind.values())[number]}
    factors |= factors_of_kind(model, "norms")
    model.load_lora_adapter(tensors_by_key(factors, "comfy-hybrid"))
    assert_close(output(model), explicitly((factors, 1.0)), TOLERANCE)
    model.unload_lora()
    assert_same_weights(dict(model.state_dict()), base_weights(tiny_model()))


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
@kinds
def test_what_is_saved_loads_to_the_same_output(kind: str, style: Any, tmp_path: Path) -> None:
    model = tiny_model()
    model.load_lora_adapter(tensors_by_key(factors_of_kind(model, kind)))
    path = model.save_lora_adapter(tmp_path / "a.safetensors", format=style)
    loaded = tiny_model()
    loaded.load_lora_adapter(path)
    assert_close(output(loaded), output(model), TOLERANCE)


@pytest.mark.parametrize("rank", [1, 3])
def test_loha_of_lycoris(rank: int, tmp_path: Path) -> None:
    """Its state dict; its delta by `get_weight` (`get_diff_weight` multiplies by the scale a second time)."""
    model = tiny_model()
    linear = model.transformer.transformer_blocks[0].attn1.to_q
    torch.manual_seed(0)
    theirs: Any = LohaModule("x", linear, lora_dim=rank, alpha=2)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    expected = theirs.get_weight(linear.weight.shape).detach()
    tensors = {f"lycoris_{TO_Q.replace('.', '_')}.{key}": value for key, value in theirs.state_dict().items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "a.safetensors")
    model.load_lora_adapter(tmp_path / "a.safetensors")
    ((_, factors),) = read_adapter(model.components, "default").items()
    assert isinstance(factors, LoHaFactors)
    torch.testing.assert_close(dense(factors).float(), expected, atol=1e-5, rtol=1e-5)
    x = torch.randn(3, linear.in_features)
    layer = model.transformer.transformer_blocks[0].attn1.to_q
    torch.testing.assert_close(layer(x), linear(x) + x @ expected.T, atol=1e-4, rtol=1e-4)


def absolute(model: AnimaTransformerModel, value: torch.Tensor, native: str = QUERY_NORM) -> Tensors:
    return {f"__anima_norm__.{native}.weight": value}


def test_old_absolute_norms_become_the_models_own() -> None:
    model, expected = tiny_model(), tiny_model()
    norm = expected.transformer.transformer_blocks[0].attn1.norm_q
    value = torch.linspace(0.5, 1.5, len(norm.weight))
    model.load_lora_adapter(absolute(model, value))
    with torch.no_grad():
        norm.weight.copy_(value)
    assert_close(output(model), output(expected), TOLERANCE)
    assert (output(model) - output(tiny_model())).abs().max() > 1e-3


def test_old_absolute_norms_count_from_the_base_not_from_what_acts_on_it() -> None:
    model = tiny_model()
    model.load_lora_adapter(tensors_by_key(factors_of_kind(model, "norms")), "other")
    value = torch.full((32,), 1.25)
    model.load_lora_adapter(absolute(model, value), "absolute")
    model.set_adapters("absolute")
    expected = tiny_model()
    with torch.no_grad():
        expected.transformer.transformer_blocks[0].attn1.norm_q.weight.copy_(value)
    assert_close(output(model), output(expected), TOLERANCE)


@pytest.mark.parametrize("beside", [False, True], ids=["first adapter", "beside another"])
@pytest.mark.parametrize("kind", ["LoHa", "LoKr low-rank", "full difference and biases", "norms"])
def test_an_injection_that_runs_out_of_memory_leaves_no_layer(
    kind: str, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    if beside:
        model.load_lora_adapter(tensors_by_key(factors_of_kind(model, "LoRA", seed=1)), "other")
        model.set_adapters("other", 0.5)
    before, calls = Snapshot.of(model.components), iter(range(1))
    replace = injection._replace

    def run_out(*arguments: Any) -> None:
        if next(calls, None) is None:
            raise MemoryError
        replace(*arguments)

    monkeypatch.setattr(injection, "_replace", run_out)
    with pytest.raises(MemoryError):
        model.load_lora_adapter(tensors_by_key(factors_of_kind(model, kind)), "new")
    assert Snapshot.of(model.components) == before


STEM = kohya_stem(TO_Q)
NORM, BIAS = kohya_stem(QUERY_NORM), kohya_stem(CONDITIONER_MLP)
MISTAKES: dict[str, tuple[Tensors, str]] = {
    "LoHa without its second pair": (
        {f"{STEM}.hada_w1_a": torch.ones(64, 2), f"{STEM}.hada_w1_b": torch.ones(2, 64)},
        f"{TO_Q}: the `hada_w2` factor is missing",
    ),
    "LoHa of two ranks": (
        {f"{STEM}.hada_w{n}_a": torch.ones(64, n) for n in (1, 2)}
        | {f"{STEM}.hada_w{n}_b": torch.ones(n, 64) for n in (1, 2)},
        "ranks 1 and 2",
    ),
    "LoHa of another size": (
        {f"{STEM}.hada_w{n}_a": torch.ones(32, 2) for n in (1, 2)}
        | {f"{STEM}.hada_w{n}_b": torch.ones(2, 64) for n in (1, 2)},
        "factors for a 32x64 layer, but it is 64x64",
    ),
    "DoRA on LoHa": (
        {f"{STEM}.hada_w{n}_a": torch.ones(64, 2) for n in (1, 2)}
        | {f"{STEM}.hada_w{n}_b": torch.ones(2, 64) for n in (1, 2)}
        | {f"{STEM}.dora_scale": torch.ones(64, 1)},
        "DoRA is supported on LoRA, not on LoHa",
    ),
    "LoRA and a difference": (
        as_file(random_factors(tiny_model(), (TO_Q,)), "kohya") | {f"{STEM}.diff": torch.ones(64, 64)},
        "it has parts of LoRA and of a full difference",
    ),
    "a difference of another size": ({f"{STEM}.diff": torch.ones(64, 32)}, "a full difference of [64, 32]"),
    "a bias where there is none": ({f"{STEM}.diff_b": torch.ones(64)}, "the layer has no bias"),
    "a bias of another size": ({f"{BIAS}.diff_b": torch.ones(7)}, "a bias difference of shape [7], expected [32]"),
    "a norm of another size": ({f"{NORM}.w_norm": torch.ones(7)}, "a norm's delta of shape [7], expected [32]"),
    "a norm in two forms": (
        {f"{NORM}.w_norm": torch.ones(32), f"{NORM}.diff": torch.ones(32)},
        "its delta is there in several forms",
    ),
    "an absolute norm beside a delta": (
        {f"__anima_norm__.{QUERY_NORM}.weight": torch.ones(32), f"{NORM}.w_norm": torch.ones(32)},
        QUERY_NORM,
    ),
    "a norm's bias where there is none": (
        {f"{NORM}.w_norm": torch.ones(32), f"{NORM}.b_norm": torch.ones(32)},
        "a norm's bias, but this norm has none",
    ),
    "a norm's delta on a linear": ({f"{STEM}.w_norm": torch.ones(64)}, "it is not a norm"),
    "an absolute norm that is none": (absolute(tiny_model(), torch.ones(64), TO_Q), "it is not a norm"),
    "an absolute norm of no module": (absolute(tiny_model(), torch.ones(64), "blocks.7.norm"), "names no known"),
    "an infinite alpha": (
        as_file(random_factors(tiny_model(), (TO_Q,)), "kohya") | {f"{STEM}.alpha": torch.tensor(1e39).double()},
        "alpha is inf, expected a finite number",
    ),
}


@pytest.mark.parametrize(("tensors", "words"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_of_the_new_kinds_are_refused(tensors: Tensors, words: str) -> None:
    model = tiny_model()
    with pytest.raises(InputError) as error:
        model.load_lora_adapter(tensors)
    assert words in str(error.value)
    assert_same_weights(dict(model.state_dict()), base_weights(tiny_model()))


def test_biased_modules_have_biases() -> None:
    model = tiny_model()
    for native in BIASED:
        assert model.text_conditioner.get_submodule(native.removeprefix("llm_adapter.")).bias is not None
