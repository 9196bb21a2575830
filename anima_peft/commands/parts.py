"""What several commands' flags have in common."""

from __future__ import annotations

import argparse
import math
import shutil
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch

from ..adapters.low_rank import Keep
from ..adapters.naming import ModuleTable
from ..adapters.resizing import Approximation
from ..adapters.single_file import table_of
from ..adapters.writing import FORMATS
from ..errors import InputError
from ..models.dit import open_dit
from ..models.hub_folders import Hub
from ..terminal import progress_bar
from ..transformer import AnimaTransformerModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODEL_HELP = "Anima single file or diffusers folder, to check the sizes against"
HUBS = {"huggingface": Hub.HUGGING_FACE, "modelscope": Hub.MODELSCOPE}
_MOST_SHOWN = 5
Item = TypeVar("Item")


def command_parser(name: str, description: str, *examples: str) -> argparse.ArgumentParser:
    """A parser as all commands have it: no abbreviations, and examples, if there are any, at the end of the help."""
    heading = "examples:" if len(examples) > 1 else "example:"
    return argparse.ArgumentParser(
        prog=f"anima-peft {name}",
        description=textwrap.fill(description, shutil.get_terminal_size().columns - 2),  # the formatter keeps lines
        epilog="\n  ".join([heading, *examples]) if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_file_options(parser: argparse.ArgumentParser) -> None:
    """--format, --dtype and --overwrite of an adapter file that is written."""
    parser.add_argument("--format", choices=FORMATS, help="style of the keys, see `convert` (default kohya)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the factors; unset, nothing is rounded")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")


def add_keep_options(parser: argparse.ArgumentParser, rank: str, energy: str) -> None:
    """--rank and --energy."""
    parser.add_argument("--rank", type=positive, metavar="R", help=rank)
    parser.add_argument("--energy", type=share, metavar="SHARE", help=energy)


def keep_of(arguments: argparse.Namespace) -> Keep | None:
    """What --rank and --energy ask for; None where neither is given."""
    if arguments.rank is None and arguments.energy is None:
        return None
    return Keep(arguments.rank, arguments.energy)


def positive(text: str) -> int:
    """A whole number above zero, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above zero, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """A number above 0 and up to 1, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 1, such as 0.95, got {text!r}")
    return number


def adapter_and_strength(text: str, option: str = "") -> tuple[str, float]:
    """File or hub repo and strength of `FILE[=STRENGTH]`; a name that contains `=` and exists is a name.

    Args:
        option: what to call it in messages.

    Raises:
        InputError: the strength is no number.
    """
    path, equals, strength = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        return path, float(strength)
    except ValueError:
        named = f"{option} {text}".strip()
        raise InputError(f"{named}: expected FILE or FILE=STRENGTH, and {strength!r} is no number.") from None


def device_of(name: str | None) -> torch.device:
    """The device of a `--device`, or the best there is.

    Raises:
        InputError: torch does not know it, or it is not to be had here.
    """
    if name is None:
        found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(found)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name}: cannot be used here ({error}); name another, or leave it out.") from error
    return device


def table_at(model: str | None) -> ModuleTable | None:
    """The modules of the model at a path or of a hub repo; of a single file the weights are not read."""
    if model is None:
        return None
    if Path(model).expanduser().is_file():
        return table_of(open_dit(Path(model).expanduser()))
    return ModuleTable(AnimaTransformerModel.from_pretrained(model).components)


def modules_bar(what: str) -> Callable[[Iterable[Item]], Iterable[Item]]:
    """A progress bar over modules."""
    return lambda names: progress_bar(list(names), desc=what, unit="module")


def bytes_bar(what: str) -> Callable[[int], Callable[[int], object]]:
    """A progress bar over bytes, made when their number is known."""

    def start(total: int) -> Callable[[int], object]:
        """The bar; returned is what takes it forward."""
        return progress_bar(total=total, desc=what, unit="B", unit_scale=True).update

    return start


def print_approximation(done: Approximation, *, verbose: bool) -> None:
    """What an approximation kept: of the whole, and module by module, the worst first."""
    print(f"{done.path}: {done.contents}")
    print(f"kept energy: {done.share:.4%} of the squared Frobenius norm of all deltas")
    modules = sorted(done.modules, key=lambda module: module.share)
    for module in modules if verbose else modules[:_MOST_SHOWN]:
        print(f"  {module.share:9.4%}  {module.name.native}: {module.contents}")
    if len(modules) > _MOST_SHOWN and not verbose:
        print(f"  … and {len(modules) - _MOST_SHOWN} modules that keep more; --verbose lists them")
    for note in done.notes:
        print(f"note: {note}")
