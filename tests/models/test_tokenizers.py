"""The two tokenizers: which folders are enough, and which are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Tokenizer, T5TokenizerFast

from anima_peft.errors import InputError
from anima_peft.miniature import MiniatureFiles, scenes
from anima_peft.models.tokenizers import load_qwen_tokenizer, load_t5_tokenizer

Change = Callable[[Path], Any]
TEXT = "two red circles, grey background"


@pytest.fixture
def folders(miniature: MiniatureFiles, tmp_path: Path) -> dict[str, Path]:
    """Copies of the miniature's tokenizers, to be changed."""
    return {
        "qwen": Path(shutil.copytree(miniature.tokenizer, tmp_path / "qwen")),
        "t5": Path(shutil.copytree(miniature.t5_tokenizer, tmp_path / "t5")),
    }


def keep_only(*names: str) -> Change:
    return lambda folder: [file.unlink() for file in folder.iterdir() if file.name not in names]


def write(name: str, content: str | bytes, *, alone: bool = False) -> Change:
    def change(folder: Path) -> None:
        if alone:
            keep_only()(folder)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def vocabulary_and_merges(folder: Path) -> None:
    """The old layout of a byte-level BPE: `vocab.json` and `merges.txt`."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    keep_only()(folder)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")


def left_padding(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change", [lambda _: None, keep_only("tokenizer.json"), vocabulary_and_merges, left_padding])
def test_folders_that_are_enough_for_qwen(folders: dict[str, Path], change: Change) -> None:
    expected = Qwen2Tokenizer.from_pretrained(folders["qwen"])(TEXT).input_ids
    change(folders["qwen"])
    tokenizer = load_qwen_tokenizer(folders["qwen"])
    assert tokenizer(TEXT).input_ids == expected
    assert tokenizer.padding_side == "right"
    assert "".join(tokenizer.convert_ids_to_tokens(expected)).replace("Ġ", " ") == TEXT


@pytest.mark.parametrize("change", [lambda _: None, keep_only("tokenizer.json"), left_padding])
def test_folders_that_are_enough_for_t5(folders: dict[str, Path], change: Change) -> None:
    expected = T5TokenizerFast.from_pretrained(folders["t5"])(TEXT).input_ids
    change(folders["t5"])
    tokenizer = load_t5_tokenizer(folders["t5"])
    assert tokenizer(TEXT).input_ids == expected
    assert tokenizer.padding_side == "right"
    assert expected[-1] == tokenizer.eos_token_id != tokenizer.unk_token_id
    assert tokenizer.unk_token_id not in expected


def test_t5_from_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(scene.caption for scene in scenes()))
    (tmp_path / "t5").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "t5" / "spiece"),
        model_type="unigram",
        vocab_size=64,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    keep_only("spiece.model")(tmp_path / "t5")
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t5" / "spiece.model"))
    tokenizer = load_t5_tokenizer(tmp_path / "t5")
    assert tokenizer(TEXT).input_ids == [*original.encode(TEXT), tokenizer.eos_token_id]
    assert len(original.encode(TEXT)) > 1


LOADERS = {"qwen": load_qwen_tokenizer, "t5": load_t5_tokenizer}
FAULTS: list[tuple[str, str, Change, str]] = [
    ("qwen", "empty folder", keep_only(), "no Qwen tokenizer.*Qwen/Qwen3-0.6B-Base.*qwen_tokenizer_dir"),
    ("t5", "empty folder", keep_only(), "no T5 tokenizer.*nvidia/Cosmos-Predict2-2B.*t5_tokenizer_dir"),
    ("qwen", "config alone", keep_only("tokenizer_config.json"), "no Qwen tokenizer"),
    ("t5", "config alone", keep_only("tokenizer_config.json"), "no T5 tokenizer"),
    ("qwen", "no merges", write("vocab.json", "{}", alone=True), "no Qwen tokenizer"),
    ("qwen", "no folder", shutil.rmtree, "no such folder; `qwen_tokenizer_dir`"),
    ("t5", "no folder", shutil.rmtree, "no such folder; `t5_tokenizer_dir`"),
    ("qwen", "cut file", write("tokenizer.json", "{"), "cannot be read"),
    ("t5", "cut file", write("tokenizer.json", "{"), "cannot be read"),
    ("qwen", "no tokens", write("tokenizer.json", "{}"), "cannot be read"),
    ("t5", "no tokens", write("tokenizer.json", "{}"), "cannot be read"),
    ("qwen", "not a table", write("tokenizer.json", "[]"), "cannot be read"),
    ("t5", "cut config", write("tokenizer_config.json", "{"), "cannot be read"),
    ("t5", "no SentencePiece", write("spiece.model", b"abc", alone=True), "cannot be read"),
    (
        "qwen",
        "unreadable vocabulary",
        lambda folder: (write("vocab.json", "?", alone=True)(folder), write("merges.txt", "?")(folder)),
        "cannot be read",
    ),
    (
        "qwen",
        "empty vocabulary",
        lambda folder: (write("vocab.json", "{}", alone=True)(folder), write("merges.txt", "")(folder)),
        "vocabulary is empty",
    ),
]


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [pytest.param(which, change, message, id=f"{which}: {name}") for which, name, change, message in FAULTS],
)
def test_incomplete_folders_are_refused_by_name(
    folders: dict[str, Path], which: str, change: Change, message: str
) -> None:
    change(folders[which])
    with pytest.raises(InputError, match=message) as error:
        LOADERS[which](folders[which])
    assert str(folders[which]) in str(error.value)


@pytest.mark.parametrize(("which", "other"), [("qwen", "t5"), ("t5", "qwen")])
def test_the_other_models_tokenizer_is_refused(folders: dict[str, Path], which: str, other: str) -> None:
    with pytest.raises(InputError, match="belongs to another model"):
        LOADERS[which](folders[other])
