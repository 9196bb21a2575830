"""Hundreds of damaged files: each loads as what it says, or is refused with a clear error and nothing is changed.

What a file says is read a second time, by `interpreting.interpret`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file

from anima_peft.adapters.exchange import read_adapter
from anima_peft.adapters.naming import ModuleTable
from anima_peft.adapters.sources import read_adapter_file
from anima_peft.errors import InputError
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import (
    CONDITIONER_MLP,
    CONDITIONER_O,
    MLP,
    MODULATION,
    OUT,
    QUERY_NORM,
    TO_Q,
    Snapshot,
    Tensors,
    dense,
    diffusers_stem,
    factors_of_kind,
    kohya_stem,
    output,
    tensors_by_key,
    tiny_model,
)
from tests.adapters.interpreting import Deltas, interpret

KIND_OF = {
    TO_Q: "LoRA",
    CONDITIONER_O: "LoRA",
    MLP: "LoKr low-rank",
    MODULATION: "LoKr full",
    OUT: "LoHa",
    CONDITIONER_MLP: "LoRA and biases",
    "llm_adapter.out_proj": "full difference and biases",
    QUERY_NORM: "norms",
}


@pytest.fixture(scope="module")
def healthy(model: AnimaTransformerModel) -> Tensors:
    """One file with every kind in it."""
    factors: dict[Any, Any] = {}
    for native, kind in KIND_OF.items():
        factors |= {name: f for name, f in factors_of_kind(model, kind).items() if name.native == native}
    assert len(factors) == len(KIND_OF)
    return tensors_by_key(factors)


CONFIG = "lora_adapter_metadata"
Check = Callable[[Path], Deltas | None]


@pytest.fixture
def whole_or_nothing(model: AnimaTransformerModel, modules: ModuleTable, untouched: Snapshot) -> Check:
    """Loads a file, holds the outcome against `interpret`, and leaves the model as it was."""

    def check(path: Path) -> Deltas | None:
        try:
            expected = interpret(load_file(path), modules)
        except SafetensorError:
            expected = None
        if expected is None:
            with pytest.raises(InputError) as error:
                model.load_lora_adapter(path, "mutant")
            assert str(path) in str(error.value)
            assert len(str(error.value)) < 5000
            assert Snapshot.of(model.components) == untouched
            return None
        model.load_lora_adapter(path, "mutant")
        found = {name.native: factors for name, factors in read_adapter(model.components, "mutant").items()}
        assert found.keys() == expected.keys()
        for native, (weight, bias) in expected.items():
            same = [(found[native].bias, bias)]
            if weight is not None:
                same.append((dense(found[native]), weight))
            for ours, theirs in same:
                assert (ours is None) == (theirs is None)
                if ours is not None and theirs is not None:
                    assert (ours.double() - theirs).norm() <= 1e-5 * theirs.norm()
        model.delete_adapters("mutant")
        assert Snapshot.of(model.components) == untouched
        return expected

    return check


def test_the_healthy_file_loads(
    healthy: Tensors, model: AnimaTransformerModel, modules: ModuleTable, whole_or_nothing: Check, tmp_path: Path
) -> None:
    save_file(healthy, tmp_path / "a.safetensors")
    expected = whole_or_nothing(tmp_path / "a.safetensors")
    assert expected is not None
    assert expected.keys() == KIND_OF.keys()
    explicit = tiny_model()
    with torch.no_grad():
        for name in (*modules.linears, *modules.norms):
            weight, bias = expected.get(name.native, (None, None))
            module = explicit.components[name.component].get_submodule(name.path)
            for parameter, delta in ((module.weight, weight), (module.bias, bias)) if weight is not None else ():
                if delta is not None:
                    parameter += delta.float()
    model.load_lora_adapter(tmp_path / "a.safetensors", "healthy")
    torch.testing.assert_close(output(model), output(explicit), atol=1e-4, rtol=1e-4)
    model.delete_adapters("healthy")


def truncated(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def lengthened(rng: random.Random, content: bytes) -> bytes:
    return content + rng.randbytes(rng.randrange(1, 99))


def header_byte_changed(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(8 + int.from_bytes(content[:8], "little"))
    return content[:at] + rng.randbytes(1) + content[at + 1 :]


def header_digit_changed(rng: random.Random, content: bytes) -> bytes:
    """Offsets, sizes, blocks' numbers, dtypes."""
    end = 8 + int.from_bytes(content[:8], "little")
    at = rng.choice([at for at in range(8, end) if content[at : at + 1].isdigit()])
    return content[:at] + rng.choice(b"0123456789").to_bytes(1, "little") + content[at + 1 :]


