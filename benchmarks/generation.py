"""A sampler step with an adapter: beside the base, fused into it, and exchanged for another without recompiling."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from anima_peft import AnimaTransformerModel, LoraConfig

from . import models
from .measure import PeakMemory, median_ratio, paired_times, product_rate, synchronize
from .reporting import Row

_RANK = 32
_SWAPS = 5


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--compile`."""
    parser.add_argument(
        "--compile", choices=["eager", "inductor"], help="torch.compile's backend; default: inductor on a GPU"
    )


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows of a step's time, and of the exchange."""
    full, device = arguments.size == "full", arguments.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    side = 1024 if full else 256
    with tempfile.TemporaryDirectory() as folder:
        built = [_model(arguments, device, dtype) for _ in range(3)]
        base, beside, fused = built
        files = [_adapter(beside, Path(folder) / f"{seed}.safetensors", seed) for seed in range(2)]
        beside.load_lora_adapter(files[0])
        fused.load_lora_adapter(files[0])
        fused.fuse_lora()
        inputs = _inputs(base, side, device, dtype)
        steps = {
            name: lambda model=model: _step(model, inputs)
            for name, model in {"base": base, "fused": fused, "beside": beside}.items()
        }
        case = f"a step with guidance at {side} x {side}, LoRA of rank {_RANK}"
        yield from _steps(case, steps, _flops(base, inputs), dtype, arguments)
        yield from _exchange(beside, files, inputs, arguments)


def _steps(
    case: str, steps: dict[str, Callable[[], None]], flops: int, dtype: torch.dtype, arguments: argparse.Namespace
) -> Iterator[Row]:
    device = arguments.device
    peaks = {}
    for name, step in steps.items():
        with PeakMemory(device) as memory:
            step()
            synchronize(device)
        peaks[name] = memory.peak
    times = paired_times(steps, arguments.rounds, device)
    peak_rate = product_rate(device, dtype, 8192 if device.type == "cuda" else 1024)
    for name in steps:
        median = statistics.median(times[name])
        yield Row(
            case=case,
            name=name,
            median=1e3 * median,
            unit="ms",
            ratio=median_ratio(times, name, "base"),
            reference="base",
            peak_bytes=peaks[name],
            figures={"share of peak": flops / median / peak_rate},
        )


def _exchange(
    model: AnimaTransformerModel, files: list[Path], inputs: dict[str, torch.Tensor], arguments: argparse.Namespace
) -> Iterator[Row]:
    """Adapters exchanged on a compiled model, and how often that was compiled anew."""
    device = arguments.device
    counter = CompileCounterWithBackend(arguments.compile or ("inductor" if device.type == "cuda" else "eager"))
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend=counter)

    def timed(action: Callable[[], object]) -> float:
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        return time.perf_counter() - start

    first = timed(lambda: _step(model, inputs))
    compiled = counter.frame_count
    swaps, steps = [], []
    for number in range(_SWAPS):
        swaps.append(timed(lambda number=number: model.load_lora_adapter(files[(number + 1) % 2], hotswap=True)))
        steps.append(timed(lambda: _step(model, inputs)))
    recompiled = counter.frame_count - compiled
    case = f"another LoRA in the place of the first, compiled model ({counter.backend})"
    for name, seconds in (("first step", [first]), ("exchange", swaps), ("step after it", steps)):
        figures = {"recompilations": recompiled} if name == "exchange" else {}
        yield Row(case=case, name=name, median=1e3 * statistics.median(seconds), unit="ms", figures=figures)


def _model(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> AnimaTransformerModel:
    return models.transformer_model(arguments.size, device, dtype, heads=8, layers=6)


def _adapter(model: AnimaTransformerModel, path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    parameters = model.add_adapter(LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules="attn-mlp"), "made")
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.01)
    model.save_lora_adapter(path, "made")
    model.unload_lora()
    return path


def _inputs(
    model: AnimaTransformerModel, side: int, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A batch of two, with and without the prompt, as guidance has it."""
    width = model.text_conditioner.config.target_dim
    return {
        "hidden_states": torch.randn(2, 16, side // 8, side // 8, device=device, dtype=dtype),
        "sigma": torch.full((2,), 0.5, device=device),
        "prompt_embeds": torch.randn(2, 512, width, device=device, dtype=dtype),
    }


@torch.no_grad()
def _step(model: AnimaTransformerModel, inputs: dict[str, torch.Tensor]) -> None:
    model(**inputs)


def _flops(model: AnimaTransformerModel, inputs: dict[str, torch.Tensor]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        _step(model, inputs)
    return counter.get_total_flops()
