"""Every block of code in the READMEs and docs/*.md is executed, held against a parser, or marked with what it needs."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import linecache
import tomllib
import traceback
from pathlib import Path

import pytest

from anima_peft.cli import DONE, main
from tests.docs.commands import SHELLS, Unknown, check, commands
from tests.docs.pages import CHINESE, PAGES, ROOT, Block, blocks, relative

ENGLISH = [page for page in PAGES if not page.name.endswith(CHINESE)]  # the other language's blocks are the same
BLOCKS = [block for page in ENGLISH for block in blocks(page)]
LANGUAGES = {*SHELLS, "python", "toml", "json", "jsonl", "text"}


def of(*languages: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in languages], ids=str)


def test_there_are_blocks_of_every_kind() -> None:
    kinds = {block.language for block in BLOCKS}
    assert {"python", "bash", "toml"} <= kinds
    assert any(block.runs for block in BLOCKS)
    assert any(block.needs for block in BLOCKS)


def test_every_block_is_of_a_known_language_and_well_marked() -> None:
    faults = [
        f"{b}: language {b.language!r}, expected {sorted(LANGUAGES)}" for b in BLOCKS if b.language not in LANGUAGES
    ]
    faults += [
        f"{b}: the comment before it is {b.faulty_comment!r}; expected `needs: WHAT` or `run`, or a line between"
        for b in BLOCKS
        if b.faulty_comment
    ]
    faults += [f"{b}: `run` is for shell blocks" for b in BLOCKS if b.runs and b.language not in SHELLS]
    assert not faults, "\n".join(faults)


@of(*SHELLS)
def test_a_command_is_taken_by_its_parser(block: Block, workplace: Path) -> None:
    for words in commands(block.code):
        try:
            check(words, workplace)
        except Unknown:
            if not block.needs:
                pytest.fail(f"{block}: `{' '.join(words)}` is not known to tests/docs/commands.py; mark the block")
        except AssertionError as error:
            pytest.fail(f"{block}: `{' '.join(words)}` is refused:\n{error}")


def test_json_and_toml_are_well_formed() -> None:
    faults = []
    for block in BLOCKS:
        parse = tomllib.loads if block.language == "toml" else json.loads
        for text in {"toml": [block.code], "json": [block.code], "jsonl": block.code.splitlines()}.get(
            block.language, []
        ):
            try:
                parse(text)
            except ValueError as error:
                faults.append(f"{block}: {error}")
    assert not faults, "\n".join(faults)


@of("python")
def test_python_compiles_and_imports_what_is_there(block: Block) -> None:
    for node in ast.walk(ast.parse(block.code, str(block))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "anima_peft":
            module = importlib.import_module(node.module or "")
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{block}: {node.module} has no {', '.join(missing)}"


EXECUTED = [
    page
    for page in ENGLISH
    if any(not b.needs and (b.language == "python" or b.runs) for b in BLOCKS if b.page == relative(page))
]


@pytest.mark.parametrize("page", EXECUTED, ids=relative)
def test_a_page_runs_from_top_to_bottom(page: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.needs:
            continue
        if block.runs:
            for words in commands(block.code):
                assert words[0] == "anima-peft", f"{block}: only anima-peft is executed, not {words[0]}"
                assert main(words[1:]) == DONE, f"{block}: {' '.join(words)}\n{capsys.readouterr().err}"
        elif block.language == "python":
            execute(block, namespace)


def execute(block: Block, namespace: dict[str, object]) -> None:
    """Run a block; where it fails, say at which line of the page."""
    padded = "\n" * (block.line - 1) + block.code
    file = str(ROOT / block.page)
    linecache.checkcache(file)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(padded, file, "exec"), namespace)
    except Exception as error:  # noqa: BLE001 - whatever a page does wrong is told with its place
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        line = frames[-1].lineno if frames else block.line
        pytest.fail(f"{block.page}:{line}: {type(error).__name__}: {error}\n{traceback.format_exc()}")


def test_what_is_executed_is_most_of_the_recipes() -> None:
    """A page of Python whose blocks are all marked would prove nothing."""
    python = [block for block in BLOCKS if block.page == "docs/python.md" and block.language == "python"]
    assert len(python) >= 8
    assert sum(not block.needs for block in python) >= 0.8 * len(python)
