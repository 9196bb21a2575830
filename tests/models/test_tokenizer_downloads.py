"""Tokenizers are fetched whole or not at all, from a server that plays both hubs."""

from __future__ import annotations

import functools
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from anima_peft.errors import InputError
from anima_peft.miniature import MiniatureFiles
from anima_peft.models import hub_access, tokenizer_downloads
from anima_peft.models.hub_folders import download_order, parse_hub_folder
from anima_peft.models.sources import resolve_sources
from anima_peft.models.tokenizer_downloads import complete_tokenizer, default_folder, locate_tokenizer
from anima_peft.models.tokenizers import QWEN, T5, load_qwen_tokenizer, load_t5_tokenizer
from tests.hub_server import HTML, HubServer, alone, hub_server

T5_FILES = ["tokenizer.json", "tokenizer_config.json"]  # of the miniature


@pytest.fixture
def hubs(miniature: MiniatureFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Both hubs, each with the T5 tokenizer in `tokenizer/`, Qwen's in the root, and files that nobody wants."""
    files = {f"tokenizer/{file.name}": file.read_bytes() for file in miniature.t5_tokenizer.iterdir()}
    files |= {file.name: file.read_bytes() for file in miniature.tokenizer.iterdir()}
    files |= {"model.safetensors": b"large", "../tokenizer.json": b"{}", "tokenizer/../../config.json": b"{}"}
    alone(monkeypatch, tmp_path, timeout=0.3)  # hubs that do not answer are not waited for
    monkeypatch.setattr(huggingface_hub.constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr(hub_access, "_TIMEOUT", 0.3)
    with hub_server({"hf": dict(files), "ms": dict(files)}) as server:
        monkeypatch.setattr(tokenizer_downloads, "HfApi", functools.partial(HfApi, endpoint=server.url))
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        yield server


def asked_of(hubs: HubServer) -> set[str]:
    """Which hubs were asked."""
    return {"ms" if "/api/v1/" in line else "hf" for line in hubs.asked}


def content_of(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.parametrize("fault", [None, "redirect"])
def test_hugging_face_comes_first(
    hubs: HubServer, tmp_path: Path, fault: str | None, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault:
        hubs.faults["hf file"] = fault
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))  # moving in must not cross file systems
    folder = tmp_path / "模型 with spaces" / "t5"
    complete_tokenizer(T5, folder, T5.sources)
    assert sorted(content_of(folder)) == T5_FILES
    assert all(content == hubs.files["hf"][f"tokenizer/{name}"] for name, content in content_of(folder).items())
    assert len(load_t5_tokenizer(folder)) > 50
    assert asked_of(hubs) == {"hf"}
    (line,) = [record.message for record in caplog.records if record.name == tokenizer_downloads.__name__]
    page = "https://huggingface.co/nvidia/Cosmos-Predict2-2B-Text2Image/tree/main/tokenizer"
    assert line == f"Fetching the T5 tokenizer from Hugging Face ({page}) into {folder}"


# what happens where -> what the report says of it, for Hugging Face and for ModelScope
FAULTS = {
    ("list", 401): ("401", "refused"),
    ("list", 403): ("403", "refused"),
    ("list", 404): ("404", "refused"),
    ("list", 500): ("500", "refused"),
    ("list", "html"): ("something else than JSON", "something else than JSON"),
    ("list", "hang"): ("Timeout", "RequestTimeoutError"),
    ("file", 401): ("401", "refused"),
    ("file", 403): ("403", "refused"),
    ("file", 404): ("404", "refused"),
    ("file", 500): ("500", "refused"),
    ("file", "html"): ("FileMetadataError", "bytes"),
    ("file", "half"): ("peer closed connection", "ConnectionError"),
    ("file", "other"): ("hashes differ", "Hash mismatch"),
}


@pytest.mark.parametrize(("place", "fault"), FAULTS)
def test_modelscope_takes_over_where_hugging_face_fails(
    hubs: HubServer, tmp_path: Path, caplog, place: str, fault: int | str
) -> None:
    hubs.faults[f"hf {place}"] = fault
    complete_tokenizer(T5, tmp_path / "t5", T5.sources)
    assert sorted(content_of(tmp_path / "t5")) == T5_FILES
    assert asked_of(hubs) == {"hf", "ms"}
    own = [record.message for record in caplog.records if record.name == tokenizer_downloads.__name__]
    assert [line.split()[0] for line in own] == ["Fetching", "Hugging", "Fetching"]
    assert "secret" not in caplog.text


@pytest.mark.parametrize(("place", "fault", "there"), [*((*case, False) for case in FAULTS), ("file", "half", True)])
def test_where_both_fail_both_causes_are_told_and_nothing_stays(
    hubs: HubServer, tmp_path: Path, caplog, place: str, fault: int | str, there: bool
) -> None:
    hubs.faults = {f"hf {place}": fault, f"ms {place}": fault}
    folder = tmp_path / "models" / "t5"
    if there:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("mine")
    before = content_of(tmp_path)
    caplog.set_level(logging.INFO)
    with pytest.raises(InputError) as report:
        complete_tokenizer(T5, folder, T5.sources)
    after = {name: content for name, content in content_of(tmp_path).items() if not name.startswith("modelscope")}
    assert after == before
    heading, first, second, by_hand = str(report.value).split("\n  - ")
    assert heading == f"t5_tokenizer_dir: {folder} holds no T5 tokenizer, and it cannot be downloaded:"
    assert first.startswith("Hugging Face (https://huggingface.co/nvidia/")
    assert second.startswith("ModelScope (https://modelscope.cn/models/nv-community/")
    assert FAULTS[place, fault][0] in first
    assert FAULTS[place, fault][1] in second
    assert "save `tokenizer.json`, or `spiece.model` from https://huggingface.co/nvidia/" in by_hand
    assert str(folder) in by_hand
    assert "Bearer hf_secret" in hubs.tokens  # sent, and echoed by the server
    assert "Bearer ms-secret" in hubs.tokens
    assert "secret" not in str(report.value) + caplog.text


def test_what_is_there_is_never_overwritten(hubs: HubServer, tmp_path: Path) -> None:
    own = json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "mine": True})
    (tmp_path / "tokenizer_config.json").write_text(own)
    (tmp_path / "notes.txt").write_text("mine")
    complete_tokenizer(T5, tmp_path, T5.sources)
    assert (tmp_path / "tokenizer_config.json").read_text() == own
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "tokenizer.json").read_bytes() == hubs.files["hf"]["tokenizer/tokenizer.json"]
    assert not (tmp_path.parent / "tokenizer.json").exists()
    assert not (tmp_path.parent / "config.json").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_a_complete_folder_is_left_alone(hubs: HubServer, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")  # whether it can be read is for the loader to say
    complete_tokenizer(T5, tmp_path, T5.sources)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert hubs.asked == []


def test_qwen_from_its_repos_root(hubs: HubServer, tmp_path: Path) -> None:
    complete_tokenizer(QWEN, tmp_path / "qwen", QWEN.sources)
    assert len(load_qwen_tokenizer(tmp_path / "qwen")) > 200
    assert not {"model.safetensors", "merges.txt"} & {line.rpartition("/")[2] for line in hubs.asked}


@pytest.mark.parametrize("hub", ["hf", "ms"])
def test_the_other_models_tokenizer_and_an_html_page_are_not_taken(hubs: HubServer, tmp_path: Path, hub: str) -> None:
    sources = T5.sources if hub == "hf" else T5.sources[1:]
    hubs.files["ms"] = {} if hub == "hf" else hubs.files["ms"]
    page = b"\n<html><head>Sign in</head></html>"
    for name, content, cause in (
        ("tokenizer.json", hubs.files["hf"]["tokenizer.json"], "belongs to another model"),
        ("tokenizer.json", page, "came as an HTML page"),
        ("spiece.model", HTML, "came as an HTML page"),
        ("config.json", b"{", "something else than JSON"),
    ):
        kept = dict(hubs.files[hub])
        hubs.files[hub][f"tokenizer/{name}"] = content
        with pytest.raises(InputError, match=cause):
            complete_tokenizer(T5, tmp_path / "t5", sources)
        assert not (tmp_path / "t5").exists()
        hubs.files[hub] = kept


def test_a_repo_without_the_files_says_where_it_has_some(hubs: HubServer, tmp_path: Path) -> None:
    sources = download_order("o/r", "t5", modelscope_repo_id="o/r", modelscope_subfolder="t5")
    with pytest.raises(InputError) as report:
        complete_tokenizer(T5, tmp_path / "t5", sources)
    has_none = "the repo's folder `t5` has no `tokenizer.json`, or `spiece.model`"
    assert f"{has_none}; there are some in: ., .., tokenizer" in str(report.value)
    assert str(report.value).count(has_none) == 2


def test_an_address_with_a_revision(hubs: HubServer, tmp_path: Path) -> None:
    complete_tokenizer(T5, tmp_path / "a", [parse_hub_folder("https://hf.co/o/r/tree/refs%2Fpr%2F1/tokenizer")])
    assert hubs.asked[0] == "GET /api/models/o/r/revision/refs%2Fpr%2F1?blobs=true"
    hubs.asked.clear()
    complete_tokenizer(T5, tmp_path / "b", [parse_hub_folder("https://modelscope.cn/models/o/r/tree/v2/tokenizer")])
    assert "Revision=v2" in hubs.asked[0]
    assert asked_of(hubs) == {"ms"}


def test_offline_nothing_is_asked(hubs: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE is set.*\n.*by hand: save `tokenizer.json`"):
        complete_tokenizer(T5, tmp_path / "t5", T5.sources)
    assert hubs.asked == []
    assert not (tmp_path / "t5").exists()


def test_a_folder_that_cannot_be_written_to(hubs: HubServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"t5_tokenizer_dir: .* cannot be written to"):
        complete_tokenizer(T5, tmp_path / "file" / "t5", T5.sources)


@pytest.fixture
def single_files(tmp_path: Path) -> dict[str, Path]:
    for name in ("anima", "vae", "qwen"):
        (tmp_path / f"{name}.safetensors").touch()
    return {part: tmp_path / f"{name}.safetensors" for part, name in (("vae", "vae"), ("qwen", "qwen"))}


def test_tokenizers_of_single_files_without_folders(hubs: HubServer, tmp_path: Path, single_files) -> None:
    fetching = {"qwen_tokenizer_sources": QWEN.sources, "t5_tokenizer_sources": T5.sources}
    for number in range(2):
        sources = resolve_sources(tmp_path / "anima.safetensors", **single_files, **fetching)
        assert sources.t5_tokenizer == default_folder(T5, T5.sources[0])
        assert sources.tokenizer == default_folder(QWEN, QWEN.sources[0])
        assert sources.t5_tokenizer.is_relative_to(tmp_path / "assets" / "anima_peft")
        load_t5_tokenizer(sources.t5_tokenizer)
        load_qwen_tokenizer(sources.tokenizer)
        if number == 0:
            assert asked_of(hubs) == {"hf"}
            hubs.asked.clear()
    assert hubs.asked == []  # the second time all was there


def test_nothing_is_fetched_before_all_faults_are_told(hubs: HubServer, tmp_path: Path, single_files) -> None:
    options = single_files | {"vae": tmp_path / "gone", "qwen_tokenizer_dir": tmp_path / "vae.safetensors"}
    fetching = {"qwen_tokenizer_sources": QWEN.sources, "t5_tokenizer_sources": T5.sources}
    with pytest.raises(InputError) as report:
        resolve_sources(tmp_path / "anima.safetensors", **options, t5_tokenizer_dir=tmp_path / "t5", **fetching)
    assert "vae: no such file or folder" in str(report.value)
    assert "qwen_tokenizer_dir: expected a folder, got a file" in str(report.value)
    assert hubs.asked == []
    assert not (tmp_path / "t5").exists()
    assert not (tmp_path / "assets").exists()


def test_two_tokenizers_that_cannot_be_fetched_are_told_together(hubs: HubServer, tmp_path: Path, single_files) -> None:
    hubs.files = {"hf": {}, "ms": {}}
    fetching = {"qwen_tokenizer_sources": QWEN.sources, "t5_tokenizer_sources": T5.sources}
    with pytest.raises(InputError) as report:
        resolve_sources(tmp_path / "anima.safetensors", **single_files, **fetching)
    assert "holds no Qwen tokenizer" in str(report.value)
    assert "holds no T5 tokenizer" in str(report.value)
    assert not (tmp_path / "assets").exists()


def test_a_folder_a_repo_or_an_address(hubs: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("o/r").mkdir(parents=True)
    assert locate_tokenizer(QWEN, "o/r") == Path("o/r")  # what is here is not looked for elsewhere
    assert locate_tokenizer(QWEN, "no/such/folder") == Path("no/such/folder")
    assert hubs.asked == []
    assert len(load_qwen_tokenizer(locate_tokenizer(QWEN, "owner/name"))) > 200
    address = "https://modelscope.cn/models/o/r/tree/v2/tokenizer"
    folder = locate_tokenizer(T5, address)
    assert folder == tmp_path / "assets" / "anima_peft" / "t5_tokenizer" / "o--r--tokenizer--v2"
    assert len(load_t5_tokenizer(folder)) > 50
    hubs.asked.clear()
    assert locate_tokenizer(T5, address) == folder
    assert hubs.asked == []
