"""`anima-peft convert`: a matrix of round trips, and what the command says."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import cast

import pytest
import torch
from diffusers.modular_pipelines.anima import AnimaAutoBlocks
from safetensors import safe_open
from safetensors.torch import load_file

from anima_peft.adapters.conversion import NEGLIGIBLE, convert
from anima_peft.adapters.factors import Factors, NormDelta
from anima_peft.adapters.naming import ModuleName
from anima_peft.adapters.writing import FOLDING, FORMATS, Format, serialize
from anima_peft.errors import InputError
from anima_peft.miniature import MiniatureFiles
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import (
    CONDITIONER_NORM,
    KINDS_OF_FACTORS,
    QUERY_NORM,
    Tensors,
    add_explicitly,
    as_file,
    assert_close,
    assert_same_weights,
    dense,
    factors_of_kind,
    kohya_stem,
    output,
    random_factors,
    table,
    tensors_by_key,
    tiny_model,
)
from tests.adapters.commanding import adapter_file, metadata_of, parsed, run, tensor_file

pytestmark = pytest.mark.usefixtures("unflushed")

RENAMES: tuple[Format, ...] = ("kohya", "comfy-hybrid", "original")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def of_dtype(factors: dict[ModuleName, Factors], dtype: torch.dtype) -> Tensors:
    """As a trainer saves it: factors narrow, alphas in float32."""
    tensors, _ = serialize(factors, "kohya", dtype)
    return tensors


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", KINDS_OF_FACTORS)
def test_round_trips(kind: str, dtype: torch.dtype, model: AnimaTransformerModel, tmp_path: Path) -> None:
    """From every style to every style: renames bit for bit, the others the same delta."""
    factors = factors_of_kind(model, kind)
    start = tensor_file(of_dtype(factors, dtype), tmp_path / "start.safetensors", {"ss_note": "mine"})
    before = parsed(start, model)
    files, modules = {}, table(model)
    for style in FORMATS:
        files[style] = tmp_path / f"{style}.safetensors"
        done = convert(start, files[style], style, dtype=torch.float32 if style in FOLDING else None, table=modules)
        assert done.modules == len(factors)
        assert done.change <= NEGLIGIBLE if style in FOLDING else done.change == 0
    for style, other in permutations(FORMATS, 2):
        wide = torch.float32 if {style, other} & {*FOLDING} else None  # a folded scale is not rounded again
        path = convert(
            files[style], tmp_path / f"{style} to {other}.safetensors", other, dtype=wide, table=modules
        ).path
        assert metadata_of(path)["ss_note"] == "mine"
        if wide is None:
            assert_same_weights(load_file(path), load_file(files[other]))
            assert {t.dtype for key, t in load_file(path).items() if not key.endswith(".alpha")} == {dtype}
        after = parsed(path, model)
        assert list(after) == list(before)
        for name, old in before.items():
            new = after[name]
            if not (isinstance(old, NormDelta) or getattr(old, "weight", 0) is None):
                difference = (dense(new) - dense(old)).norm() / dense(old).norm()
                assert difference <= NEGLIGIBLE
            if isinstance(old, NormDelta):
                assert isinstance(new, NormDelta)
                assert torch.equal(new.weight.float(), old.weight.float())
            for part in ("bias", "magnitude"):
                if getattr(old, part, None) is not None:
                    assert torch.equal(getattr(new, part).float(), getattr(old, part).float())


@pytest.mark.parametrize("other", RENAMES[1:])
@pytest.mark.parametrize("kind", KINDS_OF_FACTORS)
def test_a_rename_there_and_back_is_the_same_file(
    kind: str, other: Format, model: AnimaTransformerModel, tmp_path: Path
) -> None:
    """With other trainers' alphas: missing ones aside, their value and every bit of the factors stay."""
    tensors = tensors_by_key(factors_of_kind(model, kind, alpha=0.1 + 0.2))
    tensors = {key: t.half() if kind == "LoRA" and not key.endswith(".alpha") else t for key, t in tensors.items()}
    start = tensor_file(tensors, tmp_path / "start.safetensors")
    there = convert(start, tmp_path / "there.safetensors", other)
    back = convert(there.path, tmp_path / "back.safetensors", "kohya")
    assert (there.change, back.change) == (0, 0)
    assert_same_weights(load_file(back.path), tensors)


