"""Adapter files: the keys each style writes, the names that are understood, and all that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

from anima_peft.adapters.factors import LoraFactors
from anima_peft.adapters.naming import ModuleName, ModuleTable
from anima_peft.adapters.reading import AdapterFile, parse
from anima_peft.adapters.writing import FOLDING, FORMATS, Format, serialize
from anima_peft.errors import InputError
from tests.adapters.adapting import (
    CONDITIONER_MLP,
    MLP,
    SOME_MODULES,
    STYLES,
    TO_Q,
    Factors,
    Tensors,
    as_file,
    assert_close,
    diffusers_stem,
    kohya_stem,
    random_factors,
    table,
    tiny_model,
)


@pytest.fixture(scope="module")
def modules() -> ModuleTable:
    return table(tiny_model())


@pytest.fixture
def factors() -> Factors:
    """An adapter with another rank and alpha in every module."""
    return random_factors(tiny_model(), mixed=True)


def read(
    tensors: Tensors, modules: ModuleTable, metadata: dict[str, str] | None = None
) -> dict[ModuleName, LoraFactors]:
    return parse(AdapterFile("a file", tensors, metadata or {}), modules)


def delta(factors: LoraFactors) -> torch.Tensor:
    return factors.up.double() @ factors.down.double() * factors.alpha / factors.down.shape[0]


def test_formats_and_their_type_are_the_same() -> None:
    assert get_args(Format) == FORMATS == ("kohya", "comfy", "diffusers", "comfy-hybrid", "original")


@pytest.mark.parametrize(
    ("style", "first_keys"),
    [
        pytest.param(
            "kohya",
            [
                f"{kohya_stem(m)}.{part}"
                for m in SOME_MODULES
                for part in ("lora_down.weight", "lora_up.weight", "alpha")
            ],
            id="kohya",
        ),
        pytest.param(
            "comfy",
            [f"diffusion_model.{m}.{part}.weight" for m in SOME_MODULES for part in ("lora_A", "lora_B")],
            id="comfy",
        ),
        pytest.param(
            "diffusers",
            [f"{diffusers_stem(m)}.{part}.weight" for m in SOME_MODULES for part in ("lora_A", "lora_B")],
            id="diffusers",
        ),
    ],
)
def test_keys_of_each_style(factors: Factors, style: Format, first_keys: list[str]) -> None:
    tensors, _ = serialize(factors, style, torch.float32)
    assert tensors.keys() == set(first_keys)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_keys_are_the_documented_ones(factors: Factors) -> None:
    keys = {key for style in FORMATS for key in serialize(factors, style, torch.float32)[0]}
    assert keys >= {
        "lora_unet_blocks_0_self_attn_q_proj.lora_down.weight",
        "lora_unet_blocks_0_self_attn_q_proj.alpha",
        "lora_unet_llm_adapter_blocks_1_cross_attn_o_proj.lora_up.weight",
        "diffusion_model.blocks.0.self_attn.q_proj.lora_A.weight",
        "diffusion_model.llm_adapter.blocks.1.cross_attn.o_proj.lora_B.weight",
        "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight",
        "text_conditioner.blocks.1.cross_attn.o_proj.lora_B.weight",
    }


@pytest.mark.parametrize("style", FORMATS)
def test_what_is_written_is_read_back(factors: Factors, modules: ModuleTable, style: Format) -> None:
    tensors, metadata = serialize(factors, style, torch.float32)
    back = read(tensors, modules, metadata)
    assert list(back) == list(factors)
    for name, original in factors.items():
        assert back[name].down.shape == original.down.shape
        assert_close(delta(back[name]), delta(original))
        if style not in FOLDING:
            assert back[name].alpha == original.alpha
            assert torch.equal(back[name].up, original.up)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("style", FORMATS)
def test_a_narrow_dtype_rounds_the_factors_once_and_never_alpha(
    factors: Factors, modules: ModuleTable, style: Format, dtype: torch.dtype
) -> None:
    huge = {name: LoraFactors(f.down, f.up / 1e5, f.alpha * 1e5 + 1 / 3) for name, f in factors.items()}
    tensors, metadata = serialize(huge, style, dtype)
    assert {tensor.dtype for key, tensor in tensors.items() if not key.endswith(".alpha")} == {dtype}
    back = read(tensors, modules, metadata)
    for name, original in huge.items():
        assert torch.equal(back[name].down, original.down.to(dtype))
        if style not in FOLDING:
            assert back[name].alpha == pytest.approx(original.alpha, rel=1e-7)
            assert torch.equal(back[name].up, original.up.to(dtype))
        else:
            assert torch.equal(back[name].up, (original.up * (original.alpha / original.rank)).to(dtype))


@pytest.mark.parametrize("alphas", [True, False], ids=["alphas", "folded"])
@pytest.mark.parametrize("style", STYLES)
def test_every_style_in_circulation_is_understood(
    factors: Factors, modules: ModuleTable, style: str, alphas: bool
) -> None:
    back = read(as_file(factors, style, alphas=alphas), modules)
    assert list(back) == list(factors)
    for name, original in factors.items():
        assert back[name].alpha == (original.alpha if alphas else original.rank)
        assert_close(delta(back[name]), delta(original))


def test_styles_may_be_mixed_as_long_as_each_module_comes_once(factors: Factors, modules: ModuleTable) -> None:
    tensors: Tensors = {}
    for number, (name, f) in enumerate(factors.items()):
        tensors |= as_file({name: f}, list(STYLES)[number])
    assert len(STYLES) > len(factors) - 1
    assert list(read(tensors, modules)) == list(factors)


def test_alphas_come_in_every_form(factors: Factors, modules: ModuleTable) -> None:
    forms = [torch.tensor([2.5]), torch.tensor(2.5, dtype=torch.float16), torch.tensor(3), torch.tensor([[2.5]])]
    for alpha in forms:
        tensors = as_file(factors, "kohya")
        tensors[f"{kohya_stem(TO_Q)}.alpha"] = alpha
        assert read(tensors, modules)[modules.by_native[TO_Q]].alpha == float(alpha)


def test_linears_stored_as_convolutions(factors: Factors, modules: ModuleTable) -> None:
    tensors = {k: t[..., None, None] if t.ndim == 2 else t for k, t in as_file(factors, "kohya").items()}
    found = read(tensors, modules)
    assert found.keys() == factors.keys()
    for name, back in found.items():
        assert torch.equal(delta(back), delta(factors[name]))


def of_transformer(**options: Any) -> dict[str, str]:
    packed = {f"transformer.{name}": value for name, value in options.items()}
    return {LORA_ADAPTER_METADATA_KEY: json.dumps(packed)}


@pytest.mark.parametrize(
    ("options", "in_q", "in_mlp"),
    [
        pytest.param({}, 4.0, 4.0, id="says nothing of alpha"),
        pytest.param({"lora_alpha": 8}, 8.0, 8.0, id="one alpha"),
        pytest.param({"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 3}}, 3.0, 8.0, id="by the end of a name"),
        pytest.param({"lora_alpha": 8, "alpha_pattern": {"^transformer_blocks.1.ff.net.2": 3}}, 8.0, 3.0, id="by name"),
        pytest.param({"lora_alpha": 8, "alpha_pattern": {r".*blocks\.1\..*": 3}}, 8.0, 3.0, id="by pattern"),
        pytest.param({"lora_alpha": 8, "use_rslora": True}, 16.0, 16.0, id="rsLoRA"),
    ],
)
def test_alphas_of_diffusers_metadata(
    modules: ModuleTable, options: dict[str, Any], in_q: float, in_mlp: float
) -> None:
    tensors = as_file(random_factors(tiny_model(), (TO_Q, MLP, CONDITIONER_MLP), rank=4, alpha=4.0), "diffusers")
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    back = read(tensors, modules, of_transformer(**options))
    assert [f.alpha for f in back.values()] == [in_q, in_mlp, 4.0]


def test_an_alpha_key_counts_more_than_metadata(modules: ModuleTable) -> None:
    tensors = as_file(random_factors(tiny_model(), (TO_Q,), rank=4, alpha=2.0), "diffusers")
    assert read(tensors, modules, of_transformer(lora_alpha=8))[modules.by_native[TO_Q]].alpha == 2.0


@pytest.mark.parametrize(
    "metadata",
    [
        {LORA_ADAPTER_METADATA_KEY: "{"},
        {LORA_ADAPTER_METADATA_KEY: "[1, 2]"},
        {LORA_ADAPTER_METADATA_KEY: '"text"'},
        of_transformer(lora_alpha=None),
        of_transformer(lora_alpha="many"),
        of_transformer(lora_alpha=[8]),
        of_transformer(lora_alpha=float("nan")),
        of_transformer(lora_alpha=8, alpha_pattern=["to_q"]),
        of_transformer(lora_alpha=8, alpha_pattern={"(": 1}),
        of_transformer(lora_alpha=8, alpha_pattern={"to_q": "x"}),
    ],
    ids=str,
)
def test_metadata_that_is_no_adapter_config_is_refused(modules: ModuleTable, metadata: dict[str, str]) -> None:
    tensors = as_file(random_factors(tiny_model(), (TO_Q,)), "diffusers")
    del tensors[f"{diffusers_stem(TO_Q)}.alpha"]
    with pytest.raises(InputError, match=r"^a file: .*") as error:
        read(tensors, modules, metadata)
    assert "alpha" in str(error.value) or LORA_ADAPTER_METADATA_KEY in str(error.value)


Change = Callable[[Tensors], Any]
STEM = kohya_stem(TO_Q)
DOWN, UP, ALPHA = f"{STEM}.lora_down.weight", f"{STEM}.lora_up.weight", f"{STEM}.alpha"
FAULTS: dict[str, tuple[Change, list[str]]] = {
    "nothing": (lambda t: t.clear(), ["no key belongs to the Anima transformer"]),
    "an unknown module": (
        lambda t: t.update({"lora_unet_blocks_9_mlp_layer1.alpha": torch.tensor(1.0)}),
        ["names no known module or part: lora_unet_blocks_9_mlp_layer1.alpha"],
    ),
    "another model's adapter": (
        lambda t: (t.clear(), t.update({f"lora_unet_down_blocks_{i}_attn.lora_up.weight": UNET for i in range(20)})),
        ["lora_unet_down_blocks_0_attn.lora_up.weight", "… and 16 more keys"],
    ),
    "a name cut off": (
        lambda t: t.update({"lora_unet_blocks_0_self_attn_q.alpha": torch.tensor(1.0)}),
        ["lora_unet_blocks_0_self_attn_q.alpha"],
    ),
    "an unknown part": (lambda t: t.update({f"{STEM}.lora_mid.weight": UNET}), [f"{STEM}.lora_mid.weight"]),
    "PEFT's biases": (
        lambda t: t.update({f"{diffusers_stem(MLP)}.lora_B.bias": UNET}),
        [f"{diffusers_stem(MLP)}.lora_B.bias"],
    ),
    "no down": (lambda t: t.pop(DOWN), [f"{TO_Q}: the `down` factor is missing"]),
    "no up": (lambda t: t.pop(UP), [f"{TO_Q}: the `up` factor is missing"]),
    "alpha alone": (
        lambda t: (t.pop(UP), t.pop(DOWN)),
        [f"{TO_Q}: it has an `alpha` and no factors"],
    ),
    "twice in two styles": (
        lambda t: t.update(
            {f"transformer.transformer_blocks.0.attn1.to_q.{p}.weight": UNET for p in ("lora_A", "lora_B")}
        ),
        [f"a second `down` for {TO_Q}", f"a second `up` for {TO_Q}", "transformer.transformer_blocks.0.attn1.to_q"],
    ),
    "alpha twice": (
        lambda t: t.update({f"net.{TO_Q}.alpha": torch.tensor(1.0)}),
        [f"net.{TO_Q}.alpha: a second `alpha` for {TO_Q}"],
    ),
    "another layer's size": (
        lambda t: t.update({UP: torch.zeros(t[DOWN].shape[0] * 20, t[DOWN].shape[0])}),
        [f"{TO_Q}: factors for a 40x64 layer, but it is 64x64"],
    ),
    "ranks that differ": (
        lambda t: t.update({UP: torch.zeros(64, 7)}),
        [f"{TO_Q}: factors of shapes [2, 64] and [64, 7] do not multiply"],
    ),
    "rank 0": (lambda t: t.update({DOWN: torch.zeros(0, 64), UP: torch.zeros(64, 0)}), [f"{TO_Q}: factors of shapes"]),
    "a vector": (lambda t: t.update({DOWN: torch.zeros(64)}), [f"{TO_Q}: factors of shapes [64]"]),
    "a real convolution": (
        lambda t: t.update({DOWN: torch.zeros(2, 64, 3, 3), UP: torch.zeros(64, 2, 1, 1)}),
        [f"{TO_Q}: factors of shapes"],
    ),
    "integers": (
        lambda t: t.update({DOWN: t[DOWN].to(torch.int8)}),
        [f"{TO_Q}: `down` has dtype torch.int8", "floating point"],
    ),
    "NaN in a factor": (lambda t: t[DOWN].view(-1)[3:4].fill_(float("nan")), [f"{TO_Q}: `down` holds values"]),
    "infinity in a factor": (lambda t: t[UP].view(-1)[3:4].fill_(float("inf")), [f"{TO_Q}: `up` holds values"]),
    "NaN alpha": (lambda t: t.update({ALPHA: torch.tensor(float("nan"))}), [f"{TO_Q}: alpha is nan"]),
    "infinite alpha": (
        lambda t: t.update({ALPHA: torch.tensor(1e9).half()}),
        [f"{TO_Q}: alpha is inf, expected a finite number"],
    ),
    "many alphas": (lambda t: t.update({ALPHA: torch.ones(2)}), [f"{TO_Q}: alpha has shape [2]"]),
    "factors on a norm": (
        lambda t: t.update(
            {f"lora_unet_blocks_0_self_attn_q_norm.{p}.weight": torch.zeros(2, 32) for p in ("lora_down", "lora_up")}
        ),
        ["blocks.0.self_attn.q_norm: it is a norm, which can carry `w_norm` and `b_norm`"],
    ),
    "factors on an embedding": (
        lambda t: t.update(
            {
                "lora_unet_llm_adapter_embed.lora_down.weight": torch.zeros(2, 32),
                "lora_unet_llm_adapter_embed.lora_up.weight": torch.zeros(128, 2),
            }
        ),
        ["llm_adapter.embed is neither a linear layer nor a norm"],
    ),
    "more than ten faults": (
        lambda t: t.update(
            {f"net.blocks.{i}.mlp.layer1.alpha": torch.ones(2) for i in range(2)}
            | {f"net.{m}.alpha": torch.ones(1) for m in SOME_MODULES}
            | {key: torch.zeros(3) for key in list(t)}
        ),
        ["… and "],
    ),
}
UNET = torch.zeros(4, 4)


@pytest.mark.parametrize(("change", "words"), FAULTS.values(), ids=FAULTS)
def test_a_file_is_refused_by_what_is_not_understood(modules: ModuleTable, change: Change, words: list[str]) -> None:
    tensors = as_file(random_factors(tiny_model()), "kohya")
    change(tensors)
    with pytest.raises(InputError, match=r"^a file: not loaded, nothing was changed:") as error:
        read(tensors, modules)
    assert [word for word in words if word not in str(error.value)] == []


FOREIGN: dict[str, tuple[str, list[str]]] = {
    "OFT": ("OFT", [f"{STEM}.oft_blocks"]),
    "OFT of PEFT": ("OFT", [f"base_model.model.{TO_Q}.oft_R.weight"]),
    "BOFT": ("OFT", [f"{STEM}.boft_R"]),
    "GLoRA": ("GLoRA", [f"{STEM}.{part}.weight" for part in ("a1", "a2", "b1", "b2")]),
    "IA3": ("(IA)^3", [f"{STEM}.on_input"]),
    "VeRA": ("VeRA", [f"base_model.model.{TO_Q}.vera_lambda_b"]),
    "LoKr of convolutions": ("LoKr of convolutions", [f"{STEM}.lokr_t2"]),
    "LoHa of convolutions": ("LoHa of convolutions", [f"{STEM}.hada_t1", f"{STEM}.hada_t2"]),
    "LoRA of convolutions": ("LoRA of convolutions", [f"{STEM}.lora_mid.weight"]),
    "modules to save": ("PEFT's modules_to_save", ["base_model.model.proj_out.modules_to_save.weight"]),
    "textual inversion": ("textual inversion", ["emb_params"]),
    "the text encoder": ("the text encoder's part", ["lora_te_layers_0_self_attn_q_proj.lora_down.weight"]),
    "another text encoder": ("another model's text encoder", ["lora_te1_text_model_q_proj.lora_down.weight"]),
}


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside LoRA"])
@pytest.mark.parametrize(("kind", "keys"), FOREIGN.values(), ids=FOREIGN)
def test_other_kinds_of_adapters_are_refused_by_name(
    modules: ModuleTable, kind: str, keys: list[str], alone: bool
) -> None:
    tensors = {} if alone else as_file(random_factors(tiny_model()), "kohya")
    tensors |= {key: torch.zeros(4, 4) for key in keys} | {ALPHA: torch.tensor(1.0)}
    with pytest.raises(InputError) as error:
        read(tensors, modules)
    heading, *faults = str(error.value).splitlines()
    assert heading == "a file: not loaded, nothing was changed:"
    assert len(faults) == 1
    assert faults[0].startswith(f"  - {kind}")
    assert faults[0].endswith(f"cannot be loaded here: {', '.join(keys)}")


def test_an_unknown_key_below_model_diffusion_model_is_not_taken_for_a_difference(modules: ModuleTable) -> None:
    with pytest.raises(InputError, match=r"names no known module or part: model\.diffusion_model\.blocks\.9"):
        read({"model.diffusion_model.blocks.9.mlp.layer1.lora_A.weight": UNET}, modules)


def test_a_model_without_conditioner_refuses_its_adapter(modules: ModuleTable) -> None:
    alone = ModuleTable({"transformer": tiny_model().transformer})
    tensors = as_file(random_factors(tiny_model()), "kohya")
    with pytest.raises(InputError, match="names no known module or part: lora_unet_llm_adapter"):
        read(tensors, alone)
