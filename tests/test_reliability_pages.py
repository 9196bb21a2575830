"""The pages that say what a run promises name tests that exist, the same in both languages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "training"


def named(page: str) -> list[tuple[str, str]]:
    """(file, test) of every test that a page names; `::test` alone belongs to the file before it in its line."""
    found = []
    for line in (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines():
        file = ""
        for given, test in re.findall(r"`([\w./]*\.py)?(?:::(\w+))?`", line):
            file = given or file
            if file:
                found.append((file, test))
    return found


@pytest.mark.parametrize("page", ["reliability.md", "reliability.zh-CN.md"])
def test_every_test_that_is_named_exists(page: str) -> None:
    tests = named(page)
    assert len(tests) > 30
    for file, test in tests:
        text = (TESTS / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in text, f"{file}::{test}"


def test_both_languages_name_the_same_tests() -> None:
    assert named("reliability.md") == named("reliability.zh-CN.md")