def test_the_output_is_the_same(tmp_path: Path) -> None:
    factors = random_factors(tiny_model(), mixed=True)
    start = tensor_file(as_file(factors, "kohya"), tmp_path / "start.safetensors")
    expected = tiny_model()
    expected.load_lora_adapter(start)
    for style in FORMATS:
        model = tiny_model()
        model.load_lora_adapter(convert(start, tmp_path / f"{style}.safetensors", style).path)
        assert_close(output(model), output(expected), 1e-6)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_stock_diffusers_loads_what_was_converted(kind: str, tmp_path: Path) -> None:
    model, factors = tiny_model(), factors_of_kind(tiny_model(), kind, alpha=0.7)
    start = adapter_file(factors, tmp_path / "start.safetensors")
    pipe = AnimaAutoBlocks().init_pipeline()
    pipe.update_components(transformer=model.transformer, text_conditioner=model.text_conditioner)
    pipe.load_lora_weights(str(convert(start, tmp_path / "new.safetensors", "diffusers").path))
    explicit = tiny_model()
    add_explicitly(explicit, factors)
    assert_close(output(model), output(explicit), 1e-5)


def test_infinite_alphas_beside_full_factors_become_finite_ones(model: AnimaTransformerModel, tmp_path: Path) -> None:
    tensors = tensors_by_key(factors_of_kind(model, "LoKr full"))
    alphas = {key: torch.tensor(float("inf")).half() for key in tensors if key.endswith(".alpha")}
    start = tensor_file(tensors | alphas, tmp_path / "start.safetensors")
    done = convert(start, tmp_path / "new.safetensors", "original")
    assert done.change == 0
    assert all(tensor.isfinite().all() for tensor in load_file(done.path).values())


