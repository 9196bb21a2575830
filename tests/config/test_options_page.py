"""The options pages say what the options are, in both languages."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from anima_peft.config.options import options_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_options_page", ROOT / "tools" / "write_options_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("index", [0, 1], ids=["english", "chinese"])
def test_the_page_is_current(tool: ModuleType, index: int) -> None:
    """If this fails: python tools/write_options_page.py"""
    language = tool.languages()[index]
    assert tool.page(language) == (ROOT / "docs" / language.page).read_text(encoding="utf-8")


def test_every_option_has_a_chinese_text_and_none_is_left_over(tool: ModuleType) -> None:
    texts = tomllib.loads((ROOT / "docs" / "options.zh-CN.toml").read_text(encoding="utf-8"))
    names = [option.name for cls in tool.TABLES for option in options_of(cls)]
    assert len(names) == len(set(names))
    assert set(names) - texts["options"].keys() == set()
    assert texts["options"].keys() - set(names) == set()
    assert texts["tables"].keys() == {cls.__name__ for cls in tool.TABLES}
    assert {option.kind.name for cls in tool.TABLES for option in options_of(cls)} <= texts["kinds"].keys()
    assert texts["words"].keys() == tool.languages()[0].words.keys()
    assert all(
        re.search("[\u4e00-\u9fff]", text) for table in texts.values() for text in table.values() if "true" not in text
    )


def test_every_option_is_in_the_tables(tool: ModuleType) -> None:
    for language in tool.languages():
        rows = [line for line in tool.tables(language) if line.startswith("| `")]
        assert len(rows) == sum(len(options_of(cls)) for cls in tool.TABLES) > 80
        for cls in tool.TABLES:
            for option in options_of(cls):
                (row,) = [row for row in rows if row.startswith(f"| `{option.name}`")]
                assert language.helps[option.name].replace("|", "\\|") in row
                assert all(f"`{alias}`" in row for alias in option.rules.aliases)
                assert all(f"`{needs.option}`" in row for needs in option.rules.only_with)
