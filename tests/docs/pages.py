"""The READMEs and docs/*.md as tests see them: blocks of code, what stands before them, headings and links.

How a page says what becomes of a block of code (an HTML comment on the line directly before it):

- nothing: Python is executed, shell lines are held against the commands' own parsers, TOML is loaded as train args or a
  dataset (tests/config/test_shipped.py), JSON is parsed, `text` is left alone;
- `<!-- run -->`: a shell block of `anima-peft` lines is executed, in order with the page's Python;
- `<!-- needs: real weights -->` (or a GPU, the network, …): not executed. Python must still compile and import only
  what the package has, and `anima-peft` lines must still parse.

Executed blocks share one namespace a page, and a working folder of their own: see `tests/docs/conftest.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")])
CHINESE = ".zh-CN.md"

_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[\w+-]*) *$")
_COMMENT = re.compile(r"^<!-- *(?P<text>.*?) *-->$")
_HEADING = re.compile(r"^(#{1,6}) +(.+?) *#*$")
_LINK = re.compile(r"!?\[(?:[^][]|\[[^][]*\])*\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)")


@dataclass(frozen=True)
class Block:
    """One fenced block of code.

    Attributes:
        page: path below the repository's root.
        line: number of its first line of code, from 1.
        language: what stands behind the fence.
        code: its text, with the fence's own indent taken off.
        needs: what it cannot be executed without here, by the comment before it; or "".
        runs: whether a shell block is to be executed.
        faulty_comment: a comment before it that is neither.
    """

    page: str
    line: int
    language: str
    code: str
    needs: str
    runs: bool
    faulty_comment: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def english_of(page: Path) -> Path:
    return page.with_name(page.name.removesuffix(CHINESE) + ".md") if page.name.endswith(CHINESE) else page


def chinese_of(page: Path) -> Path:
    return page.with_name(page.name.removesuffix(".md") + CHINESE)


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page.

    Raises:
        ValueError: a fence is not closed.
    """
    found = []
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        number += 1
        if fence is None:
            continue
        start = number
        end = fence["indent"] + fence["ticks"]
        while number < len(lines) and lines[number].rstrip() != end:
            number += 1
        if number == len(lines):
            raise ValueError(f"{relative(page)}:{start}: this block of code is never closed")
        comment = _COMMENT.match(lines[start - 2].strip()) if start >= 2 else None
        text = comment["text"] if comment else ""
        needs = text.removeprefix("needs:").strip() if text.startswith("needs:") else ""
        indent = len(fence["indent"])
        code = "".join(line[indent:] + "\n" for line in lines[start:number])
        faulty = text if text not in ("", "run") and not needs and not text.startswith(("tables:", "end of")) else ""
        found.append(Block(relative(page), start + 1, fence["language"], code, needs, text == "run", faulty))
        number += 1
    return found


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Number and text of the lines outside of blocks of code, with code within a line blanked out."""
    inside = ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = _FENCE.match(line)
        if inside:
            inside = "" if line.strip() == inside else inside
        elif fence is not None:
            inside = fence["ticks"]
        else:
            yield number, line


def headings(page: Path) -> list[tuple[int, int, str]]:
    """Line, depth and text of every heading."""
    matches = ((number, _HEADING.match(line)) for number, line in prose(page))
    return [(number, len(match[1]), match[2]) for number, match in matches if match is not None]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page (github-slugger's rule)."""
    found: set[str] = set()
    for _, _, text in headings(page):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).lower()
        slug = re.sub(r"[^\w\- ]", "", plain.replace("`", "")).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


def links(page: Path) -> list[tuple[int, str]]:
    """Line and target of every link and picture."""
    return [(n, target) for n, line in prose(page) for target in _LINK.findall(re.sub(r"`[^`]*`", "`", line))]
