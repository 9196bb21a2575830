"""The configuration of a run as TOML: every option with the value it has and where that value comes from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath

from .options import Option
from .prompts import PromptLine, prompt_text

TRAIN_ARGS_TABLE = "train_args"


def toml_value(value: object) -> str:
    """A value as TOML. JSON's texts are TOML's but for U+007F (`toml` writes backslashes and control codes wrongly).

    Raises:
        TypeError: TOML has no such value.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if isinstance(value, PromptLine):
        value = prompt_text(value)
    if isinstance(value, (str, PurePath)):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    raise TypeError(f"no TOML for {value!r}")


def toml_document(document: Mapping[str, object], name: str = "") -> Iterator[str]:
    """The lines of a document: values first, then tables and arrays of tables."""
    for key, value in document.items():
        if not _is_table(value) and not _is_array_of_tables(value):
            yield f"{key} = {toml_value(value)}"
    for key, value in document.items():
        path = f"{name}.{key}" if name else key
        if _is_table(value):
            yield from ("", f"[{path}]", *toml_document(value, path))  # type: ignore[arg-type]
        elif _is_array_of_tables(value):
            for item in value:  # type: ignore[attr-defined]
                yield from ("", f"[[{path}]]", *toml_document(item, path))


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_array_of_tables(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_table(item) for item in value)


def argument(name: str, value: object) -> str:
    """`key=value` as the lists network_args and optimizer_args hold it."""
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        plain = not any(set(item) & set(",\"'[]()\\ ") for item in value)
        text = ",".join(value) if plain else f"[{', '.join(_quoted(item) for item in value)}]"
    elif isinstance(value, (list, tuple)):
        text = f"({','.join(str(item) for item in value)})"
    else:
        text = str(value)
    return f"{name}={text}"


def _quoted(text: str) -> str:
    mark = "'" if '"' in text else '"'
    return mark + text.replace("\\", "\\\\") + mark


Line = tuple[Option, object, str]
"""An option, its value, and where that comes from."""


def option_lines(lines: Iterable[Line]) -> Iterator[str]:
    """One table's TOML lines; options of a `key=value` list stand in it, in the place of the first of them."""
    lines = list(lines)
    lists: dict[str, list[Line]] = {}
    for line in lines:
        lists.setdefault(line[0].rules.inside or "", []).append(line)
    for option, value, origin in lines:
        inside = option.rules.inside
        if inside is None:
            if option.rules.secret and value is not None:
                yield f"# {option.name}: {origin}, and not written here"
                continue
            is_set = value is not None
            yield f"{option.name} = {toml_value(value)}  # {origin}" if is_set else f"# {option.name}: not set"
        elif lists[inside][0][0] is option:
            yield f"{inside} = ["
            for inner, item, came in lists[inside]:
                is_set = item not in (None, ())
                text = f"{toml_value(argument(inner.name, item))},  # {came}"
                yield f"    {text}" if is_set else f"    # {inner.name}: not set"
            yield "]"


def resolved_text(
    heading: Sequence[str],
    groups: Iterable[tuple[str, Iterable[Line]]],
    datasets: Iterable[tuple[Iterable[Line], Iterable[Iterable[Line]]]],
) -> str:
    """The whole configuration as TOML, with origins as comments. `--config_file` takes it as it is.

    Args:
        heading: lines of comment for the top.
        groups: titles and options of the train args.
        datasets: for each dataset its own options and those of each of its subsets.
    """
    text = [*(f"# {line}" for line in heading), "", f"[{TRAIN_ARGS_TABLE}]"]
    for title, lines in groups:
        text += ["", f"# {title}", *option_lines(lines)]
    for lines, subsets in datasets:
        text += ["", "[[datasets]]", *option_lines(lines)]
        for subset in subsets:
            text += ["", "[[datasets.subsets]]", *option_lines(subset)]
    return "\n".join(text) + "\n"


def compact(lines: Iterable[Line]) -> dict[str, object]:
    """What differs from the defaults, for an adapter's metadata; of a path only the name, the rest is private."""
    return {
        option.name: _public(option, value)
        for option, value, _ in lines
        if value != option.default and not option.rules.secret
    }


def _public(option: Option, value: object) -> object:
    if isinstance(value, tuple):
        return [prompt_text(item) if isinstance(item, PromptLine) else item for item in value]
    if option.rules.is_path or isinstance(value, PurePath):
        return str(value).replace("\\", "/").rstrip("/").rpartition("/")[2]
    return value
