"""Adapter files and folders of strangers, beside those that `tests/adapters` damages by hundreds."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from safetensors.torch import save_file

from anima_peft.adapters.inspection import as_json, as_text, inspect_adapter
from anima_peft.adapters.sources import locate_adapter, read_source
from anima_peft.cli import DONE, FAULTY_INPUT, main
from anima_peft.errors import InputError
from anima_peft.models.hub_errors import cause
from anima_peft.texts import escaped

from .hostile import ESCAPES, POSIX, container, sparse

STEM = "lora_unet_blocks_0_self_attn_q_proj"
PICKLED = "Pickled checkpoints (.pt, .pth, .bin, .ckpt) are not loaded; download the file again or convert it."


def folder_with(**files: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_bytes(content)
        return folder

    return make


def file_of(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def huge_config(folder: Path) -> Path:
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    sparse(folder / "adapter_config.json", 2**40)
    return folder


ZIP, PICKLE = b"PK\x03\x04" + bytes(60), b"\x80\x04\x95\x10\0\0\0\0\0\0\0cos\nsystem\n."
WHOLE = container({"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, bytes(4))
ADAPTERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a .pt": (file_of("a.pt", ZIP), PICKLED),
    "a .bin": (file_of("a.bin", PICKLE), PICKLED),
    "a .ckpt": (file_of("a.ckpt", ZIP), PICKLED),
    "a pickle by another name": (file_of("a.safetensors", PICKLE), PICKLED),
    "a folder with a .bin": (
        folder_with(adapter_model__bin=ZIP, adapter_config__json=b"{}"),
        "no .safetensors file, but adapter_model.bin. Pickled files can run code and are not loaded; save the adapter",
    ),
    "a folder with a .pt": (folder_with(lora__pt=ZIP), "no .safetensors file, but lora.pt."),
    "an empty folder": (folder_with(), "expected one .safetensors file, found none; give weight_name"),
    "a folder with two": (
        folder_with(a__safetensors=WHOLE, b__safetensors=WHOLE),
        "found a.safetensors, b.safetensors",
    ),
    "a deep PEFT config": (
        folder_with(adapter_model__safetensors=WHOLE, adapter_config__json=b"[" * 100_000),
        "adapter_config.json: is not a PEFT config (nested too deeply)",
    ),
    "a PEFT config in a list": (
        folder_with(adapter_model__safetensors=WHOLE, adapter_config__json=b"[]"),
        "adapter_config.json: is not a PEFT config (it is no table of options)",
    ),
    "a PEFT config in UTF-16": (
        folder_with(adapter_model__safetensors=WHOLE, adapter_config__json="{}".encode("utf-16")),
        "adapter_config.json: is not a PEFT config",
    ),
    "a huge PEFT config": (huge_config, "adapter_config.json: is not a PEFT config"),
    "a file that is not there": (lambda folder: folder / "none.safetensors", "no such adapter file"),
    "a name that is too long": (lambda folder: folder / ("a" * 5000), "no such adapter file"),
    "a name with a NUL": (lambda folder: folder / "a\0", "no such adapter file"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_that_are_refused(case: str, tmp_path: Path) -> None:
    make, words = ADAPTERS[case]
    with pytest.raises(InputError) as error:
        read_source(make(tmp_path))
    assert words in str(error.value)
    assert str(tmp_path) in str(error.value)


@POSIX
def test_a_pipe_is_no_adapter(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="no such adapter file"):
        locate_adapter(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="expected one"):
        locate_adapter(tmp_path)


@pytest.fixture
def hostile_file(tmp_path: Path) -> Path:
    """An adapter whose every text is a terminal's command."""
    path = tmp_path / "a.safetensors"
    tensors = {f"{STEM}.lora_down.weight{ESCAPES}": torch.zeros(2), f"{STEM}.diff": torch.zeros(4, 4)}
    metadata = {ESCAPES: ESCAPES, "ss_training_comment": f"a\n  loads: yes\r{ESCAPES}", "endless": ESCAPES * 10_000}
    save_file(tensors, path, metadata)
    return path


def harmless(text: str) -> bool:
    return escaped(text, keep="\n") == text


def test_what_is_inspected_is_escaped(hostile_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words in (["inspect", str(hostile_file)], ["inspect", "--json", str(hostile_file)]):
        assert main(words) == FAULTY_INPUT
        out, err = capfd.readouterr()
        assert harmless(out)
        assert harmless(err)
        assert "\n  loads: yes" not in out
        assert r"\u202e" in out
        assert len(out) < 10_000
    assert json.loads(out)["path"] == str(hostile_file)


@POSIX
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_names_of_files_are_escaped(
    command: str, hostile_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = hostile_file.rename(tmp_path / f"a{ESCAPES}.safetensors")
    new = [str(tmp_path / "new.safetensors"), "--format", "kohya"] if command == "convert" else []
    assert main([command, str(path), *new]) == FAULTY_INPUT
    out, err = capfd.readouterr()
    assert harmless(out)
    assert harmless(err)
    assert not (tmp_path / "new.safetensors").exists()


def test_every_line_of_an_inspection_is_one_line(hostile_file: Path) -> None:
    found = inspect_adapter(hostile_file)
    assert all(line.isprintable() for line in as_text(found))
    assert as_json(found).isascii()


TOKEN = "hf_" + "a1" * 17


def refused(url: str, text: str) -> Exception:
    """The hub's error over an answer that repeats what was sent."""
    http = importlib.import_module(HTTPError.__module__.partition(".")[0])  # httpx, or what the hub uses by now
    request = http.Request("GET", url, headers={"Authorization": f"Bearer {TOKEN}"})
    response = http.Response(403, request=request, text=text)
    return HfHubHTTPError(f"403 Forbidden for {url}: {text}", response=response)


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return TOKEN


@pytest.mark.parametrize("url", ["https://hub.example/a/b", f"https://user:{TOKEN}@hub.example/a", "http://u:p@x/y"])
def test_a_hubs_error_is_told_without_tokens_and_passwords(url: str, token: str) -> None:
    told = cause(refused(url, f"your Authorization: Bearer {token} is not welcome"))
    assert token not in told
    assert "***" in told
    assert ":p@" not in told


def test_a_token_that_was_given_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    mine = "secret-of-a-mirror"

    def echo(*args: object, token: str, **options: object) -> str:
        raise refused("https://hub.example/a/b", f"token {token} unknown")

    monkeypatch.setattr("anima_peft.adapters.sources.hf_hub_download", echo)
    with pytest.raises(InputError, match=r"token \*\*\* unknown"):
        locate_adapter("a/b", token=mine)
    monkeypatch.setattr("anima_peft.models.folders.snapshot_download", echo)
    from anima_peft.models.folders import fetch_folder

    with pytest.raises(InputError, match=r"token \*\*\* unknown"):
        fetch_folder("a/b", ["vae"], token=mine)
    assert huggingface_hub.get_token() != mine


def test_a_plain_file_is_shown_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "猫　の耳.safetensors"
    save_file({f"{STEM}.diff": torch.zeros(4, 4)}, path, {"ss_note": "可爱 🐈"})
    assert main(["inspect", str(path)]) == DONE
    assert "可爱 🐈" in capfd.readouterr().out
