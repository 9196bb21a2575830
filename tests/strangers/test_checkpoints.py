"""Checkpoints that lie: refused by name, before anything large is built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anima_peft.errors import InputError
from anima_peft.miniature import MiniatureFiles
from anima_peft.models.encoders import load_text_encoder, load_vae
from anima_peft.transformer import AnimaTransformerModel

from .hostile import container, opened, with_scalars

Change = Callable[[bytes], bytes]
PICKLED = "Pickled checkpoints (.pt, .pth, .bin, .ckpt) are not loaded; download the file again or convert it."
ANCHOR = "net.blocks.0.self_attn.q_proj.weight"
NO_HEADER = "not a readable safetensors file"


def stated(**entry: Any) -> Change:
    """One tensor's entry in the header changed."""

    def change(content: bytes) -> bytes:
        header, data = opened(content)
        header[ANCHOR] |= entry
        return container(header, data)

    return change


def unstated(key: str) -> Change:
    """One tensor's entry in the header without a key."""

    def change(content: bytes) -> bytes:
        header, data = opened(content)
        del header[ANCHOR][key]
        return container(header, data)

    return change


def raw(text: bytes) -> Change:
    return lambda content: container(text)


MANY = 1001
ENDLESS = "a\x1b[2J\n" * 10_000
# what becomes of the transformer's file, and words of the fault
CHECKPOINTS: dict[str, tuple[Change, str]] = {
    "empty": (lambda content: b"", NO_HEADER),
    "cut": (lambda content: content[:-1], NO_HEADER),
    "cut in its header": (lambda content: content[:100], NO_HEADER),
    "longer": (lambda content: content + b"\0", NO_HEADER),
    "a header beyond the file": (lambda content: (2**62).to_bytes(8, "little") + content[8:], NO_HEADER),
    "a pickle": (lambda content: b"\x80\x04\x95cos\nsystem\n.", PICKLED),
    "a zip, as torch saves": (lambda content: b"PK\x03\x04" + bytes(60), PICKLED),
    "a GGUF": (lambda content: b"GGUF\3\0\0\0" + bytes(60), NO_HEADER),
    "a page": (lambda content: b"<!DOCTYPE html><html>" + bytes(60), NO_HEADER),
    "no JSON": (raw(b"{" * 50), NO_HEADER),
    "deep": (raw(b'{"a":' * 100_000), NO_HEADER),
    "no UTF-8": (raw(b'{"\xff": {}}'), NO_HEADER),
    "a list": (raw(b"[]"), NO_HEADER),
    "no tensors": (lambda content: container({}, b""), "it looks like something else. Expected a checkpoint with"),
    "an unknown dtype": (stated(dtype="F99"), NO_HEADER),
    "no shape": (unstated("shape"), NO_HEADER),
    "integers": (stated(dtype="I32"), f"`{ANCHOR}` is torch.int32, expected floating point"),
    "a size that overflows": (stated(shape=[2**62, 2**62]), NO_HEADER),
    "a negative size": (stated(shape=[-64, -64]), NO_HEADER),
    "offsets beyond": (stated(data_offsets=[0, 10**15]), NO_HEADER),
    "offsets that overlap": (stated(data_offsets=[0, 64 * 64 * 4]), NO_HEADER),
    "offsets backwards": (stated(data_offsets=[64, 0]), NO_HEADER),
    "another shape": (stated(shape=[32, 128]), f"1 with a wrong shape: {ANCHOR} is [32, 128], expected [64, 64]"),
    "no blocks": (
        lambda content: with_scalars(container({}, b""), ["net.x_embedder.proj.1.weight"]),
        "no `llm_adapter.*` weights",
    ),
    "endless blocks": (
        lambda content: with_scalars(content, [f"net.blocks.{n}.x" for n in range(MANY)]),
        f"has {MANY} different numbers after `blocks.`, expected at most 1000",
    ),
    "endless conditioner": (
        lambda content: with_scalars(content, [f"net.llm_adapter.blocks.{n}.x" for n in range(MANY)]),
        f"has {MANY} different numbers after `blocks.`, expected at most 1000",
    ),
    "an endless key": (lambda content: with_scalars(content, [ENDLESS]), r"1 unexpected: a\x1b[2J\na\x1b[2J"),
    "an adapter": (
        lambda content: with_scalars(container({}, b""), ["lora_unet_blocks_0_self_attn_q_proj.lora_down.weight"]),
        "it looks like an adapter (LoRA or LoKr)",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints_that_are_refused(case: str, miniature: MiniatureFiles, tmp_path: Path) -> None:
    change, words = CHECKPOINTS[case]
    path = tmp_path / "模 型.safetensors"
    path.write_bytes(change(miniature.transformer.read_bytes()))
    with pytest.raises(InputError) as error:
        AnimaTransformerModel.from_single_file(path)
    assert str(error.value).startswith(f"{path}: ")
    assert words in str(error.value)
    assert len(str(error.value)) < 3000


# encoders' files with layers that are not there
LAYERS = {
    "text_encoder": (load_text_encoder, "model.layers.{}.x", "after `layers.`"),
    "vae": (load_vae, "decoder.up_blocks.0.resnets.{}.x", "after `decoder.up_blocks.0.resnets.`"),
}


@pytest.mark.parametrize("part", LAYERS)
def test_encoders_with_endless_layers(part: str, miniature: MiniatureFiles, tmp_path: Path) -> None:
    load, key, words = LAYERS[part]
    path = tmp_path / "a.safetensors"
    content = getattr(miniature, part).read_bytes()
    path.write_bytes(with_scalars(content, [key.format(n) for n in range(MANY)]))
    with pytest.raises(InputError, match=f"different numbers {words}, expected at most 1000"):
        load(path)
