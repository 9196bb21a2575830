"""The two tokenizers. An incomplete folder is refused: transformers would build an empty vocabulary without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import Qwen2Tokenizer, T5TokenizerFast

from ..errors import InputError


def load_qwen_tokenizer(folder: str | Path) -> Qwen2Tokenizer:
    """Load Qwen's tokenizer from a folder with `tokenizer.json`, or with `vocab.json` and `merges.txt`.

    Raises:
        InputError: the folder or its files are missing or unreadable.
    """
    folder = _existing(folder, "qwen_tokenizer_dir")
    if not ((folder / "tokenizer.json").is_file() or _all_files(folder, "vocab.json", "merges.txt")):
        raise InputError(
            f"{folder}: no Qwen tokenizer. Expected `tokenizer.json`, or `vocab.json` and `merges.txt`; copy them from "
            "the hub repo Qwen/Qwen3-0.6B-Base and name their folder in `qwen_tokenizer_dir`."
        )
    return _load(Qwen2Tokenizer, folder, "BPE")


def load_t5_tokenizer(folder: str | Path) -> T5TokenizerFast:
    """Load the T5 tokenizer from a folder with `tokenizer.json` or `spiece.model`; either is enough.

    Raises:
        InputError: the folder or its files are missing or unreadable.
    """
    folder = _existing(folder, "t5_tokenizer_dir")
    if not ((folder / "tokenizer.json").is_file() or (folder / "spiece.model").is_file()):
        raise InputError(
            f"{folder}: no T5 tokenizer. Expected `tokenizer.json` or `spiece.model`; copy one from the `tokenizer` "
            "folder of the hub repo nvidia/Cosmos-Predict2-2B-Text2Image and name its folder in `t5_tokenizer_dir`."
        )
    return _load(T5TokenizerFast, folder, "Unigram")


def _existing(folder: str | Path, option: str) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; `{option}` names the tokenizer's folder.")
    return folder


def _all_files(folder: Path, *names: str) -> bool:
    return all((folder / name).is_file() for name in names)


def _load(tokenizer_class: Any, folder: Path, algorithm: str) -> Any:
    """Load, and refuse what transformers takes for a tokenizer of the class without its being one."""
    found = _algorithm(folder)
    if found not in (algorithm, None):
        raise InputError(f"{folder}: a tokenizer of kind {found}, expected {algorithm}; it belongs to another model.")
    try:
        # Right padding, whatever the folder's own config says: real rows come first in every consumer.
        tokenizer = tokenizer_class.from_pretrained(folder, local_files_only=True, padding_side="right")
    except Exception as error:  # the tokenizers library raises plain ones
        raise InputError(f"{folder}: the tokenizer's files cannot be read: {error}") from error
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
        raise InputError(f"{folder}: the tokenizer's vocabulary is empty; copy its files again.")
    return tokenizer


def _algorithm(folder: Path) -> str | None:
    """What `tokenizer.json` calls its model ("BPE", "Unigram"); None without one, or where it does not say."""
    try:
        return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["type"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
