"""`anima-peft merge --into`: a checkpoint with adapters in its weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from anima_peft.adapters.baking import bake
from anima_peft.adapters.factors import Factors
from anima_peft.adapters.naming import ModuleName
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import (
    KINDS_OF_FACTORS,
    QUERY_NORM,
    TO_Q,
    Tensors,
    add_explicitly,
    assert_close,
    factors_of_kind,
    kohya_stem,
    output,
    random_factors,
    tiny_model,
)
from tests.adapters.commanding import adapter_file, checkpoint, contents, metadata_of, origin_of, run, tensor_file

pytestmark = pytest.mark.usefixtures("unflushed")


def explicitly(
    model: AnimaTransformerModel, parts: list[tuple[dict[ModuleName, Factors], float]], path: Path
) -> Tensors:
    """The checkpoint with the deltas added by the tests' own arithmetic."""
    for factors, strength in parts:
        add_explicitly(model, factors, strength)
    return load_file(checkpoint(model, path))


@pytest.mark.parametrize("strength", [1.0, -0.6])
@pytest.mark.parametrize("kind", KINDS_OF_FACTORS)
def test_every_kind_is_added(kind: str, strength: float, tmp_path: Path) -> None:
    model = tiny_model()
    factors = factors_of_kind(model, kind)
    file = adapter_file(factors, tmp_path / "one.safetensors")
    base = checkpoint(model, tmp_path / "base.safetensors")
    done = bake([(file, strength)], base, tmp_path / "new.safetensors")
    found, before = load_file(done.path), load_file(base)
    expected = explicitly(model, [(factors, strength)], tmp_path / "expected.safetensors")
    assert list(found) == list(before)
    changed = {key for key in before if not torch.equal(found[key], before[key])}
    assert changed == {key for key in before if not torch.equal(expected[key], before[key])}
    for key in changed:
        assert_close(found[key], expected[key])


def test_the_output_is_that_of_the_adapters_loaded_and_fused(tmp_path: Path) -> None:
    model = tiny_model()
    kinds = ("DoRA", "LoRA", "LoKr full", "norms", "biases")
    parts = [(factors_of_kind(model, kind, seed=n), 0.5 + n / 4) for n, kind in enumerate(kinds)]
    files = [adapter_file(f, tmp_path / f"{n}.safetensors") for n, (f, _) in enumerate(parts)]
    base = checkpoint(model, tmp_path / "base.safetensors")
    path = tmp_path / "new 新.safetensors"
    adapters = [f"{file}={strength}" for file, (_, strength) in zip(files, parts, strict=True)]
    assert run("merge", *adapters, "--into", base, "--output", path) == 0
    for number, file in enumerate(files):
        model.load_lora_adapter(file, adapter_name=f"adapter{number}")
    model.set_adapters([f"adapter{n}" for n in range(len(files))], [strength for _, strength in parts])
    assert_close(output(AnimaTransformerModel.from_single_file(path)), output(model), 1e-5)


def test_dora_acts_on_what_came_before(tmp_path: Path) -> None:
    model = tiny_model()
    parts = [(factors_of_kind(model, kind, seed=n), 0.8) for n, kind in enumerate(("LoRA", "DoRA", "LoKr full"))]
    files = [(adapter_file(f, tmp_path / f"{n}.safetensors"), s) for n, (f, s) in enumerate(parts)]
    done = bake(files, checkpoint(model, tmp_path / "base.safetensors"), tmp_path / "new.safetensors")
    found = load_file(done.path)
    for key, tensor in explicitly(model, parts, tmp_path / "expected.safetensors").items():
        assert_close(found[key], tensor)


