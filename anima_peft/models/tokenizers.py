"""The two tokenizers. An incomplete folder is refused: transformers would build an empty vocabulary without a word."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Qwen2Tokenizer, T5TokenizerFast

from ..errors import InputError
from ..limited import read_json
from .hub_folders import QWEN_REPO, T5_MODELSCOPE_REPO, T5_REPO, T5_SUBFOLDER, HubFolder, download_order


@dataclass(frozen=True)
class TokenizerKind:
    """What is known of a tokenizer before its files are read.

    Attributes:
        name: its name in messages.
        option: the option that names its folder.
        stock: transformers' class.
        algorithm: what `tokenizer.json` calls its model.
        enough: groups of files; a folder with all files of any group is complete.
        files: all files that belong to it, those that make a folder complete last.
        sources: where it is published, in the order in which it is fetched from there.
    """

    name: str
    option: str
    stock: Any
    algorithm: str
    enough: tuple[tuple[str, ...], ...]
    files: tuple[str, ...]
    sources: tuple[HubFolder, ...]

    @property
    def needed(self) -> str:
        """The files that make a folder complete, for messages."""
        groups = [" and ".join(f"`{name}`" for name in group) for group in self.enough]
        return f"{groups[0]}, or {groups[1]}"

    def complete_with(self, names: Collection[str]) -> bool:
        """Whether files of these names are enough."""
        return any(set(group) <= set(names) for group in self.enough)

    def complete_in(self, folder: Path) -> bool:
        """Whether the folder is there and has files enough; they are not read."""
        return self.complete_with([name for name in self.files if (folder / name).is_file()])


_SETTINGS = ("config.json", "tokenizer_config.json", "special_tokens_map.json")

QWEN = TokenizerKind(
    "Qwen",
    "qwen_tokenizer_dir",
    Qwen2Tokenizer,
    "BPE",
    (("tokenizer.json",), ("vocab.json", "merges.txt")),
    (*_SETTINGS, "merges.txt", "vocab.json", "tokenizer.json"),
    download_order(QWEN_REPO, modelscope_repo_id=QWEN_REPO),
)
T5 = TokenizerKind(
    "T5",
    "t5_tokenizer_dir",
    T5TokenizerFast,
    "Unigram",
    (("tokenizer.json",), ("spiece.model",)),
    (*_SETTINGS, "spiece.model", "tokenizer.json"),
    download_order(T5_REPO, T5_SUBFOLDER, modelscope_repo_id=T5_MODELSCOPE_REPO, modelscope_subfolder=T5_SUBFOLDER),
)


def load_qwen_tokenizer(folder: str | Path) -> Qwen2Tokenizer:
    """Load Qwen's tokenizer from a folder with `tokenizer.json`, or with `vocab.json` and `merges.txt`.

    Raises:
        InputError: the folder or its files are missing or unreadable.
    """
    return load_tokenizer(QWEN, folder)


def load_t5_tokenizer(folder: str | Path) -> T5TokenizerFast:
    """Load the T5 tokenizer from a folder with `tokenizer.json` or `spiece.model`; either is enough.

    Raises:
        InputError: the folder or its files are missing or unreadable.
    """
    return load_tokenizer(T5, folder)


def load_tokenizer(kind: TokenizerKind, folder: str | Path) -> Any:
    """Load, and refuse what transformers takes for a tokenizer of the kind without its being one.

    Raises:
        InputError: the folder or its files are missing or unreadable, or belong to another model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; `{kind.option}` names the tokenizer's folder.")
    if not kind.complete_in(folder):
        raise InputError(
            f"{folder}: no {kind.name} tokenizer. Expected {kind.needed}; copy them from {kind.sources[0].page} and "
            f"name their folder in `{kind.option}`."
        )
    found = _algorithm(folder)
    if found not in (kind.algorithm, None):
        raise InputError(
            f"{folder}: a tokenizer of kind {found}, expected {kind.algorithm}; it belongs to another model."
        )
    try:
        # Right padding, whatever the folder's own config says: real rows come first in every consumer.
        tokenizer = kind.stock.from_pretrained(folder, local_files_only=True, padding_side="right")
    except Exception as error:  # the tokenizers library raises plain ones
        raise InputError(f"{folder}: the tokenizer's files cannot be read: {error}") from error
    if not isinstance(tokenizer.model_max_length, (int, float)):
        raise InputError(f"{folder}: tokenizer_config.json has a model_max_length that is no number.")
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
        raise InputError(f"{folder}: the tokenizer's vocabulary is empty; copy its files again.")
    return tokenizer


def _algorithm(folder: Path) -> str | None:
    """What `tokenizer.json` calls its model ("BPE", "Unigram"); None without one, or where it does not say."""
    try:
        return read_json(folder / "tokenizer.json")["model"]["type"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
