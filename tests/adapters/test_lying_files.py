"""Headers that lie, absurd configs, endless keys: refused with a clear error, in bounded time and memory."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from anima_peft.errors import InputError
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import (
    MLP,
    TO_Q,
    Snapshot,
    as_file,
    kohya_stem,
    random_factors,
    table,
)


def container(header: object, data: bytes = b"\0" * 64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: tuple[int, ...] = (4, 4), offsets: tuple[int, int] = (0, 64)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


KEY = f"{kohya_stem(TO_Q)}.diff"
LIES: dict[str, bytes] = {
    "empty": b"",
    "no header": b"\0" * 8,
    "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header of 90 MB": struct.pack("<Q", 90_000_000) + b"{}",
    "a header longer than the file": struct.pack("<Q", 500) + b"{}",
    "no JSON": container(b"{" * 100),
    "deep JSON": container(b'{"a":' * 100_000),
    "a deep list": container(b"[" * 100_000 + b"]" * 100_000),
    "a list": container([]),
    "null": container(b"null"),
    "no UTF-8": container(b'{"\xff": 1}'),
    "half a surrogate": container(b'{"\\ud800": ' + json.dumps(entry()).encode() + b"}"),
    "an entry without a dtype": container({KEY: {"shape": [4, 4], "data_offsets": [0, 64]}}),
    "an unknown dtype": container({KEY: entry("F99")}),
    "a dtype that torch lacks": container({KEY: entry("F6_E2M3", (32,), (0, 24))}, b"\0" * 24),
    "packed numbers": container({KEY: entry("F4", (8, 16))}),
    "packed alpha": container({f"{kohya_stem(TO_Q)}.alpha": entry("F4", (2,), (0, 1))}, b"\0"),
    "a size that overflows": container({KEY: entry(shape=(2**62, 2**62))}),
    "a negative size": container({KEY: entry(shape=(-4, -4))}),
    "a size beyond the data": container({KEY: entry(shape=(2**20, 2**20))}),
    "offsets beyond the file": container({KEY: entry(offsets=(0, 10**15))}),
    "offsets backwards": container({KEY: entry(offsets=(64, 0))}),
    "offsets that overlap": container({KEY: entry(), "b": entry(offsets=(32, 96))}, b"\0" * 96),
    "a hole between tensors": container({KEY: entry(), "b": entry(offsets=(80, 144))}, b"\0" * 144),
    "half of the sizes": container({KEY: entry(shape=(4, 2))}),
    "fractions": container({KEY: {"dtype": "F32", "shape": [4.5, 4], "data_offsets": [0, 64]}}),
    "no tensors": container({"__metadata__": {"a": "b"}}, b""),
    "metadata of numbers": container({"__metadata__": {"a": 1}, KEY: entry()}),
    "an empty layer": container({KEY: entry(shape=(0, 10**9), offsets=(0, 0))}, b""),
    "two hundred axes": container({KEY: entry(shape=(1,) * 200, offsets=(0, 4))}, b"\0" * 4),
    "an alpha of two hundred axes": container(
        {
            f"{kohya_stem(TO_Q)}.lora_down.weight": entry(shape=(1, 64), offsets=(0, 256)),
            f"{kohya_stem(TO_Q)}.lora_up.weight": entry(shape=(64, 1), offsets=(256, 512)),
            f"{kohya_stem(TO_Q)}.alpha": entry(shape=(1,) * 200, offsets=(512, 516)),
        },
        b"\0" * 516,
    ),
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n.",
    "a zip": b"PK\x03\x04" + b"\0" * 60,
    "HTML": b"<!DOCTYPE html><html><body>404</body></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(lie: str, model: AnimaTransformerModel, untouched: Snapshot, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(LIES[lie])
    with pytest.raises(InputError, match=re.escape(str(path))):
        model.load_lora_adapter(path)
    assert Snapshot.of(model.components) == untouched


CONFIG = "lora_adapter_metadata"
NINES = "9" * 5000


def config(**options: Any) -> str:
    return json.dumps({f"transformer.{name}": value for name, value in options.items()})


ABSURD = {
    "no JSON": "{",
    "a list": "[]",
    "a number": "7",
    "deep JSON": '{"transformer.lora_alpha":' + "[" * 100_000,
    "an alpha of 5000 digits": f'{{"transformer.lora_alpha": {NINES}}}',
    "an alpha of 400 digits": f'{{"transformer.lora_alpha": {NINES[:400]}}}',
    "an infinite alpha": '{"transformer.lora_alpha": 1e999}',
    "a huge alpha": config(lora_alpha=1e300),
    "NaN": '{"transformer.lora_alpha": NaN}',
    "an alpha in words": config(lora_alpha="16"),
    "an alpha of truth": config(lora_alpha=True),
    "a table of alphas": config(lora_alpha={"a": 1}),
    "patterns in a list": config(lora_alpha=1, alpha_pattern=["a"]),
    "a pattern in words": config(lora_alpha=1, alpha_pattern="a"),
    "a pattern that never ends": config(lora_alpha=1, alpha_pattern={"(.*)*x": 2}),
    "another": config(lora_alpha=1, alpha_pattern={"([a-z.]+)+$": 2}),
    "many repetitions": config(lora_alpha=1, alpha_pattern={".*" * 30 + "x": 2}),
    "many patterns": config(lora_alpha=1, alpha_pattern={f"m{i}": 2 for i in range(100_000)}),
    "a huge pattern": config(lora_alpha=1, alpha_pattern={"a|" * 1_000_000: 2}),
    "a pattern's absurd value": config(lora_alpha=1, alpha_pattern={"to_q": [1e9]}),
    "a rank that is none": config(lora_alpha=1, rank_pattern=7),
    "DoRA without magnitudes": config(lora_alpha=1, use_dora=True),
}


@pytest.mark.parametrize("text", ABSURD)
def test_an_absurd_config_is_refused(
    text: str, model: AnimaTransformerModel, untouched: Snapshot, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    tensors = as_file(random_factors(model, (TO_Q, MLP)), "diffusers", alphas=False)
    save_file(tensors, path, {CONFIG: ABSURD[text]})
    with pytest.raises(InputError, match=re.escape(str(path))) as error:
        model.load_lora_adapter(path)
    assert len(str(error.value)) < 2000
    assert Snapshot.of(model.components) == untouched


@pytest.mark.parametrize("options", [{"lora_alpha": 0}, {"lora_alpha": -3}, {"lora_alpha": 1e-300}, {"r": 10**400}])
def test_odd_configs_mean_what_they_say(options: Any, model: AnimaTransformerModel, untouched: Snapshot) -> None:
    from anima_peft.adapters.reading import AdapterFile, parse

    factors = random_factors(model, (TO_Q,))
    tensors = as_file(factors, "diffusers", alphas=False)
    ((_, found),) = parse(AdapterFile("a file", tensors, {CONFIG: config(**options)}), table(model)).items()
    assert found.scale == options.get("lora_alpha", 2) / 2


@pytest.mark.slow
def test_a_hundred_thousand_keys(model: AnimaTransformerModel, untouched: Snapshot, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    entries = {f"lora_unet_blocks_{i}_mlp_layer1.alpha": entry("F16", (), (2 * i, 2 * i + 2)) for i in range(100_000)}
    path.write_bytes(container(entries, bytes(200_000)))
    with pytest.raises(InputError, match="and 99994 more keys"):
        model.load_lora_adapter(path)
    assert Snapshot.of(model.components) == untouched


@pytest.mark.parametrize("piece", [".lora_B.", "blocks.1", "__anima_norm__.", ".modules_to_save", "lora_te_", "a1."])
def test_endless_keys(piece: str, model: AnimaTransformerModel, untouched: Snapshot) -> None:
    """Patterns meet a key of a megabyte that nearly matches them over and over."""
    with pytest.raises(InputError) as error:
        model.load_lora_adapter({piece * (1_000_000 // len(piece)): torch.zeros(2)})
    assert len(str(error.value)) < 1000
    assert Snapshot.of(model.components) == untouched
