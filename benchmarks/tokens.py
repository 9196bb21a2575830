"""How a step grows with its tokens: time beside arithmetic, which attention makes grow a little faster than they do.

All sizes run in turn on one model. "time / arithmetic" is the growth of the time over that of the floating-point
operations of PEFT's LoRA, both from the smallest size: 1 means that nothing but products grows, less that fixed costs
are spread over more tokens. `memory --counted --resolution` tells the same of memory.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from .candidates import REFERENCE, Step, add_model_options, build_case, candidates, case_engine
from .measure import flops_of, median_ratio, paired_times
from .reporting import Row

NAMES = (REFERENCE, "ours LoRA", "ours LoKr")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The model's sizes, and the steps'."""
    add_model_options(parser)
    parser.add_argument(
        "--sides", type=int, nargs="+", help="of squares of tokens; default: 16 32 48, at full size 32 48 64"
    )


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    """A row for each candidate and size; ratios are to the candidate's smallest size."""
    sides = sorted(set(arguments.sides or ([32, 48, 64] if arguments.size == "full" else [16, 32, 48])))
    first = build_case(arguments, (sides[0], sides[0]))
    cases = [replace(first, latents=(2 * side, 2 * side)) for side in sides]
    with tempfile.TemporaryDirectory() as root, case_engine(first, Path(root)) as accelerator:
        steps: dict[str, Step] = {}
        flops = {}
        for case in cases:
            folder = Path(root) / str(case.tokens)
            folder.mkdir()
            builders = candidates(case, accelerator, folder, None)
            for name in NAMES:
                steps[f"{name}, {case.tokens}"] = builders[name]()
            flops[case.tokens] = flops_of(steps[f"{REFERENCE}, {case.tokens}"])
        times = paired_times(steps, arguments.rounds, first.device)
    for name in NAMES:
        smallest = f"{name}, {first.tokens}"
        for case in cases:
            own = f"{name}, {case.tokens}"
            grown, arithmetic = median_ratio(times, own, smallest), flops[case.tokens] / flops[first.tokens]
            yield Row(
                f"{name}: steps of different tokens, batch {case.batch}, rank {case.rank}, {case.precision}",
                f"{case.tokens} tokens",
                1e3 * statistics.median(times[own]),
                "ms",
                grown,
                f"{first.tokens} tokens",
                figures={
                    "tokens": case.tokens / first.tokens,
                    "arithmetic": arithmetic,
                    "time / arithmetic": grown / arithmetic,
                    f"/ {REFERENCE}": median_ratio(times, own, f"{REFERENCE}, {case.tokens}"),
                },
            )