def test_what_the_command_says(model: AnimaTransformerModel, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    factors = factors_of_kind(model, "LoRA", alpha=3.3)
    start = adapter_file(factors, tmp_path / "start.safetensors")
    half = tensor_file(of_dtype(factors, torch.bfloat16), tmp_path / "half.safetensors")

    def said(source: Path, *options: str) -> str:
        assert run("convert", source, tmp_path / "new.safetensors", "--overwrite", "--format", *options) == 0
        first, last = capsys.readouterr().out.splitlines()
        assert first == f"{tmp_path / 'new.safetensors'}: 6 modules"
        return last

    assert said(start, "comfy-hybrid") == "The deltas are the same to the last bit."
    assert said(start, "comfy").endswith("of their size, which is float32's rounding.")
    assert "the factors were rounded; --dtype fp32 keeps them." in said(start, "kohya", "--dtype", "bf16")
    assert "the factors were rounded; --dtype fp32 keeps them." in said(start, "comfy", "--dtype", "fp16")
    assert "the scale was folded into rounded factors; --dtype fp32 keeps them." in said(half, "diffusers")
    assert said(half, "diffusers", "--dtype", "fp32").endswith("which is float32's rounding.")


def test_what_a_narrow_dtype_costs_is_measured(model: AnimaTransformerModel, tmp_path: Path) -> None:
    factors = factors_of_kind(model, "LoRA")
    start = adapter_file(factors, tmp_path / "start.safetensors")
    done = convert(start, tmp_path / "new.safetensors", "kohya", dtype=torch.bfloat16)
    after = parsed(done.path, model)
    changes = {name: float((dense(after[name]) - dense(f)).norm() / dense(f).norm()) for name, f in factors.items()}
    assert done.changed == max(changes, key=lambda name: changes[name])
    assert done.change == pytest.approx(max(changes.values()), rel=1e-6)
    assert done.change > 1e-4


def test_numbers_that_a_dtype_cannot_hold_are_refused_before_anything_is_written(
    model: AnimaTransformerModel, tmp_path: Path
) -> None:
    tensors = {key: tensor * 1e5 for key, tensor in tensors_by_key(factors_of_kind(model, "LoRA")).items()}
    start = tensor_file(tensors, tmp_path / "start.safetensors")
    with pytest.raises(InputError, match=r"new\.safetensors with these numbers: .*\n.*values that are not finite"):
        convert(start, tmp_path / "new.safetensors", "kohya", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == [start]


def test_nothing_is_overwritten_unasked(
    model: AnimaTransformerModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    start = adapter_file(factors_of_kind(model, "LoRA"), tmp_path / "start.safetensors")
    new = tmp_path / "new.safetensors"
    new.write_bytes(b"mine")
    assert run("convert", start, new, "--format", "comfy") == 2
    assert "exists already" in capsys.readouterr().err
    assert new.read_bytes() == b"mine"
    tensor_file({"unknown.lora_up.weight": torch.ones(2, 2)}, tmp_path / "bad.safetensors")
    assert run("convert", tmp_path / "bad.safetensors", new, "--format", "comfy", "--overwrite") == 2
    assert new.read_bytes() == b"mine"
    before = start.read_bytes()
    assert run("convert", start, start, "--format", "comfy", "--overwrite") == 2
    assert "is an input" in capsys.readouterr().err
    assert start.read_bytes() == before


@pytest.mark.parametrize(
    ("output_name", "style", "words"),
    [
        ("new.pt", "kohya", "expected a name that ends in .safetensors"),
        ("new.safetensors", "peft", "expected one of kohya, comfy"),
    ],
)
def test_wrong_arguments_of_convert(output_name: str, style: str, words: str, tmp_path: Path) -> None:
    start = adapter_file(factors_of_kind(tiny_model(), "norms"), tmp_path / "start.safetensors")
    with pytest.raises(InputError, match=words):
        convert(start, tmp_path / output_name, cast(Format, style))


def test_metadata_goes_along_as_far_as_it_is_true(model: AnimaTransformerModel, tmp_path: Path) -> None:
    factors = factors_of_kind(model, "LoRA")
    given = {"ss_steps": "7", "modelspec.title": "画", "sshs_model_hash": "0", "modelspec.hash_sha256": "0x0"}
    start = adapter_file(factors, tmp_path / "start.safetensors", given)
    kohya, stock = (convert(start, tmp_path / f"{f}.safetensors", f).path for f in ("kohya", "diffusers"))
    for path in (kohya, stock):
        metadata = metadata_of(path)
        assert (metadata["ss_steps"], metadata["modelspec.title"]) == ("7", "画")
        assert len(metadata["sshs_model_hash"]) == 64
        assert metadata["modelspec.hash_sha256"] == "0x" + metadata["sshs_model_hash"]
        assert metadata["modelspec.architecture"] == "anima/lora"
        assert metadata["ss_network_module"] == "networks.lora_anima"
        assert ("lora_adapter_metadata" in metadata) == (path == stock)
    back = convert(stock, tmp_path / "back.safetensors", "kohya").path
    assert "lora_adapter_metadata" not in metadata_of(back), "its alphas stand in the tensors now"
    assert_close(dense(parsed(back, model)[next(iter(factors))]), dense(next(iter(factors.values()))))


def test_absolute_norms_are_converted_with_the_base_at_hand(
    model: AnimaTransformerModel, tmp_path: Path, miniature: MiniatureFiles, capsys: pytest.CaptureFixture
) -> None:
    value = torch.linspace(0.5, 1.5, 32)
    start = tensor_file({f"__anima_norm__.{QUERY_NORM}.weight": value}, tmp_path / "start.safetensors")
    with pytest.raises(InputError, match="can be understood only with the base model"):
        convert(start, tmp_path / "new.safetensors", "kohya")
    done = convert(start, tmp_path / "new.safetensors", "kohya", table=table(model))
    base = model.transformer.transformer_blocks[0].attn1.norm_q.weight
    assert_same_weights(load_file(done.path), {f"{kohya_stem(QUERY_NORM)}.w_norm": value - base})

    with safe_open(miniature.transformer, framework="pt") as file:
        key = next(key for key in file.keys() if key.endswith(QUERY_NORM + ".weight"))  # noqa: SIM118
        own = file.get_tensor(key).float()
    start = tensor_file({f"__anima_norm__.{QUERY_NORM}.weight": own + 0.25}, tmp_path / "own.safetensors")
    new = tmp_path / "from the command.safetensors"
    assert run("convert", start, new, "--format", "comfy", "--model", miniature.transformer) == 0
    ((_, delta),) = load_file(new).items()
    torch.testing.assert_close(delta, torch.full_like(delta, 0.25))
    assert run("inspect", start) == 2
    assert "only with the base model" in capsys.readouterr().out
    assert run("inspect", start, "--model", miniature.transformer) == 0


def test_the_text_encoders_part_is_converted(tmp_path: Path) -> None:
    tensors = {
        "lora_te_layers_3_self_attn_q_proj.lora_down.weight": torch.randn(2, 8),
        "lora_te_layers_3_self_attn_q_proj.lora_up.weight": torch.randn(8, 2),
        "lora_te_layers_3_self_attn_q_proj.alpha": torch.tensor(2.0),
    }
    start = tensor_file(tensors, tmp_path / "start.safetensors")
    names = {
        style: {
            key.rsplit(".lora_", 1)[0]
            for key in load_file(convert(start, tmp_path / f"{style}.safetensors", style).path)
        }
        for style in ("comfy", "diffusers")
    }
    assert names == {
        "comfy": {"lora_te_layers_3_self_attn_q_proj"},
        "diffusers": {"text_encoder.layers.3.self_attn.q_proj"},
    }
    back = convert(tmp_path / "diffusers.safetensors", tmp_path / "back.safetensors", "kohya")
    assert_same_weights(load_file(back.path), tensors)


def test_the_norm_keeps_its_name_in_every_style(model: AnimaTransformerModel) -> None:
    factors = factors_of_kind(model, "norms")
    keys = {style: set(serialize(factors, style, None)[0]) for style in FORMATS}
    assert keys["comfy"] == {f"diffusion_model.{native}.w_norm" for native in (QUERY_NORM, CONDITIONER_NORM)}
    assert keys["original"] == {f"{native}.w_norm" for native in (QUERY_NORM, CONDITIONER_NORM)}
