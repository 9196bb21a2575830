"""Effects of the options that say where tokenizers are fetched."""

from __future__ import annotations

from collections.abc import Callable

from .bench import Built, Effect


def fetched(name: str) -> Callable[[Built], object]:
    """The folders on hubs that a tokenizer may come from: repo, revision, folder."""

    def observe(built: Built) -> list[tuple[str, str | None, str]]:
        folders = built.seen.located[f"{name}_tokenizer_sources"]
        return [(folder.repo_id, folder.revision, folder.subfolder) for folder in folders]

    return observe


QWEN = [("Qwen/Qwen3-0.6B-Base", None, ""), ("Qwen/Qwen3-0.6B-Base", "master", "")]
T5 = [
    ("nvidia/Cosmos-Predict2-2B-Text2Image", None, "tokenizer"),
    ("nv-community/Cosmos-Predict2-2B-Text2Image", "master", "tokenizer"),
]

EFFECTS = {
    "auto_download_qwen_tokenizer": Effect(("--no-auto_download_qwen_tokenizer",), fetched("qwen"), QWEN, []),
    "qwen_tokenizer_repo_id": Effect(
        ("--qwen_tokenizer_repo_id", "me/mine"), fetched("qwen"), QWEN, [("me/mine", None, ""), QWEN[1]]
    ),
    "qwen_tokenizer_modelscope_fallback": Effect(
        ("--no-qwen_tokenizer_modelscope_fallback",), fetched("qwen"), QWEN, QWEN[:1]
    ),
    "qwen_tokenizer_modelscope_repo_id": Effect(
        ("--qwen_tokenizer_modelscope_repo_id", "me/mine"), fetched("qwen"), QWEN, [QWEN[0], ("me/mine", "master", "")]
    ),
    "auto_download_t5_tokenizer": Effect(("--no-auto_download_t5_tokenizer",), fetched("t5"), T5, []),
    "t5_tokenizer_repo_id": Effect(
        ("--t5_tokenizer_repo_id", "me/mine"), fetched("t5"), T5, [("me/mine", None, "tokenizer"), T5[1]]
    ),
    "t5_tokenizer_subfolder": Effect(
        ("--t5_tokenizer_subfolder", "x"), fetched("t5"), T5, [(T5[0][0], None, "x"), T5[1]]
    ),
    "t5_tokenizer_modelscope_fallback": Effect(("--no-t5_tokenizer_modelscope_fallback",), fetched("t5"), T5, T5[:1]),
    "t5_tokenizer_modelscope_repo_id": Effect(
        ("--t5_tokenizer_modelscope_repo_id", "me/mine"),
        fetched("t5"),
        T5,
        [T5[0], ("me/mine", "master", "tokenizer")],
    ),
    "t5_tokenizer_modelscope_revision": Effect(
        ("--t5_tokenizer_modelscope_revision", "v1"), fetched("t5"), T5, [T5[0], (T5[1][0], "v1", "tokenizer")]
    ),
    "t5_tokenizer_modelscope_subfolder": Effect(
        ("--t5_tokenizer_modelscope_subfolder", "x"), fetched("t5"), T5, [T5[0], (T5[1][0], "master", "x")]
    ),
}
