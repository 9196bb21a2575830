"""Where missing tokenizers are fetched from."""

from __future__ import annotations

from typing import Any

import pytest

from anima_peft.errors import InputError

from .conftest import faults_of

NO_DOWNLOADS = {"auto_download_qwen_tokenizer": False, "auto_download_t5_tokenizer": False}


def test_tokenizers_that_can_be_fetched_need_not_be_named(load_with) -> None:
    single = {"anima_transformer": "anima.safetensors", "qwen": "qwen.safetensors", "vae": "vae.safetensors"}
    model = load_with(single).train.model
    assert [str(source) for source in model.t5_tokenizer_sources] == [
        "Hugging Face (https://huggingface.co/nvidia/Cosmos-Predict2-2B-Text2Image/tree/main/tokenizer)",
        "ModelScope (https://modelscope.cn/models/nv-community/Cosmos-Predict2-2B-Text2Image/tree/master/tokenizer)",
    ]
    assert [str(source) for source in model.qwen_tokenizer_sources] == [
        "Hugging Face (https://huggingface.co/Qwen/Qwen3-0.6B-Base/tree/main)",
        "ModelScope (https://modelscope.cn/models/Qwen/Qwen3-0.6B-Base/tree/master)",
    ]
    no_fallback = load_with(single, argv=("--no-t5_tokenizer_modelscope_fallback",)).train.model
    assert no_fallback.t5_tokenizer_sources == model.t5_tokenizer_sources[:1]
    parts = {"qwen_tokenizer_dir": "q", "t5_tokenizer_dir": "t"}
    off = load_with(single | parts | NO_DOWNLOADS).train.model
    assert (off.qwen_tokenizer_sources, off.t5_tokenizer_sources) == ((), ())


LOOKALIKE = "https://huggingface.co.evil.example/a/b"
TOKEN_IN_ADDRESS = "https://user:hf_secret@huggingface.co/a/b"


@pytest.mark.parametrize(
    ("train", "faults"),
    [
        ({"t5_tokenizer_repo_id": LOOKALIKE}, ["t5_tokenizer_repo_id: expected a repo id"]),
        ({"t5_tokenizer_repo_id": TOKEN_IN_ADDRESS}, ["t5_tokenizer_repo_id: expected an address without user name"]),
        (
            {"t5_tokenizer_modelscope_repo_id": "https://hf.co/a/b"},
            ["t5_tokenizer_modelscope_repo_id: expected a repo"],
        ),
        ({"t5_tokenizer_subfolder": "../up"}, ["t5_tokenizer_subfolder: expected a folder inside the repo"]),
        (
            {"t5_tokenizer_repo_id": "https://hf.co/a/b/tree/main", "t5_tokenizer_subfolder": "t5"},
            ["t5_tokenizer_subfolder: has no effect: the address in t5_tokenizer_repo_id names a folder"],
        ),
        (
            {"auto_download_t5_tokenizer": False, "t5_tokenizer_modelscope_revision": "v1"},
            ["t5_tokenizer_modelscope_revision: has no effect with auto_download_t5_tokenizer = false"],
        ),
        (
            {"t5_tokenizer_modelscope_fallback": False, "t5_tokenizer_modelscope_revision": "v1"},
            ["t5_tokenizer_modelscope_revision: has no effect with t5_tokenizer_modelscope_fallback = false"],
        ),
    ],
)
def test_faults_in_where_tokenizers_are_fetched(load_with, train: dict[str, Any], faults: list[str]) -> None:
    with pytest.raises(InputError) as report:
        load_with(train)
    assert [fault[: len(start)] for fault, start in zip(faults_of(report.value), faults, strict=True)] == faults
    assert "secret" not in str(report.value)
