"""Pages exist in both languages with the same shape, are in the index, and every link leads somewhere."""

from __future__ import annotations

import ast
import re
from itertools import zip_longest
from pathlib import Path
from urllib.parse import unquote

import pytest

import anima_peft
from tests.docs.pages import CHINESE, PAGES, ROOT, anchors, blocks, chinese_of, english_of, headings, links, relative

ENGLISH = [page for page in PAGES if not page.name.endswith(CHINESE)]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_it_is_there_in_both_languages(page: Path) -> None:
    other = chinese_of(page) if page in ENGLISH else english_of(page)
    assert other.is_file(), f"{relative(page)} has no {relative(other)}"


def without_comments(code: str) -> list[str]:
    """Lines of code, what stands behind a `#` left out: comments are translated."""
    return [line for raw in code.splitlines() if (line := re.sub(r"(^|\s)#.*$", "", raw).rstrip())]


@pytest.mark.parametrize("page", ENGLISH, ids=relative)
def test_both_languages_have_the_same_blocks_and_headings(page: Path) -> None:
    other = chinese_of(page)
    if not other.is_file():
        pytest.skip("reported by another test")
    for ours, theirs in zip_longest(blocks(page), blocks(other)):
        where = f"{ours or 'no block'} and {theirs or 'no block'}"
        assert ours is not None, where
        assert theirs is not None, where
        assert (ours.language, ours.runs, bool(ours.needs)) == (theirs.language, theirs.runs, bool(theirs.needs)), where
        if ours.language != "text":
            assert without_comments(ours.code) == without_comments(theirs.code), where
    depths = [[depth for _, depth, _ in headings(file)] for file in (page, other)]
    texts = [[text for _, _, text in headings(file)] for file in (page, other)]
    assert depths[0] == depths[1], f"headings of {relative(page)}: {texts[0]}\nand {relative(other)}: {texts[1]}"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_link_leads_somewhere(page: Path) -> None:
    faults = []
    for line, target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / unquote(path)).resolve() if path else page
        if not file.exists():
            faults.append(f"{relative(page)}:{line}: there is no {path}")
        elif anchor and unquote(anchor) not in anchors(file):
            faults.append(f"{relative(page)}:{line}: {relative(file)} has no #{anchor}; it has {sorted(anchors(file))}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_to_pages_stay_in_the_language(page: Path) -> None:
    """But for the one that changes it."""
    chinese = page.name.endswith(CHINESE)
    faults = []
    for line, target in links(page):
        file = (page.parent / target.partition("#")[0]).resolve()
        if file.suffix != ".md" or not file.is_file() or not chinese_of(english_of(file)).is_file():
            continue
        if file.name.endswith(CHINESE) != chinese and english_of(file) != english_of(page):
            faults.append(f"{relative(page)}:{line}: {target}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", ["README.md", f"README{CHINESE}"])
def test_the_index_names_every_page(name: str) -> None:
    index = ROOT / "docs" / name
    linked = {(index.parent / target.partition("#")[0]).resolve() for _, target in links(index)}
    chinese = name.endswith(CHINESE)
    pages = [page for page in (ROOT / "docs").glob("*.md") if page.name.endswith(CHINESE) == chinese and page != index]
    missing = [page.name for page in pages if page.resolve() not in linked]
    assert not missing, f"docs/{name} does not link to {', '.join(sorted(missing))}"


def texts_of_the_package() -> list[str]:
    """Every string in the code, adjacent ones joined, formatted ones in the parts between their values."""
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in Path(anima_peft.__path__[0]).rglob("*.py"))
    return [
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


@pytest.mark.parametrize("name", ["troubleshooting.md", f"troubleshooting{CHINESE}"])
def test_quoted_messages_are_the_programs_own(name: str) -> None:
    quoted = [block for block in blocks(ROOT / "docs" / name) if block.language == "text"]
    assert len(quoted) > 20
    known = texts_of_the_package()
    faults = [
        f"{block}: no text of the program has {part.strip()!r}"
        for block in quoted
        for part in block.code.strip().split("…")
        if not any(part.strip() in text for text in known)
    ]
    assert not faults, "\n".join(faults)
