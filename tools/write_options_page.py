"""Write the tables of docs/options.md and docs/options.zh-CN.md from the options themselves.

python tools/write_options_page.py

The text around the tables is written by hand; the Chinese texts are in docs/options.zh-CN.toml, by option name.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from anima_peft.config.command_line import FileOptions
from anima_peft.config.dataset_options import BatchKeys, DatasetKeys, PlaceKeys, SubsetKeys
from anima_peft.config.loading import GROUPS
from anima_peft.config.options import Kind, Needs, Option, options_of
from anima_peft.config.reading import shown

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- tables: written by tools/write_options_page.py -->", "<!-- end of tables -->"
TABLES = (FileOptions, *GROUPS.values(), DatasetKeys, BatchKeys, SubsetKeys, PlaceKeys)

_KINDS = {kind.name: kind.value.removeprefix("an ").removeprefix("a ") for kind in Kind}


@dataclass(frozen=True)
class Language:
    """The words of a page.

    Attributes:
        page: name of the file in docs/.
        words: of the tables.
        kinds: of values, by the kind's name.
        titles: of the tables, by class name.
        helps: by option name.
    """

    page: str
    words: Mapping[str, str]
    kinds: Mapping[str, str]
    titles: Mapping[str, str] = field(default_factory=dict)
    helps: Mapping[str, str] = field(default_factory=dict)


def languages() -> tuple[Language, Language]:
    """English, from the options, and Chinese, from its file."""
    english = Language(
        "options.md",
        {
            "option": "Option",
            "value": "Value",
            "default": "Default",
            "help": "What it does",
            "required": "required",
            "inside": "in `{list}`",
            "also": "also `{names}`",
            "equals": "Only with {option} = {values}.",
            "set": "Only with {option}.",
            "unset": "Not with {option}.",
            "differs": "Not with {option} = {values}.",
            "or": " or ",
        },
        _KINDS,
        {cls.__name__: (cls.__doc__ or "").rstrip(".") for cls in TABLES},
        {option.name: option.rules.help for cls in TABLES for option in options_of(cls)},
    )
    chinese = tomllib.loads((DOCS / "options.zh-CN.toml").read_text(encoding="utf-8"))
    return english, Language(
        "options.zh-CN.md", chinese["words"], chinese["kinds"], chinese["tables"], chinese["options"]
    )


def tables(language: Language) -> Iterator[str]:
    """The lines of all tables."""
    words = language.words
    for cls in TABLES:
        yield from ("", f"## {language.titles[cls.__name__]}", "")
        yield f"| {words['option']} | {words['value']} | {words['default']} | {words['help']} |"
        yield "| --- | --- | --- | --- |"
        for option in options_of(cls):
            cells = _name(option, words), _value(option, language), _default(option, words), _help(option, language)
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _name(option: Option, words: Mapping[str, str]) -> str:
    notes = []
    if option.rules.inside:
        notes.append(words["inside"].format(list=option.rules.inside))
    if option.rules.aliases:
        notes.append(words["also"].format(names="`, `".join(option.rules.aliases)))
    return f"`{option.name}`" + (f" ({', '.join(notes)})" if notes else "")


def _value(option: Option, language: Language) -> str:
    rules = option.rules
    if rules.choices:
        return ", ".join(f"`{choice}`" for choice in rules.choices)
    bounds = {"≥": rules.minimum, ">": rules.above, "≤": rules.maximum, "<": rules.below}
    limits = [f"{sign} {bound}" for sign, bound in bounds.items() if bound is not None]
    return f"{language.kinds[option.kind.name]} {', '.join(limits)}".strip()


def _default(option: Option, words: Mapping[str, str]) -> str:
    if option.required:
        return words["required"]
    return "" if option.default in (None, ()) else f"`{shown(option.default)}`"


def _help(option: Option, language: Language) -> str:
    conditions = (_condition(needs, language.words) for needs in option.rules.only_with)
    return " ".join([language.helps[option.name], *conditions])


def _condition(needs: Needs, words: Mapping[str, str]) -> str:
    option = f"`{needs.option}`"
    if needs.values == (None,) or needs.unless == (None,):
        return (words["set"] if needs.unless else words["unset"]).format(option=option)
    text = words["equals"] if needs.values else words["differs"]
    listed = [f"`{shown(value)}`" for value in needs.values or needs.unless if value is not None]
    return text.format(option=option, values=words["or"].join(listed))


def page(language: Language) -> str:
    """The whole page with fresh tables."""
    text = (DOCS / language.page).read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"{language.page}: no {BEGIN}"
    assert end, f"{language.page}: no {END}"
    return "\n".join([before + begin, *tables(language), "", end + after])


if __name__ == "__main__":
    for language in languages():
        (DOCS / language.page).write_text(page(language), encoding="utf-8", newline="\n")
        print(DOCS / language.page, file=sys.stderr)
