"""A whole training step: ours beside others' adapters, see `candidates`, and its parts.

"added" is what a LoKr costs beyond PEFT's LoRA, over what PEFT's LoKr costs beyond it. What does not fit into the
card's memory is reported as such, and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator

from anima_peft.training import loop

from .candidates import BASE, PEFT_LOKR, REFERENCE, Case, Step, add_model_options, build_case, candidates, case_engine
from .measure import PeakMemory, flops_of, let_go, median_ratio, paired_times, product_rate
from .reporting import Row

_PARTS = ("forward", "backward", "optimizer", "logging")


def _built(
    case: Case, builders: Mapping[str, Callable[[], Step]]
) -> tuple[dict[str, Step], dict[str, int | None], list[str]]:
    """The steps, each done once or twice; on a card the most memory of one, as if the others were not there.

    Returns:
        steps and bytes by name, and the names of those that do not fit into memory.
    """
    steps: dict[str, Step] = {}
    peaks: dict[str, int | None] = {}
    unfit = []
    model = sum(parameter.nbytes for parameter in case.base.transformer.parameters())
    on_card = case.device.type == "cuda"
    for name, build in builders.items():
        others = torch.cuda.memory_allocated() if on_card else 0
        peak = None  # on a CPU a process has one peak for all
        try:
            step = build()
            step()  # compiles, and makes the optimizer's state
            if on_card:
                with PeakMemory(case.device) as memory:
                    step()
                peak = memory.peak - others + model
        except torch.OutOfMemoryError:
            unfit.append(name)
        else:
            steps[name], peaks[name] = step, peak
        step = build  # lets go of one that did not fit
        let_go()
    return steps, peaks, unfit


def add_options(parser: argparse.ArgumentParser) -> None:
    """The model's and the step's sizes."""
    add_model_options(parser)
    parser.add_argument("--tokens", type=int, nargs=2, metavar=("H", "W"), help="default: 32 32, at full size 64 64")
    parser.add_argument("--compile", metavar="BACKEND", help="also measure ours compiled, by inductor for example")


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    """Time over PEFT LoRA's in the same round, peak memory of a step, share of the machine's best product; parts."""
    case = build_case(arguments, arguments.tokens or ((64, 64) if arguments.size == "full" else (32, 32)))
    with tempfile.TemporaryDirectory() as folder, case_engine(case, Path(folder)) as accelerator:
        steps, peaks, unfit = _built(case, candidates(case, accelerator, Path(folder), arguments.compile))
        yield from _compared(case, steps, peaks, arguments)
        for name in unfit:
            yield Row(_title(case), name, None, "ms", figures={"share of peak": "does not fit"})
        for name in steps:
            if name.startswith("ours"):
                yield _by_part(name, steps[name], arguments)


def _title(case: Case) -> str:
    checkpointing = ", checkpointing" if case.checkpointing else ""
    return f"step: {case.tokens} tokens, batch {case.batch}, rank {case.rank}, {case.precision}{checkpointing}"


def _compared(
    case: Case, steps: Mapping[str, Step], peaks: Mapping[str, int | None], arguments: argparse.Namespace
) -> Iterator[Row]:
    if REFERENCE not in steps:
        sys.exit(f"{REFERENCE}, which all are compared with, does not fit. Give --checkpointing or fewer --tokens.")
    best = product_rate(case.device, case.base.transformer.dtype, 8192 if case.device.type == "cuda" else 2048)
    flops = flops_of(steps[REFERENCE])
    times = paired_times(steps, arguments.rounds, case.device)
    for name in steps:
        median = statistics.median(times[name])
        figures = {"share of peak": flops / best / median}
        if name != BASE and "ours LoRA" in times:
            figures["/ ours LoRA"] = median_ratio(times, name, "ours LoRA")
        if "LoKr" in name and PEFT_LOKR in times:
            figures["added"] = _added(times, name)
        ratio = median_ratio(times, name, REFERENCE)
        yield Row(_title(case), name, 1e3 * median, "ms", ratio, REFERENCE, peaks[name], figures)


def _added(times: Mapping[str, list[float]], name: str) -> float:
    """Median over the rounds of the time beyond PEFT's LoRA, over that of PEFT's LoKr."""
    rounds = zip(times[name], times[PEFT_LOKR], times[REFERENCE], strict=True)
    return statistics.median((own - lora) / (lokr - lora) for own, lokr, lora in rounds)


def _by_part(name: str, step: Step, arguments: argparse.Namespace) -> Row:
    """Medians of a step's parts, each waited for; what is left is the data and the loop itself."""
    taken: dict[str, list[float]] = {part: [] for part in _PARTS}
    whole = []
    with contextlib.ExitStack() as stack:
        for part, owner, function in (
            ("forward", loop, "batch_loss"),
            ("backward", Accelerator, "backward"),
            ("optimizer", loop, "_take_step"),
            ("logging", loop._Meter, "step"),
        ):
            timed = _timed(getattr(owner, function), taken[part], arguments.device)
            stack.enter_context(mock.patch.object(owner, function, timed))
        for _ in range(max(3, arguments.rounds // 2)):
            start = time.perf_counter()
            step()
            whole.append(time.perf_counter() - start)
    parts = {f"{part} ms": 1e3 * statistics.median(values) for part, values in taken.items()}
    total = 1e3 * statistics.median(whole)
    rest = {"data, loop ms": total - sum(parts.values())}
    return Row("parts of a step, the device waited for after each", name, total, "ms", figures=parts | rest)


def _timed(function: Callable[..., Any], into: list[float], device: torch.device) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **options)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        into.append(time.perf_counter() - start)
        return result

    return call