@pytest.mark.parametrize("prefix", ["net.", "model.diffusion_model.", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layout_dtype_and_metadata_stay(prefix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(dtype)
    text = {"modelspec.title": "Base", "sshs_model_hash": "1" * 64, "format": "pt"}
    base = checkpoint(model, tmp_path / "base.safetensors", text, prefix)
    tensors = load_file(base) | {f"{prefix}pos_embedder.seq": torch.arange(3)}
    save_file(tensors, base, text)
    file = adapter_file(random_factors(model), tmp_path / "one.safetensors")
    first = bake([(file, 1.0)], base, tmp_path / "first.safetensors")
    found, before = load_file(first.path), load_file(base)
    assert list(found) == list(before)
    assert [key for key in before if found[key].dtype != before[key].dtype] == []
    assert torch.equal(found[f"{prefix}pos_embedder.seq"], torch.arange(3))
    exact = explicitly(tiny_model(dtype).float(), [(random_factors(model), 1.0)], tmp_path / "expected.safetensors")
    for key, tensor in exact.items():
        assert_close(
            found[prefix + key.removeprefix("net.")].float(), tensor.to(dtype).float(), torch.finfo(dtype).eps * 4
        )
    assert (first.lost > 1e-4) is (dtype is torch.bfloat16 or dtype is torch.float16)
    made = metadata_of(first.path)
    assert made["modelspec.title"] == "Base"
    assert "sshs_model_hash" not in made
    assert origin_of(first.path)["adapters"] == [{"file": "one.safetensors", "strength": 1.0}]
    second = bake([(file, -1.0)], first.path, tmp_path / "second.safetensors")
    assert json.loads(origin_of(second.path)["before"]) == origin_of(first.path)


def test_absolute_norms_are_understood(tmp_path: Path) -> None:
    model = tiny_model()
    base = checkpoint(model, tmp_path / "base.safetensors")
    norm = model.transformer.transformer_blocks[0].attn1.norm_q.weight.detach() + 0.25
    file = tensor_file({f"__anima_norm__.{QUERY_NORM}.weight": norm}, tmp_path / "norm.safetensors")
    done = bake([(file, 1.0)], base, tmp_path / "new.safetensors")
    assert_close(load_file(done.path)[f"net.{QUERY_NORM}.weight"], norm)


def faults() -> dict[str, tuple[list[str], str]]:
    return {
        "no checkpoint": (["{one}", "--into", "{tmp}/absent.safetensors"], "no such file"),
        "a folder": (["{one}", "--into", "{tmp}"], "no such file"),
        "an adapter": (["{one}", "--into", "{one}"], "it looks like an adapter"),
        "no conditioner": (["{one}", "--into", "{tmp}/bare.safetensors"], "no `llm_adapter.*` weights"),
        "lying header": (["{one}", "--into", "{tmp}/lying.safetensors"], "not a readable safetensors file"),
        "quantised": (["{one}", "--into", "{tmp}/quantised.safetensors"], "are quantised, such as net.blocks.0"),
        "another size": (["{tmp}/wide.safetensors", "--into", "{base}"], "factors for a"),
        "a module too many": (["{tmp}/far.safetensors", "--into", "{base}"], "names no known module"),
        "text encoder": (["{tmp}/text.safetensors", "--into", "{base}"], "the text encoder's part"),
        "not a number": (["{tmp}/nan.safetensors", "--into", "{base}"], "not finite"),
        "overflow": (["{one}=1e30", "--into", "{tmp}/half.safetensors"], "the sum is not finite in the checkpoint's"),
        "rank": (["{one}", "--into", "{base}", "--rank", "4"], "--rank has no effect with --into"),
        "dtype": (["{one}", "--into", "{base}", "--dtype", "bf16"], "--dtype has no effect with --into"),
        "output is checkpoint": (["{one}", "--into", "{base}", "--output", "{base}", "--overwrite"], "is an input"),
        "output exists": (["{one}", "--into", "{base}", "--output", "{tmp}/half.safetensors"], "exists already"),
    }


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good and bad files; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("faulty")
    model = tiny_model()
    factors = random_factors(model)
    adapter_file(factors, folder / "one.safetensors")
    base = checkpoint(model, folder / "base.safetensors")
    tensors = load_file(base)
    checkpoint(tiny_model(torch.float16), folder / "half.safetensors")
    save_file({k: t for k, t in tensors.items() if "llm_adapter" not in k}, folder / "bare.safetensors")
    (folder / "lying.safetensors").write_bytes(base.read_bytes()[:-100])
    fp8: dict[str, Any] = {k: t.to(torch.float8_e4m3fn) if "q_proj" in k else t for k, t in tensors.items()}
    save_file(fp8, folder / "quantised.safetensors")
    stem = kohya_stem(TO_Q)
    wide = {f"{stem}.lora_down.weight": torch.ones(2, 7), f"{stem}.lora_up.weight": torch.ones(64, 2)}
    save_file(wide, folder / "wide.safetensors")
    save_file({k.replace("blocks_0", "blocks_9"): t for k, t in wide.items()}, folder / "far.safetensors")
    save_file({k: t / 0 for k, t in wide.items()}, folder / "nan.safetensors")
    text = {k.replace(stem, "lora_te_layers_0_self_attn_q_proj"): t for k, t in wide.items()}
    save_file(text, folder / "text.safetensors")
    return folder


@pytest.mark.parametrize("fault", faults())
def test_faults(fault: str, faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One clear error, exit code 2, and every file as it was."""
    arguments, message = faults()[fault]
    filled = [
        text.format(tmp=faulty, one=faulty / "one.safetensors", base=faulty / "base.safetensors") for text in arguments
    ]
    filled += [] if "--output" in filled else ["--output", str(tmp_path / "out.safetensors")]
    before = contents(faulty)
    assert run("merge", *filled) == 2
    assert message in capsys.readouterr().err
    assert contents(faulty) == before
    assert contents(tmp_path) == {}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="resource is POSIX's")
def test_memory_stays_bounded_on_a_large_file(tmp_path: Path) -> None:
    """1.5 GB of checkpoint, in a process that may grow by a tenth of it."""
    code = """
import resource, sys, torch
from anima_peft.streaming import TensorFile, rewrite
from pathlib import Path
scale = 1 if sys.platform == "darwin" else 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
before = peak()
with TensorFile(sys.argv[1]) as file:
    rewrite(file, Path(sys.argv[2]), {key: lambda old: old + 1 for key in file.entries}, {})
print(peak() - before)
"""
    tensors = {f"layer.{n}": torch.zeros(2048, 8192, dtype=torch.bfloat16) for n in range(45)}
    source = tmp_path / "large.safetensors"
    save_file(tensors, source)
    size = source.stat().st_size
    del tensors
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "new.safetensors")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert size > 1.4e9
    assert grown < size / 10
