"""Prompt lines in sd-scripts' syntax."""

from __future__ import annotations

import pytest

from anima_peft.config import PromptLine, parse_prompt_line
from anima_peft.errors import InputError


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a cat", PromptLine("a cat", "", 512, 512, None, 30, 7.5, 3.0)),
        (
            "a cat, 1girl --n blurry, low quality --w 768 --h 1024 --d 42 --s 28 --l 4.5 --fs 1",
            PromptLine("a cat, 1girl", "blurry, low quality", 768, 1024, 42, 28, 4.5, 1.0),
        ),
        ("sizes --w 100 --h 31", PromptLine("sizes", width=96, height=16)),
        ("well-known --d 0 --l 0", PromptLine("well-known", seed=0, guidance_scale=0.0)),
        ("--w 64", PromptLine("", width=64)),
        ("  一只猫   --s   8  ", PromptLine("一只猫", steps=8)),
    ],
)
def test_prompt_line(text: str, line: PromptLine) -> None:
    assert parse_prompt_line(text) == line


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "expected a prompt, got an empty line"),
        ("  \t ", "expected a prompt, got an empty line"),
        ("two\nlines", "expected one line, got a text with line breaks"),
        ("a --w", "--w: has no value"),
        ("a --w big", '--w: expected an integer from 16 to 2048, got "big"'),
        ("a --h 15", "--h: expected an integer from 16 to 2048, got 15"),
        ("a --w 64.5", '--w: expected an integer from 16 to 2048, got "64.5"'),
        ("a --d -1", "--d: expected an integer from 0 to 4294967295, got -1"),
        ("a --d 4294967296", "--d: expected an integer from 0 to 4294967295, got 4294967296"),
        ("a --s 0", "--s: expected an integer of at least 1, got 0"),
        ("a --l nan", '--l: expected a number of at least 0, got "nan"'),
        ("a --fs 0", '--fs: expected a number above 0, got "0"'),
        ("a --w 64 --w 64", "--w is given twice"),
        ("a --ss euler", "unknown --ss"),
        ("a --width 64", "unknown --width"),
        (
            "a --w 1 --s 0",
            "--w: expected an integer from 16 to 2048, got 1; --s: expected an integer of at least 1, got 0",
        ),
    ],
)
def test_faulty_prompt_line(text: str, fault: str) -> None:
    with pytest.raises(InputError) as report:
        parse_prompt_line(text)
    assert str(report.value).startswith(fault)
