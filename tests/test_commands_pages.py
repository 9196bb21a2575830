"""The pages of the commands: complete, alike in both languages, and every example parsed by the real parser."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from anima_peft_command import COMMANDS, main

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("commands.md", "commands.zh-CN.md")
OF_CONFIG = ("train", "check", "miniature", "miniature-score")
"""Their flags are read by the configuration, or need files; other tests run them."""


class _ParsedError(Exception):
    """The parser took the arguments."""


def examples(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_every_command_is_described() -> None:
    for page in PAGES:
        named = {shlex.split(line)[1] for line in examples(page)}
        assert named == set(COMMANDS)
        table = [
            row.split(" | ")[0] for row in (DOCS / page).read_text(encoding="utf-8").splitlines() if row[:3] == "| ["
        ]
        assert {name for row in table for name in re.findall(r"`([\w-]+)`", row)} == set(COMMANDS)


def test_both_languages_have_the_same_examples() -> None:
    assert examples(PAGES[0]) == examples(PAGES[1])


@pytest.mark.parametrize("line", [line for line in examples(PAGES[0]) if line.split()[1] not in OF_CONFIG])
def test_every_example_is_taken_by_the_real_parser(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = argparse.ArgumentParser.parse_args

    def parsed(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        original(self, *args, **kwargs)
        raise _ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    with pytest.raises(_ParsedError):
        main(shlex.split(line)[1:])


@pytest.mark.parametrize("command", ["merge", "extract", "resize", "share", "download", "convert", "inspect"])
def test_every_help_has_examples_that_parse(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  anima-peft ")]
    assert lines
    for line in lines:
        test_every_example_is_taken_by_the_real_parser(line, monkeypatch)
