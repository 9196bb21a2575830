"""Weights read from a single file: their dtype, where they live, and the memory that reading takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from anima_peft.miniature import native_state_dict
from anima_peft.models.checkpoints import build_empty
from anima_peft.models.dit import load_dit
from tests.components import tiny_conditioner, tiny_transformer

from .conftest import Save, Tensors
from .dit_files import conditioner_of, transformer_of


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16], ids=str)
def test_weights_are_in_the_wanted_dtype_or_the_files(
    native: Tensors, save: Save, stored: torch.dtype, wanted: torch.dtype | None
) -> None:
    path = save({key: tensor.to(stored) for key, tensor in native.items()})
    for model in load_dit(path, wanted):
        assert {parameter.dtype for parameter in model.parameters()} == {wanted or stored}
    expected = native["blocks.1.mlp.layer1.weight"].to(stored).to(wanted or stored)
    assert torch.equal(load_dit(path, wanted)[0].transformer_blocks[1].ff.net[0].proj.weight, expected)


def test_models_are_ready_for_use_and_nothing_random_was_drawn(native: Tensors, save: Save) -> None:
    path = save(native)
    state = torch.random.get_rng_state()
    models = load_dit(path)
    assert torch.equal(torch.random.get_rng_state(), state)
    for model in models:
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    norms = [module for name, module in models[0].named_modules() if name.endswith(("norm_q", "norm_k"))]
    assert [norm.eps for norm in norms] == [1e-6] * 8


def test_loaded_weights_are_not_the_files(native: Tensors, save: Save) -> None:
    path = save(native)
    models = load_dit(path)
    with path.open("r+b") as file:  # in place: a mapping of the file would see it
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\0" * size)
    for model, original in zip(models, (tiny_transformer(), tiny_conditioner()), strict=True):
        expected = original.state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


MEASURE = """
import gc, json, sys, threading, time
import psutil, torch
from anima_peft.transformer import AnimaTransformerModel

process = psutil.Process()
kept, results = [], []

def private():
    # Without pages that belong to a mapped file: the system takes those back whenever it likes.
    memory = process.memory_info()
    return memory.rss - memory.shared

for path, dtype in json.loads(sys.argv[1]):
    gc.collect()
    before, peak, done = private(), 0, threading.Event()

    def watch():
        global peak
        while not done.wait(0.001):
            peak = max(peak, private() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept.append(AnimaTransformerModel.from_pretrained(path, getattr(torch, dtype)))
    done.set()
    watcher.join()
    held = sum(p.numel() * p.element_size() for p in kept[-1].parameters())
    results.append((max(peak, private() - before), held))
print(json.dumps(results))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells private memory from a mapped file's")
def test_loading_needs_hardly_more_private_memory_than_the_model(tmp_path: Path) -> None:
    weights = native_state_dict(
        build_empty(lambda: transformer_of({"num_attention_heads": 8, "attention_head_dim": 128})),
        build_empty(lambda: conditioner_of({"model_dim": 1024, "num_layers": 1})),
    )
    cases = []
    for stored, wanted in ((torch.float32, "float32"), (torch.float32, "bfloat16"), (torch.bfloat16, "float32")):
        path = tmp_path / f"{len(cases)}.safetensors"
        save_file({key: torch.zeros(tensor.shape, dtype=stored) for key, tensor in weights.items()}, path)
        cases.append((str(path), wanted))
    command = [sys.executable, "-c", MEASURE, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for (path, _), (peak, held) in zip(cases, results, strict=True):
        assert held > 50e6  # far above what a process takes and gives back by itself
        assert 0.8 * held < peak <= 1.2 * max(held, Path(path).stat().st_size)