def data_bytes_changed(rng: random.Random, content: bytes) -> bytes:
    start = 8 + int.from_bytes(content[:8], "little")
    changed = bytearray(content)
    for _ in range(rng.choice((1, 20, 500))):
        changed[rng.randrange(start, len(changed))] = rng.randrange(256)
    return bytes(changed)


def bytes_moved(rng: random.Random, content: bytes) -> bytes:
    start, end = sorted(rng.randrange(len(content)) for _ in range(2))
    return content[:start] + content[end:] + content[start:end]


BYTES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    change.__name__: change
    for change in (truncated, lengthened, header_byte_changed, header_digit_changed, data_bytes_changed, bytes_moved)
}


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("change", BYTES)
def test_damaged_bytes(
    change: str,
    seed: int,
    healthy: Tensors,
    whole_or_nothing: Check,
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(BYTES[change](random.Random(f"{change} {seed}"), save(healthy, {"ss_note": "mine"})))
    outcome = whole_or_nothing(path)
    if change in ("truncated", "lengthened"):
        assert outcome is None


def misshapen(rng: random.Random, tensors: Tensors) -> None:
    key = rng.choice(list(tensors))
    tensor = tensors[key]
    shapes = [tensor.T if tensor.ndim == 2 else tensor[None], tensor.reshape(-1), tensor[..., None]]
    if tensor.ndim:
        shapes += [torch.cat([tensor, tensor]), tensor[: len(tensor) // 2], tensor[None], tensor[:0]]
    tensors[key] = rng.choice(shapes).clone()


def shapes_swapped(rng: random.Random, tensors: Tensors) -> None:
    one, other = rng.sample(list(tensors), 2)
    tensors[one], tensors[other] = tensors[other], tensors[one]


def huge_rank(rng: random.Random, tensors: Tensors) -> None:
    """One factor, both, or both but for one row, of rank 5000."""
    stem, generator = kohya_stem(TO_Q), torch.Generator().manual_seed(rng.randrange(99))
    case = rng.randrange(3)
    tensors[f"{stem}.lora_down.weight"] = torch.randn(5000, 64, generator=generator)
    if case:
        tensors[f"{stem}.lora_up.weight"] = torch.randn(64, 5000 - (case == 1), generator=generator)


def not_finite(rng: random.Random, tensors: Tensors) -> None:
    key = rng.choice(list(tensors))
    changed = tensors[key].clone()
    changed.view(-1)[rng.randrange(changed.numel())] = rng.choice([float("nan"), float("inf"), -float("inf"), 3e38])
    tensors[key] = changed


DTYPES = ("float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint16", "bool", "complex64")


def other_dtype(rng: random.Random, tensors: Tensors) -> None:
    key = rng.choice(list(tensors))
    tensors[key] = tensors[key].to(getattr(torch, rng.choice(DTYPES)))


def another_models_keys(rng: random.Random, tensors: Tensors) -> None:
    theirs = [
        "lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
        "lora_transformer_single_transformer_blocks_3_attn_to_q.lora_A.weight",
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
        "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight",
        "lora_unet_blocks_27_self_attn_q_proj.lora_down.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "lora_te_layers_0_self_attn_q_proj.lora_down.weight",
        "blocks.0.self_attn.q_proj.weight",
        f"{kohya_stem(TO_Q)}.oft_blocks",
    ]
    if rng.random() < 0.5:
        tensors.clear()
    tensors |= {key: torch.ones(4, 4) for key in rng.sample(theirs, rng.randrange(1, 5))}


def named_twice(rng: random.Random, tensors: Tensors) -> None:
    """A module in two styles: all of its parts, or some here and some there."""
    native = rng.choice([TO_Q, CONDITIONER_O, MLP, OUT, QUERY_NORM])
    stem = rng.choice(["diffusion_model.{}", "net.{}", "{}", "model.diffusion_model.{}", "lycoris"]).format(native)
    stem = "lycoris_" + native.replace(".", "_") if stem == "lycoris" else stem
    stem = rng.choice([stem, diffusers_stem(native) if native != QUERY_NORM else stem])
    own = [key for key in tensors if key.startswith(kohya_stem(native) + ".")]
    moved = rng.random() < 0.5 and len(own) > 1
    for key in rng.sample(own, rng.randrange(1, len(own) if moved else len(own) + 1)):
        tensors[key.replace(kohya_stem(native), stem)] = tensors.pop(key) if moved else tensors[key]


def keys_missing(rng: random.Random, tensors: Tensors) -> None:
    for key in rng.sample(list(tensors), rng.choice((1, 1, 2, len(tensors) - 1, len(tensors)))):
        del tensors[key]


def misspelt(rng: random.Random, tensors: Tensors) -> None:
    key = rng.choice(list(tensors))
    at = rng.randrange(len(key))
    tensors[key[:at] + rng.choice(["", "_", ".", key[at] * 2, "0", "1", "\n", "é"]) + key[at + 1 :]] = tensors.pop(key)


TENSORS: dict[str, Callable[[random.Random, Tensors], None]] = {
    change.__name__: change
    for change in (
        misshapen,
        shapes_swapped,
        huge_rank,
        not_finite,
        other_dtype,
        another_models_keys,
        named_twice,
        keys_missing,
        misspelt,
    )
}


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("change", TENSORS)
def test_damaged_tensors(
    change: str,
    seed: int,
    healthy: Tensors,
    whole_or_nothing: Check,
    tmp_path: Path,
) -> None:
    tensors = dict(healthy)
    TENSORS[change](random.Random(f"{change} {seed}"), tensors)
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    outcome = whole_or_nothing(tmp_path / "a.safetensors")
    if change in ("another_models_keys", "named_twice"):
        assert outcome is None


# What has no bearing on the adapter, however absurd, is only shown.
IDLE = {
    "numbers that are none": {"ss_network_dim": "1e999", "ss_network_alpha": "NaN", "modelspec.resolution": "-1x"},
    "a megabyte": {"ss_tag_frequency": "{" * 1_000_000},
    "control characters": {"\x1b[2J\x00": "\x1b]0;x\x07", "ss_a\n": "\u202e"},
    "another architecture": {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
    "no config": {CONFIG: ""},
    "an empty config": {CONFIG: "{}"},
    "a config of others": {CONFIG: json.dumps({"unet.r": "x", "text_encoder.lora_alpha": [], "": None})},
    "a hundred thousand options": {CONFIG: json.dumps({f"transformer.o{i}": i for i in range(100_000)})},
}


@pytest.mark.parametrize("text", IDLE)
def test_idle_metadata_is_no_hindrance(
    text: str,
    healthy: Tensors,
    whole_or_nothing: Check,
    tmp_path: Path,
) -> None:
    save_file(healthy, tmp_path / "a.safetensors", IDLE[text])
    assert whole_or_nothing(tmp_path / "a.safetensors") is not None


def test_reading_keeps_no_hold_on_the_file(healthy: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(healthy, path)
    read = read_adapter_file(path).tensors
    path.unlink()
    assert all(torch.equal(read[key], tensor) for key, tensor in healthy.items())
