"""Lines of a shell block, held against the parsers of what they start."""

from __future__ import annotations

import argparse
import configparser
import contextlib
import importlib
import io
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from accelerate.commands.launch import launch_command_parser

from anima_peft.cli import main
from anima_peft.config import load
from anima_peft.errors import InputError
from tests.docs.pages import ROOT

SHELLS = ("bash", "sh", "shell", "console")
_TRAINERS = ("examples/train_anima_lora.py", "anima_train_network.py")


class Unknown(Exception):
    """A command that no test knows how to hold against anything; it needs a mark."""


class _Parsed(BaseException):
    """The command line was taken; what would follow is not wanted."""


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command of a shell block: lines joined at `\\`, parted at `&&`, comments left out."""
    for line in re.sub(r"\\\n", " ", code).splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


def check(words: Sequence[str], folder: Path) -> None:
    """Hold one command against its parser.

    Args:
        words: of the command.
        folder: holds `train_args.toml` and `dataset.toml` that load, in place of files that a page only names.

    Raises:
        Unknown: nobody here knows the command.
        AssertionError: the command would be refused; the message says why.
    """
    head, rest = words[0], list(words[1:])
    if head == "anima-peft":
        _check_own(rest, folder)
    elif head == "accelerate" and rest[:1] == ["launch"]:
        _check_launch(rest[1:], folder)
    elif head == "pip" and rest[:1] == ["install"]:
        _check_extras(rest[1:])
    elif head == "python" and rest[:2] == ["-m", "benchmarks"]:
        _expect(lambda: importlib.import_module("benchmarks.__main__").parse(rest[2:]))
    elif head == "python" and rest and rest[0].endswith(".py") and (ROOT / rest[0]).is_file():
        _check_script(rest[0], rest[1:], folder)
    elif head not in ("pytest", "ruff", "mypy", "cd", "mkdir", "tensorboard"):
        raise Unknown(" ".join(words[:3]))


def _check_own(words: list[str], folder: Path) -> None:
    if words[:1] == ["train"] and "--help" not in words:
        _check_training(words[1:], folder)
        return
    _expect(lambda: main(words))


def _check_training(words: list[str], folder: Path) -> None:
    """The flags through the whole loader, so that values and what has no effect are checked, too."""
    words = list(words)
    for option, substitute in (("--config_file", "train_args.toml"), ("--dataset_config", "dataset.toml")):
        if option not in words:
            words += [option, str(folder / substitute)]
            continue
        place = words.index(option) + 1
        shipped = ROOT / words[place]
        words[place] = str(shipped if shipped.is_file() else folder / substitute)
    try:
        load(words)
    except InputError as error:
        raise AssertionError(str(error)) from error


def _check_launch(words: list[str], folder: Path) -> None:
    parsed = _expect(lambda: launch_command_parser().parse_args(words), parsers=False)
    script = parsed.training_script
    assert (ROOT / script).is_file(), f"there is no {script}"
    assert script in _TRAINERS, f"{script} is none of {', '.join(_TRAINERS)}"
    _check_training(parsed.training_script_args, folder)


def _check_extras(words: Sequence[str]) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    for extras in re.findall(r"^(?:\.|anima-peft)\[(.+)\]$", "\n".join(words), re.M):
        unknown = {extra.strip() for extra in extras.split(",")} - set(setup["options.extras_require"])
        assert not unknown, f"setup.cfg has no extra {', '.join(unknown)}"


def _check_script(script: str, words: list[str], folder: Path) -> None:
    if script in _TRAINERS:
        _check_training(words, folder)
        return
    text = (ROOT / script).read_text(encoding="utf-8")
    if "argv" not in text and "parse_args" not in text:  # it would begin to work
        assert not words, f"{script} takes no arguments"
        return
    code = compile(text, script, "exec")
    with mock.patch.object(sys, "argv", [script, *words]):
        _expect(lambda: exec(code, {"__name__": "__main__", "__file__": str(ROOT / script)}))


def _expect(action: Any, *, parsers: bool = True) -> Any:
    """Run `action` up to where its last parser has taken the command line.

    Raises:
        AssertionError: it was refused, or (`parsers`) none has read it.
    """

    def parse_args(parser: argparse.ArgumentParser, *given: Any, **named: Any) -> NoReturn:
        parse(parser, *given, **named)
        raise _Parsed

    parse = argparse.ArgumentParser.parse_args
    errors, output = io.StringIO(), io.StringIO()
    patch = (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args) if parsers else contextlib.nullcontext()
    )
    try:
        with patch, contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
            result = action()
    except _Parsed:
        return None
    except SystemExit as end:
        if end.code not in (0, None):
            raise AssertionError(errors.getvalue()) from end
        return None
    assert not parsers, f"no parser has read it: {errors.getvalue()}"
    return result
