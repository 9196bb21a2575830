"""What names a folder on a hub, and what is refused."""

from __future__ import annotations

import pytest

from anima_peft.errors import InputError
from anima_peft.models.hub_folders import Hub, HubFolder, download_order, parse_hub_folder

HF, MS = Hub.HUGGING_FACE, Hub.MODELSCOPE
HF_URL, MS_URL = "https://huggingface.co/", "https://www.modelscope.cn/models/"

FORMS = {
    "o/r": HubFolder(HF, "o/r", None, "default"),
    HF_URL + "o/r": HubFolder(HF, "o/r", None, "default"),
    HF_URL + "o/r/": HubFolder(HF, "o/r", None, "default"),
    "http://hf.co/o/r": HubFolder(HF, "o/r", None, "default"),
    "https://HuggingFace.co/o/r": HubFolder(HF, "o/r", None, "default"),
    HF_URL + "o/r/tree/main": HubFolder(HF, "o/r", "main", ""),
    HF_URL + "o/r/tree/main/a/b": HubFolder(HF, "o/r", "main", "a/b"),
    HF_URL + "o/r/tree/refs%2Fpr%2F1/a": HubFolder(HF, "o/r", "refs/pr/1", "a"),
    HF_URL + "o/r/tree/main/a%20b": HubFolder(HF, "o/r", "main", "a b"),
    HF_URL + "o/r/blob/v1/tokenizer/spiece.model": HubFolder(HF, "o/r", "v1", "tokenizer"),
    HF_URL + "o/r/resolve/v1/tokenizer.json?download=true": HubFolder(HF, "o/r", "v1", ""),
    HF_URL + "o/r/resolve/v1/tokenizer": HubFolder(HF, "o/r", "v1", "tokenizer"),
    MS_URL + "o/r": HubFolder(MS, "o/r", None, "default"),
    "https://modelscope.cn/models/o/r/files": HubFolder(MS, "o/r", None, "default"),
    MS_URL + "o/r/summary": HubFolder(MS, "o/r", None, "default"),
    MS_URL + "o/r/tree/master/a": HubFolder(MS, "o/r", "master", "a"),
    MS_URL + "o/r/resolve/master/a/vocab.json": HubFolder(MS, "o/r", "master", "a"),
    "https://modelscope.cn/api/v1/models/o/r/repo?Revision=v2&FilePath=a/spiece.model": HubFolder(MS, "o/r", "v2", "a"),
    "https://modelscope.cn/api/v1/models/o/r/repo?Revision=v2&FilePath=a%2Fmerges.txt": HubFolder(MS, "o/r", "v2", "a"),
    MS_URL + "o/r?FilePath=a": HubFolder(MS, "o/r", "master", "a"),
}


@pytest.mark.parametrize("text", FORMS)
def test_forms(text: str) -> None:
    folder = parse_hub_folder(text, subfolder="default")
    assert folder == FORMS[text]
    assert folder.names_folder == (folder.subfolder != "default")


@pytest.mark.parametrize("text", [text for text, folder in FORMS.items() if folder.subfolder != "default"])
def test_the_page_of_a_folder_names_the_same_folder(text: str) -> None:
    folder = parse_hub_folder(text)
    assert parse_hub_folder(folder.page) == folder


LOOKALIKES = [
    "https://huggingface.co.example.com/o/r",
    "https://huggingface.com/o/r",
    "https://xhuggingface.co/o/r",
    "https://www.huggingface.co/o/r",
    "https://huggingface.co:8443/o/r",
    "https://huggingface.co./o/r",
    "https://hf.co.example.com/o/r",
    "https://hugging\u0455ace.co/o/r",
    "https://modelscope.cn.example.com/models/o/r",
    "https://evil.modelscope.cn/models/o/r",
    "https://modelscope.com/models/o/r",
    "https://example.com/huggingface.co/o/r",
    "https://example.com\\@huggingface.co/o/r",
    "https://huggingface.co@example.com/o/r",
    "https://huggingface.co#@example.com/o/r",
    "ftp://huggingface.co/o/r",
    "file:///huggingface.co/o/r",
    "hf://o/r",
]
OTHERS = [
    "",
    "r",
    "a/b/c",
    "huggingface.co/o/r",
    "./o/r",
    "o/anima.safetensors",
    HF_URL,
    HF_URL + "r",
    HF_URL + "datasets/o/r",
    HF_URL + "spaces/o",
    HF_URL + "o/r/discussions/1",
    HF_URL + "o/r/tree",
    HF_URL + "o/r/tree/main/../../x",
    HF_URL + "o/r/tree/main/%2e%2e/x",
    HF_URL + "o/r/tree/main/a%5Cb",
    HF_URL + "o/r?revision=main",
    "https://modelscope.cn/o/r",
    "https://modelscope.cn/datasets/o/r",
    MS_URL + "o/r/feedback",
    MS_URL + "o/r?FilePath=../x",
    "https://[/o/r",
]


@pytest.mark.parametrize("text", LOOKALIKES + OTHERS)
def test_other_hosts_and_forms_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected"):
        parse_hub_folder(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://user:hf_secret@huggingface.co/o/r",
        "https://oauth2:hf_secret@www.modelscope.cn/models/o/r",
        "https://hf_secret@example.com/o/r",
        "user:hf_secret@huggingface.co/o/r",
        HF_URL + "o/r?token=hf_secret",
        HF_URL + "o/r/x#hf_secret",
    ],
)
def test_secrets_in_addresses_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(InputError) as error:
        parse_hub_folder(text)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("subfolder", ["..", "../x", "a/../b", "a//b", ".", "a\\b"])
def test_a_folder_outside_the_repo_is_refused(subfolder: str) -> None:
    with pytest.raises(InputError, match="inside the repo"):
        parse_hub_folder("o/r", subfolder=subfolder)


def test_the_order_of_downloads() -> None:
    assert download_order("o/r", "a", modelscope_repo_id=None) == (HubFolder(HF, "o/r", None, "a"),)
    assert download_order("o/r", "/", modelscope_repo_id="x/y", modelscope_subfolder="/b/") == (
        HubFolder(HF, "o/r", None, ""),
        HubFolder(MS, "x/y", "master", "b"),
    )
    address = MS_URL + "x/y/tree/master/b"
    once = download_order(address, "a", modelscope_repo_id="x/y", modelscope_subfolder="b")
    assert once == (HubFolder(MS, "x/y", "master", "b"),)
