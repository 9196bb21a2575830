"""Single files that hold no Anima, or not all of it: refused by key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from anima_peft.errors import InputError
from anima_peft.miniature import MiniatureFiles
from anima_peft.models.dit import load_dit
from tests.components import tiny_transformer

from .conftest import Save, Tensors
from .dit_files import prefixed

Change = Callable[[Tensors], Any]
FAULTS: dict[str, tuple[Change, list[str]]] = {
    "a weight is missing": (lambda t: t.pop("net.blocks.1.mlp.layer2.weight"), ["1 missing", "blocks.1.mlp.layer2"]),
    "weights from which sizes are read are missing": (
        lambda t: t.pop("net.blocks.0.self_attn.q_norm.weight"),
        ["missing key", "blocks.0.self_attn.q_norm.weight"],
    ),
    "a block is missing": (
        lambda t: [t.pop(key) for key in list(t) if key.startswith("net.blocks.0.")],
        ["missing key", "blocks.0."],
    ),
    "a block is missing in the middle": (
        lambda t: [t.update({key.replace(".1.", ".2.", 1): t.pop(key)}) for key in list(t) if "net.blocks.1." in key],
        ["20 missing", "net.blocks.1.", "20 unexpected", "net.blocks.2."],
    ),
    "a conditioner's weight is missing": (
        lambda t: t.pop("net.llm_adapter.out_proj.bias"),
        ["1 missing", "net.llm_adapter.out_proj.bias"],
    ),
    "no conditioner": (
        lambda t: [t.pop(key) for key in list(t) if "llm_adapter" in key],
        ["llm_adapter", "text conditioner"],
    ),
    "something beside the model": (
        lambda t: t.update({"vae.decoder.weight": torch.zeros(2)}),
        ["1 unexpected", "vae.decoder.weight"],
    ),
    "an unknown weight inside": (
        lambda t: t.update({"net.blocks.0.mlp.layer3.weight": torch.zeros(2)}),
        ["1 unexpected", "net.blocks.0.mlp.layer3.weight"],
    ),
    "an unknown weight in the conditioner": (
        lambda t: t.update({"net.llm_adapter.blocks.0.mlp.1.weight": torch.zeros(2)}),
        ["1 unexpected", "net.llm_adapter.blocks.0.mlp.1.weight"],
    ),
    "a bias": (
        lambda t: t.update({"net.blocks.0.self_attn.q_proj.bias": torch.zeros(64)}),
        ["1 unexpected", "net.blocks.0.self_attn.q_proj.bias"],
    ),
    "quantised weights": (
        lambda t: t.update({"net.blocks.0.self_attn.q_proj.weight_scale": torch.zeros(1)}),
        ["1 unexpected", "weight_scale"],
    ),
    "integers": (
        lambda t: t.update({"net.blocks.1.mlp.layer1.weight": torch.zeros(256, 64, dtype=torch.int8)}),
        ["net.blocks.1.mlp.layer1.weight", "int8", "floating point"],
    ),
    "a misshapen weight": (
        lambda t: t.update({"net.blocks.1.self_attn.k_proj.weight": torch.zeros(7, 5)}),
        ["1 with a wrong shape", "net.blocks.1.self_attn.k_proj.weight is [7, 5], expected [64, 64]"],
    ),
    "a misshapen weight of the conditioner": (
        lambda t: t.update({"net.llm_adapter.norm.weight": torch.zeros(31)}),
        ["1 with a wrong shape", "net.llm_adapter.norm.weight is [31], expected [32]"],
    ),
    "all three at once": (
        lambda t: t.update(
            {"net.foo": t.pop("net.final_layer.adaln_modulation.1.weight")}
            | {"net.t_embedding_norm.weight": torch.zeros(1)}
        ),
        ["1 missing", "final_layer.adaln_modulation.1", "1 unexpected", "net.foo", "wrong shape", "t_embedding_norm"],
    ),
    "a scalar": (
        lambda t: t.update({"net.x_embedder.proj.1.weight": torch.zeros(())}),
        ["x_embedder.proj.1.weight", "2 dimensions"],
    ),
    "an empty tensor": (
        lambda t: t.update({"net.blocks.0.adaln_modulation_self_attn.1.weight": torch.zeros(0, 64)}),
        ["blocks.0.adaln_modulation_self_attn.1.weight", "above zero"],
    ),
    "heads that do not divide the width": (
        lambda t: t.update({"net.blocks.0.self_attn.q_norm.weight": torch.zeros(48)}),
        ["hidden size 64", "head size 48"],
    ),
    "heads too small to turn": (
        lambda t: t.update({"net.blocks.0.self_attn.q_norm.weight": torch.zeros(8)}),
        ["hidden size 64", "head size 8"],
    ),
    "heads of the conditioner wider than itself": (
        lambda t: t.update({"net.llm_adapter.blocks.0.cross_attn.q_norm.weight": torch.zeros(48)}),
        ["conditioner", "32", "48"],
    ),
}


@pytest.mark.parametrize(("change", "words"), FAULTS.values(), ids=FAULTS)
def test_a_file_that_does_not_fit_is_refused_by_key(
    native: Tensors, save: Save, change: Change, words: list[str]
) -> None:
    tensors = prefixed(native, "net.")
    change(tensors)
    path = save(tensors)
    with pytest.raises(InputError) as error:
        load_dit(path)
    assert [word for word in [str(path), *words] if word not in str(error.value)] == []


def test_many_faulty_keys_are_counted_and_not_all_shown(native: Tensors, save: Save) -> None:
    path = save(prefixed(native, "net.") | {f"net.extra.{i:02d}": torch.zeros(1) for i in range(20)})
    with pytest.raises(InputError, match=r"20 unexpected: net\.extra\.00, .* … and 12 more$"):
        load_dit(path)


def adapter_file(_: MiniatureFiles, folder: Path) -> Path:
    save_file({"lora_unet_blocks_0_mlp_layer1.lora_down.weight": torch.zeros(4, 64)}, folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


def diffusers_file(_: MiniatureFiles, folder: Path) -> Path:
    tiny_transformer().save_pretrained(folder)
    return folder / "diffusion_pytorch_model.safetensors"


def empty_file(_: MiniatureFiles, folder: Path) -> Path:
    save_file({}, folder / "empty.safetensors")
    return folder / "empty.safetensors"


@pytest.mark.parametrize(
    ("choose", "word"),
    [
        pytest.param(lambda files, _: files.vae, "a VAE", id="VAE"),
        pytest.param(lambda files, _: files.text_encoder, "a language model", id="Qwen"),
        pytest.param(adapter_file, "an adapter", id="adapter"),
        pytest.param(diffusers_file, "diffusers folder", id="diffusers"),
        pytest.param(empty_file, "something else", id="empty"),
    ],
)
def test_another_model_is_refused_by_what_it_is(
    miniature: MiniatureFiles, tmp_path: Path, choose: Any, word: str
) -> None:
    with pytest.raises(InputError, match="not an Anima transformer") as error:
        load_dit(choose(miniature, tmp_path))
    assert word in str(error.value)


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_dit(tmp_path / name)
