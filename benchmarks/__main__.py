"""Measure and print tables: `python -m benchmarks NAME [options]`; without a name, all of them at miniature size."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence

import torch

from .measure import machine
from .reporting import Row, print_tables, write_json

BENCHMARKS = {
    "lokr": "one linear layer with LoRA, our LoKr, PEFT's and LyCORIS'",
    "step": "a whole training step beside PEFT and LyCORIS, and its parts",
    "tokens": "a training step by the number of its tokens",
    "caching": "pictures and captions into the cache, against the encoders alone",
    "loading": "the model and an adapter from their files, against diffusers",
    "generation": "a sampler step with an adapter, beside the base, fused, and exchanged",
    "growth": "start, memory and steps of a run by the number of its pictures",
    "memory": "what each memory option saves and costs in a training step",
}
ALL = "all"
SIZES = ("miniature", "full")


def main(argv: Sequence[str]) -> None:
    """Parse the options, measure, print, and write the rows where `--json` asks for it."""
    arguments = parse(argv)
    print(machine(arguments.device), flush=True)
    names = list(BENCHMARKS) if arguments.benchmark == ALL else [arguments.benchmark]
    rows: dict[str, list[Row]] = {}
    for name in names:
        print(f"\n{name}: {BENCHMARKS[name]}", flush=True)
        options = parse([name, *_common(arguments)]) if arguments.benchmark == ALL else arguments
        rows[name] = print_tables(_module(name).run(options))
    if arguments.json:
        write_json(arguments.json, ["python", "-m", "benchmarks", *argv], arguments.device, rows)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The benchmark's name as `benchmark`, and its options. Without a name it is "all", at miniature size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    for name, summary in BENCHMARKS.items():
        module = _module(name)
        own = subparsers.add_parser(name, help=summary, description=module.__doc__, allow_abbrev=False)
        _add_common(own)
        module.add_options(own)
    _add_common(subparsers.add_parser(ALL, help="all of them, at miniature size unless --size says otherwise"))
    named = bool(argv) and (not argv[0].startswith("-") or argv[0] in ("-h", "--help"))
    arguments = parser.parse_args(argv if named else [ALL, *argv])
    arguments.device = torch.device(arguments.device)
    if arguments.size is None:
        full = arguments.device.type == "cuda" and arguments.benchmark != ALL
        arguments.size = "full" if full else "miniature"
    return arguments


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, help="of the model, its weights random; default: full on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7, help="how often all candidates run in turn (default: 7)")
    parser.add_argument("--json", metavar="FILE", help="also write the rows, the machine and the versions to FILE")


def _common(arguments: argparse.Namespace) -> Iterator[str]:
    for name in ("size", "device", "rounds"):
        yield from (f"--{name}", str(getattr(arguments, name)))


def _module(name: str):  # type: ignore[no-untyped-def]  # the uniform interface, see the package's docstring
    return importlib.import_module(f"benchmarks.{name}")


if __name__ == "__main__":
    main(sys.argv[1:])
