"""`anima-peft inspect`: what it says of every kind of file, of hostile ones, and of those that would not load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from anima_peft.adapters.inspection import as_json, as_text, inspect_adapter
from anima_peft.adapters.reading import AdapterFile, parse
from anima_peft.adapters.writing import FORMATS, Format, serialize
from anima_peft.errors import InputError
from anima_peft.miniature import MiniatureFiles
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import (
    KINDS_OF_FACTORS,
    TO_Q,
    Tensors,
    dense,
    factors_of_kind,
    kohya_stem,
    table,
    tensors_by_key,
)
from tests.adapters.commanding import run, tensor_file


@pytest.mark.parametrize("style", FORMATS)
def test_inspect_names_the_style(style: Format, model: AnimaTransformerModel, tmp_path: Path) -> None:
    tensors, metadata = serialize(factors_of_kind(model, "LoRA"), style, None)
    found = inspect_adapter(tensor_file(tensors, tmp_path / "a.safetensors", metadata))
    assert found.styles == {style: len(tensors)}
    assert found.refusal is None
    assert found.components == {"transformer": 4, "text_conditioner": 2}
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())


KIND_WORDS = {
    "LoRA": {"LoRA of rank 2 and scale 1.5": 6},
    "DoRA": {"DoRA of rank 2 and scale 1.5": 6},
    "LoKr low-rank": {"LoKr of rank 2 and scale 1.5": 6},
    "LoKr full": {"LoKr of full matrices": 6},
    "LoKr decompose both": {"LoKr of rank 2 and scale 1.5": 6},
    "LoHa": {"LoHa of rank 2 and scale 1.5": 6},
    "full difference": {"full difference": 6},
    "LoRA and biases": {"LoRA of rank 2 and scale 1.5 and bias": 2},
    "full difference and biases": {"full difference and bias": 2},
    "biases": {"bias": 2},
    "norms": {"norms": 2},
}


@pytest.mark.parametrize("sized", [True, False], ids=["with the model", "alone"])
@pytest.mark.parametrize("kind", KINDS_OF_FACTORS)
def test_inspect_says_what_there_is_and_how_strong(
    kind: str, sized: bool, model: AnimaTransformerModel, tmp_path: Path
) -> None:
    factors = factors_of_kind(model, kind)
    path = tensor_file(tensors_by_key(factors), tmp_path / "a.safetensors", {"ss_note": "mine"})
    found = inspect_adapter(path, table(model) if sized else None)
    assert found.kinds == KIND_WORDS[kind]
    squares: dict[str, float] = {}
    for name, f in factors.items():
        parts = name.path.split(".")
        place = f"{name.component}.{'.'.join(parts[:2]) if 'blocks' in parts[0] else '*'}"
        squares[place] = squares.get(place, 0.0) + float(dense(f).square().sum())
    assert found.blocks == pytest.approx({place: square**0.5 for place, square in squares.items()}, rel=1e-6)
    text = "\n".join(as_text(found))
    assert f"{next(iter(KIND_WORDS[kind].values()))} x {next(iter(KIND_WORDS[kind]))}" in text
    assert "loads: yes, on" in text
    assert "ss_note: mine" in text
    assert json.loads(as_json(found))["kinds"] == KIND_WORDS[kind]
    assert ("LoKr factors: " in text) == kind.startswith("LoKr")


def test_inspect_shows_lokrs_factors(model: AnimaTransformerModel, tmp_path: Path) -> None:
    path = tensor_file(tensors_by_key(factors_of_kind(model, "LoKr decompose both")), tmp_path / "a.safetensors")
    shapes = inspect_adapter(path).shapes
    assert shapes["w1 2x4, w2 32x16 (w1 of rank 1, w2 of rank 2)"] >= 1
    assert sum(shapes.values()) == 6


HOSTILE = {
    "ansi": "\x1b[2J\x1b]0;owned\x07red",
    "lines\nand\rreturns": "loads: no\n  loads: no\r",
    "bidi": "\u202egnp.exe\u2066",
    "long": "x" * 1_000_000,
    "surrogate-free": "画 ü 😀",
}


def test_hostile_metadata_and_keys_are_shown_harmless(
    model: AnimaTransformerModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tensors = tensors_by_key(factors_of_kind(model, "norms"))
    path = tensor_file(tensors, tmp_path / "a.safetensors", HOSTILE)
    assert run("inspect", path) == 0
    text = capsys.readouterr().out
    assert all(char.isprintable() for line in text.split("\n") for char in line)
    assert len(text) < 20_000
    assert "1000000 characters" in text
    assert "\\x1b[2J" in text
    assert "画 ü 😀" in text
    assert sum(line.strip().startswith("loads:") for line in text.split("\n")) == 1
    assert run("inspect", path, "--json") == 0
    shown = json.loads(capsys.readouterr().out)["metadata"]
    assert shown["ansi"] == "\\x1b[2J\\x1b]0;owned\\x07red"
    assert all(char.isprintable() for item in shown.items() for part in item for char in part)

    path = tensor_file(tensors | {"\x1b[31m" + "k" * 100_000 + "\n.diff": torch.ones(2)}, path)
    assert run("inspect", path) == 2
    captured = capsys.readouterr()
    assert all(char.isprintable() for line in (captured.out + captured.err).split("\n") for char in line)
    assert len(captured.out) < 2000


def test_inspect_says_why_a_file_would_not_load(
    model: AnimaTransformerModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    good = tensor_file(tensors_by_key(factors_of_kind(model, "LoRA")), tmp_path / "good.safetensors")
    bad = tensor_file(load_file(good) | {f"{kohya_stem(TO_Q)}.oft_blocks": torch.ones(2)}, tmp_path / "bad.safetensors")
    assert run("inspect", good, bad) == 2
    captured = capsys.readouterr()
    assert "loads: yes" in captured.out
    assert "loads: no" in captured.out
    assert "OFT cannot be loaded here" in captured.out
    assert f"would not load: {bad} (the reasons stand above)." in captured.err
    assert str(good) not in captured.err
    (tmp_path / "text.safetensors").write_text("text")
    assert run("inspect", tmp_path / "text.safetensors") == 2
    assert "not a readable safetensors file" in capsys.readouterr().err


def test_inspect_with_the_model_checks_the_sizes(
    model: AnimaTransformerModel, tmp_path: Path, miniature: MiniatureFiles, capsys: pytest.CaptureFixture
) -> None:
    path = tensor_file({f"{kohya_stem(TO_Q)}.diff": torch.ones(3, 5)}, tmp_path / "a.safetensors")
    assert run("inspect", path) == 0
    assert run("inspect", path, "--model", miniature.transformer) == 2
    assert "a full difference of [3, 5], expected" in capsys.readouterr().out


def test_numbers_beyond_measure_are_still_shown(model: AnimaTransformerModel, tmp_path: Path) -> None:
    tensors = {
        key: torch.full_like(tensor, 3e38) for key, tensor in tensors_by_key(factors_of_kind(model, "LoHa")).items()
    }
    found = inspect_adapter(tensor_file(tensors, tmp_path / "a.safetensors"))
    assert "inf" in "\n".join(as_text(found))
    assert None in json.loads(as_json(found), parse_constant=lambda _: pytest.fail("no JSON"))["blocks"].values()


def huge(kind: str) -> Tensors:
    """A few kilobytes that declare a layer of 10^14 numbers."""
    stem, n = kohya_stem(TO_Q), 10_000_000
    tall, wide = torch.zeros(1).expand(n, 1), torch.zeros(1).expand(1, n)
    if kind == "LoHa":
        return {f"{stem}.hada_w{i}_{part}": t for i in (1, 2) for part, t in (("a", tall), ("b", wide))}
    if kind == "LoKr":
        return {f"{stem}.lokr_w{i}_{part}": t for i in (1, 2) for part, t in (("a", tall), ("b", wide))}
    return {f"{stem}.lora_up.weight": tall, f"{stem}.lora_down.weight": wide}


@pytest.mark.parametrize("kind", ["LoRA", "LoKr", "LoHa"])
def test_sizes_that_no_memory_holds_are_refused_without_a_model(kind: str, model: AnimaTransformerModel) -> None:
    from anima_peft.adapters.nominal import nominal_table

    tensors: Any = huge(kind)
    for modules in (nominal_table(tensors, "a file"), table(model)):
        with pytest.raises(InputError, match=r"factors for a \d+x\d+ layer"):
            parse(AdapterFile("a file", tensors), modules)
