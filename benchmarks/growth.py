"""How a run grows with its dataset: start with a complete cache, memory, and steps early and late in an epoch.

Every start is a process of its own, on synthetic pictures that are all different. 100,000 of them take 2.5 GB and some
minutes to write; `--folder` keeps them for another time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .growth_start import Start
from .reporting import Row


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--counts` and `--folder`."""
    parser.add_argument(
        "--counts", type=int, nargs="+", help="pictures; default: 1000 10000 100000, or 200 1000 at miniature size"
    )
    parser.add_argument("--folder", type=Path, help="where the datasets are, or are written and kept")


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    """A row for each number of pictures; ratios are to the smallest."""
    counts = sorted(arguments.counts or ([1000, 10_000, 100_000] if arguments.size == "full" else [200, 1000]))
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.folder or Path(temporary)
        starts = []
        for count in counts:
            folder = root / str(count)
            if not (folder / "dataset.toml").exists():
                _process(folder, "build", str(count))
            # The first brings the files into the system's cache, as a start that is repeated finds them.
            _process(folder, "start")
            starts.append(Start(**json.loads(_process(folder, "start").splitlines()[-1])))
    first = starts[0]
    for start in starts:
        yield Row(
            case="a start with a complete cache",
            name=f"{start.pictures} pictures",
            median=start.seconds,
            unit="s",
            ratio=start.seconds / first.seconds,
            reference=f"{first.pictures} pictures",
            peak_bytes=start.above,
            figures={
                "scan s": start.scan,
                "step ms": 1e3 * start.step,
                "late step ms": 1e3 * start.late_step,
                "/ first": start.late_step / first.step,
                "resume ms": 1e3 * start.late_start,
                "metadata ms": 1e3 * start.metadata,
            },
        )


def _process(folder: Path, *words: str) -> str:
    command = [sys.executable, "-m", "benchmarks.growth_start", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout
