"""`anima-peft download`: the model from a server that plays both hubs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from anima_peft.models import model_downloads, tokenizer_downloads
from anima_peft.models.folders import PARTS
from tests.adapters.commanding import contents, run
from tests.hub_server import HubServer, alone, hub_server

SINGLE = {
    "split_files/diffusion_models/anima-base-v1.0.safetensors": b"dit" * 5000,
    "split_files/diffusion_models/other.safetensors": b"other",
    "split_files/text_encoders/qwen_3_06b_base.safetensors": b"qwen",
    "split_files/vae/qwen_image_vae.safetensors": b"vae",
    "README.md": b"card",
}
NAMES = ["anima-base-v1.0.safetensors", "qwen_3_06b_base.safetensors", "qwen_image_vae.safetensors"]


@pytest.fixture
def hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Both hubs with ComfyUI's files."""
    alone(monkeypatch, tmp_path / "libraries")
    with hub_server({"hf": dict(SINGLE), "ms": dict(SINGLE)}) as server:
        for module in (tokenizer_downloads, model_downloads):
            monkeypatch.setattr(module, "HfApi", functools.partial(HfApi, endpoint=server.url))
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        yield server


@pytest.mark.parametrize("hub", ["huggingface", "modelscope", None])
def test_single_files(hub: str | None, hubs: HubServer, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "模型 models"
    options = ["--output_dir", folder, *(["--hub", hub] if hub else [])]
    assert run("download", "single-files", *options) == 0
    assert sorted(path.name for path in folder.iterdir()) == NAMES
    assert (folder / NAMES[0]).read_bytes() == b"dit" * 5000
    assert any("/api/v1/" in line for line in hubs.asked) is (hub == "modelscope")
    before = contents(folder)
    capsys.readouterr()
    hubs.asked.clear()
    assert run("download", "single-files", *options) == 0  # all was there
    assert capsys.readouterr().out.count("(was there)") == 3
    assert contents(folder) == before
    assert not any("resolve" in line or "FilePath" in line for line in hubs.asked)


def test_another_checkpoint(hubs: HubServer, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "models"
    arguments = ["download", "single-files", "--output_dir", folder, "--checkpoint"]
    assert run(*arguments, "other.safetensors") == 0
    assert (folder / "other.safetensors").read_bytes() == b"other"
    assert run(*arguments, "absent.safetensors") == 2
    assert "its checkpoints are: anima-base-v1.0.safetensors, other.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [401, 403, 404, 500, "html", "half", "other"])
def test_modelscope_takes_over(hubs: HubServer, tmp_path: Path, fault: int | str, capfd, caplog) -> None:
    hubs.faults["hf file"] = fault
    assert run("download", "single-files", "--output_dir", tmp_path / "models") == 0
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == NAMES
    assert "secret" not in "".join(capfd.readouterr()) + caplog.text


def test_what_broke_off_goes_on(hubs: HubServer, tmp_path: Path, capsys) -> None:
    """After a fault what had come is kept out of sight, and asked for no more."""
    folder = tmp_path / "models"
    options = ["download", "single-files", "--output_dir", folder, "--hub", "huggingface"]
    content = hubs.files["hf"].pop("split_files/vae/qwen_image_vae.safetensors")
    hubs.files["hf"]["split_files/vae/qwen_image_vae.safetensors"] = content
    hubs.faults["hf file"] = "half"
    assert run(*options) == 2
    assert "the same command goes on from there" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == [".anima_download"]
    hubs.faults.clear()
    hubs.asked.clear()
    assert run(*options) == 0
    assert sorted(path.name for path in folder.iterdir()) == NAMES
    assert (folder / NAMES[0]).read_bytes() == b"dit" * 5000


@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
def test_another_file_in_the_place_is_never_overwritten(hub: str, hubs: HubServer, tmp_path: Path, capsys) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / NAMES[1]).write_bytes(b"mine, of another length")
    before = contents(tmp_path / "models")
    assert run("download", "single-files", "--output_dir", tmp_path / "models", "--hub", hub) == 2
    assert f"{NAMES[1]} is there and is not the hub's file" in capsys.readouterr().err
    assert contents(tmp_path / "models") == before


def test_a_diffusers_folder(hubs: HubServer, tmp_path: Path, capsys) -> None:
    parts = {f"{part}/config.json": b"{}" for part in PARTS}
    wanted = parts | {"model_index.json": b"{}", "transformer/weights.safetensors": b"weights"}
    hubs.files["hf"] = wanted | {"transformer/weights.bin": b"pickle", "code.py": b"import os", "../out.json": b"{}"}
    assert run("download", "diffusers", "--output_dir", tmp_path / "folder") == 0
    assert sorted(Path(name).as_posix() for name in contents(tmp_path / "folder")) == sorted(wanted)
    del hubs.files["hf"]["vae/config.json"]
    hubs.files["ms"] = {}
    assert run("download", "diffusers", "--output_dir", tmp_path / "other") == 2
    assert "the repo has no vae; it is no diffusers folder" in capsys.readouterr().err


def test_a_repo_cannot_write_elsewhere(hubs: HubServer, tmp_path: Path, capsys) -> None:
    hubs.files["hf"] = {f"{part}/config.json": b"{}" for part in PARTS} | {"vae/../../x.json": b"{}"}
    hubs.files["ms"] = {}
    assert run("download", "diffusers", "--output_dir", tmp_path / "folder") == 2
    assert "would lie elsewhere" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "invalid choice"),
        ([], "required: WHAT"),
        (["tokenizers", "--checkpoint", "a.safetensors"], "no effect without single-files"),
        (["single-files", "--checkpoint", "../a.safetensors"], "expected the name of a .safetensors file"),
        (["single-files", "--checkpoint", "a.ckpt"], "expected the name of a .safetensors file"),
        (["single-files", "--output_dir", "{file}/models"], "cannot be written to"),
    ],
)
def test_faults(arguments: list[str], message: str, hubs: HubServer, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    filled = [text.format(file=tmp_path / "file") for text in arguments]
    filled += [] if "--output_dir" in filled else ["--output_dir", str(tmp_path / "models")]
    assert run("download", *filled) == 2
    assert message in capsys.readouterr().err
    assert hubs.asked == []


def test_no_room(hubs: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    usage = model_downloads.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(model_downloads.shutil, "disk_usage", lambda _: usage._replace(free=100))
    assert run("download", "single-files", "--output_dir", tmp_path / "models") == 2
    assert "GB are free" in capsys.readouterr().err


def test_offline(tmp_path: Path, capsys) -> None:
    assert run("download", "single-files", "--output_dir", tmp_path / "models") == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
