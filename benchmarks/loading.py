"""Loading the model and an adapter: seconds and memory, against diffusers and against reading the file."""

from __future__ import annotations

import argparse
import gc
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AnimaTextConditioner, CosmosTransformer3DModel
from safetensors.torch import load_file, save_file

from anima_peft import AnimaTransformerModel, LoraConfig
from anima_peft.miniature import native_state_dict

from . import models
from .measure import PeakMemory, median_ratio, synchronize
from .reporting import Row

_RANK = 32


def add_options(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows of the model's files and of an adapter's; ratios are to diffusers' own loading."""
    cpu = torch.device("cpu")
    dtype = torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        single, parts, adapter = (
            Path(folder) / "anima.safetensors",
            Path(folder) / "parts",
            Path(folder) / "lora.safetensors",
        )
        model = models.transformer_model(arguments.size, cpu, dtype, heads=16, layers=8)
        save_file(native_state_dict(model.transformer, model.text_conditioner), single)
        model.save_pretrained(parts)
        model.add_adapter(LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules="attn-mlp"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        model.save_lora_adapter(adapter, format="diffusers")
        del model
        yield from _models(single, parts, dtype, arguments)
        yield from _adapters(single, adapter, dtype, arguments)


def _models(single: Path, parts: Path, dtype: torch.dtype, arguments: argparse.Namespace) -> Iterator[Row]:
    def stock() -> Any:
        transformer = CosmosTransformer3DModel.from_pretrained(parts, subfolder="transformer", torch_dtype=dtype)
        conditioner = AnimaTextConditioner.from_pretrained(parts, subfolder="text_conditioner", torch_dtype=dtype)
        return _read([*transformer.parameters(), *conditioner.parameters()])

    loads = {
        "diffusers, folder": stock,
        "ours, folder": lambda: _read(AnimaTransformerModel.from_pretrained(parts, torch_dtype=dtype).parameters()),
        "ours, single file": lambda: _read(
            AnimaTransformerModel.from_single_file(single, torch_dtype=dtype).parameters()
        ),
        "safetensors alone": lambda: _read(load_file(single).values()),
    }
    case = f"DiT and conditioner, {single.stat().st_size / 2**20:.0f} MiB in bfloat16, to the CPU"
    yield from _measured(case, loads, "diffusers, folder", torch.device("cpu"), arguments.rounds)


def _read(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, one byte of each page of them looked at: a file that is mapped into memory is not read before."""
    kept = [tensor.detach() for tensor in tensors]
    for tensor in kept:
        tensor.flatten().view(torch.uint8)[:: mmap.PAGESIZE].sum()
    return kept


def _adapters(single: Path, adapter: Path, dtype: torch.dtype, arguments: argparse.Namespace) -> Iterator[Row]:
    ours = AnimaTransformerModel.from_single_file(single, torch_dtype=dtype).to(arguments.device)
    stock = AnimaTransformerModel.from_single_file(single, torch_dtype=dtype).to(arguments.device).transformer

    def load_stock() -> None:
        stock.load_lora_adapter(load_file(adapter), prefix="transformer", adapter_name="default")

    def load_ours() -> None:
        ours.load_lora_adapter(adapter)

    def prepare() -> None:
        if getattr(stock, "peft_config", None):
            stock.unload_lora()
        ours.unload_lora()

    loads = {"diffusers": load_stock, "ours": load_ours}
    case = f"a LoRA of rank {_RANK}, {adapter.stat().st_size / 2**20:.0f} MiB, onto a loaded model"
    yield from _measured(case, loads, "diffusers", arguments.device, arguments.rounds, prepare)


def _measured(
    case: str,
    loads: dict[str, Callable[[], Any]],
    reference: str,
    device: torch.device,
    rounds: int,
    prepare: Callable[[], None] = lambda: None,
) -> Iterator[Row]:
    times: dict[str, list[float]] = {name: [] for name in loads}
    above: dict[str, int] = {}
    for counted in [False] + [True] * rounds:
        for name, load in loads.items():
            prepare()
            gc.collect()
            with PeakMemory(device) as memory:
                start = time.perf_counter()
                loaded = load()
                synchronize(device)
                seconds = time.perf_counter() - start
            del loaded
            if counted:
                times[name].append(seconds)
                above[name] = max(above.get(name, 0), memory.above)
    for name in loads:
        yield Row(
            case=case,
            name=name,
            median=statistics.median(times[name]),
            unit="s",
            ratio=median_ratio(times, name, reference),
            reference=reference,
            peak_bytes=above[name],
        )
