"""Tokenizers' folders that lie: refused by name, and nothing outside of them is opened."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anima_peft.errors import InputError
from anima_peft.miniature import MiniatureFiles
from anima_peft.models.tokenizers import QWEN, T5, load_tokenizer

# file of the tokenizer's folder, its content, and words of the fault
TOKENIZERS: dict[str, tuple[str, bytes, str]] = {
    "empty": ("tokenizer.json", b"", "the tokenizer's files cannot be read"),
    "garbage": ("tokenizer.json", bytes(range(256)), "the tokenizer's files cannot be read"),
    "deep": ("tokenizer.json", b'{"a":' * 100_000, "the tokenizer's files cannot be read"),
    "a list": ("tokenizer.json", b"[]", "the tokenizer's files cannot be read"),
    "a page": ("tokenizer.json", b"<!DOCTYPE html>", "the tokenizer's files cannot be read"),
    "another kind": ("tokenizer.json", b'{"model": {"type": "WordPiece"}}', "a tokenizer of kind WordPiece, expected"),
    "deep settings": ("tokenizer_config.json", b'{"a":' * 100_000, "the tokenizer's files cannot be read"),
    "settings in a list": ("tokenizer_config.json", b"[]", "the tokenizer's files cannot be read"),
    "a length in words": (
        "tokenizer_config.json",
        b'{"model_max_length": "a"}',
        "a model_max_length that is no number",
    ),
}


@pytest.mark.parametrize("kind", [QWEN, T5], ids=["Qwen", "T5"])
@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers_that_are_refused(case: str, kind: Any, miniature: MiniatureFiles, tmp_path: Path) -> None:
    name, content, words = TOKENIZERS[case]
    folder = tmp_path / "分词器"
    shutil.copytree(miniature.tokenizer if kind is QWEN else miniature.t5_tokenizer, folder)
    (folder / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        load_tokenizer(kind, folder)
    assert str(error.value).startswith(f"{folder}: ")
    assert words in str(error.value)


@pytest.fixture(scope="module")
def files_opened() -> Iterator[list[str]]:
    """Every file that Python opens, by an audit hook, which cannot be taken out but does nothing later."""
    import sys

    found: list[str] = []
    state = {"on": True}

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if state["on"] and event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            found.append(os.fspath(arguments[0]))

    sys.addaudithook(note)
    yield found
    state["on"] = False


@pytest.mark.parametrize("kind", [QWEN, T5], ids=["Qwen", "T5"])
def test_a_tokenizers_settings_lead_nowhere(
    kind: Any, miniature: MiniatureFiles, tmp_path: Path, files_opened: list[str]
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(miniature.tokenizer if kind is QWEN else miniature.t5_tokenizer, folder)
    secret = tmp_path / "secret"
    secret.write_text("{}")
    names = ("vocab_file", "tokenizer_file", "merges_file", "spiece_file", "name_or_path", "chat_template_file")
    settings = dict.fromkeys(names, str(secret)) | {"auto_map": {"AutoTokenizer": [f"{secret}--x.Y", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    files_opened.clear()
    load_tokenizer(kind, folder)
    assert any(str(folder) in name for name in files_opened)
    assert str(secret) not in files_opened
