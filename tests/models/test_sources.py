"""Where each part of the model is found."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from anima_peft.errors import InputError
from anima_peft.models import folders
from anima_peft.models.sources import ModelSources, is_diffusers_folder, locate_model, resolve_sources

PARTS = {
    "vae": "vae.safetensors",
    "qwen": "qwen.safetensors",
    "qwen_tokenizer_dir": "qwen tokenizer",
    "t5_tokenizer_dir": "t5 tokenizer",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Single files, tokenizer folders, a Qwen folder and a diffusers folder; none holds anything."""
    for name in ("anima.safetensors", "vae.safetensors", "qwen.safetensors"):
        (tmp_path / name).touch()
    for name in ("qwen tokenizer", "t5 tokenizer", "qwen folder"):
        (tmp_path / name).mkdir()
    for part in ("transformer", "text_conditioner", "vae", "text_encoder", "tokenizer", "t5_tokenizer"):
        (tmp_path / "diffusers" / part).mkdir(parents=True)
        (tmp_path / "diffusers" / part / "config.json").touch()
    return tmp_path


def given(root: Path, **names: str | None) -> dict[str, Path]:
    return {option: root / name for option, name in names.items() if name is not None}


def test_single_files(root: Path) -> None:
    assert resolve_sources(root / "anima.safetensors", **given(root, **PARTS)) == ModelSources(
        transformer=root / "anima.safetensors",
        vae=root / "vae.safetensors",
        text_encoder=root / "qwen.safetensors",
        tokenizer=root / "qwen tokenizer",
        t5_tokenizer=root / "t5 tokenizer",
    )


def in_folder(root: Path, **changes: Path) -> ModelSources:
    folder = root / "diffusers"
    parts = {part: folder / part for part in ("vae", "text_encoder", "tokenizer", "t5_tokenizer")}
    return ModelSources(**{"transformer": folder} | parts | changes)


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        pytest.param({}, {}, id="nothing"),
        pytest.param({"vae": "vae.safetensors"}, {"vae": "vae.safetensors"}, id="VAE"),
        pytest.param({"qwen": "qwen.safetensors"}, {"text_encoder": "qwen.safetensors"}, id="Qwen as a file"),
        pytest.param(
            {"qwen": "qwen folder"},
            {"text_encoder": "qwen folder", "tokenizer": "qwen folder"},
            id="Qwen as a folder with its tokenizer",
        ),
        pytest.param(
            {"qwen": "qwen folder", "qwen_tokenizer_dir": "qwen tokenizer"},
            {"text_encoder": "qwen folder", "tokenizer": "qwen tokenizer"},
            id="Qwen as a folder, another tokenizer",
        ),
        pytest.param({"t5_tokenizer_dir": "t5 tokenizer"}, {"t5_tokenizer": "t5 tokenizer"}, id="T5 tokenizer"),
    ],
)
def test_a_diffusers_folder_brings_all_parts_and_options_override(
    root: Path, options: dict[str, str], changed: dict[str, str]
) -> None:
    expected = in_folder(root, **{part: root / name for part, name in changed.items()})
    assert resolve_sources(root / "diffusers", **given(root, **options)) == expected


def test_qwen_as_a_folder_brings_its_tokenizer_beside_single_files(root: Path) -> None:
    options = given(root, **PARTS | {"qwen": "qwen folder", "qwen_tokenizer_dir": None})
    assert resolve_sources(root / "anima.safetensors", **options).tokenizer == root / "qwen folder"


def test_paths_may_be_text_and_start_at_home(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.setenv("USERPROFILE", str(root))
    options = {option: f"~/{name}" for option, name in PARTS.items()}
    sources = resolve_sources("~/anima.safetensors", **options)
    assert all(path.is_absolute() and path.exists() for path in asdict(sources).values())


@pytest.mark.parametrize(
    ("transformer", "options", "faults"),
    [
        pytest.param(
            "anima.safetensors",
            {},
            ["vae: required", "qwen: required", "qwen_tokenizer_dir: required", "t5_tokenizer_dir: required"],
            id="nothing but the DiT",
        ),
        pytest.param(
            "anima.safetensors",
            PARTS | {"qwen_tokenizer_dir": None},
            ["qwen_tokenizer_dir: required"],
            id="Qwen's file without a tokenizer",
        ),
        pytest.param(
            "anima.safetensors",
            {option: f"no {name}" for option, name in PARTS.items()},
            [f"{option}: no such file or folder" for option in PARTS],
            id="four wrong paths",
        ),
        pytest.param(
            "nothing.safetensors",
            {"vae": "no vae"},
            ["anima_transformer: ", "nothing.safetensors: no such file or folder", "vae: no such file or folder"],
            id="a wrong DiT and a wrong VAE",
        ),
        pytest.param(
            "qwen folder",
            {"vae": "no vae"},
            ["anima_transformer: ", "is a folder without `transformer/config.json`", "vae: no such file or folder"],
            id="a folder of another kind",
        ),
    ],
)
def test_everything_that_is_missing_is_reported_together(
    root: Path, transformer: str, options: dict[str, str | None], faults: list[str]
) -> None:
    with pytest.raises(InputError) as error:
        resolve_sources(root / transformer, **given(root, **options))
    assert [fault for fault in faults if fault not in str(error.value)] == []


def test_a_part_that_the_diffusers_folder_lacks_is_reported(root: Path) -> None:
    (root / "diffusers" / "t5_tokenizer").rename(root / "elsewhere")
    with pytest.raises(InputError, match=r"t5_tokenizer_dir: no such file or folder: .*t5_tokenizer$"):
        resolve_sources(root / "diffusers")


@pytest.mark.parametrize("part", ["transformer", "text_conditioner"])
def test_a_diffusers_folder_has_both_parts_that_are_trained(root: Path, part: str) -> None:
    assert is_diffusers_folder(root / "diffusers")
    (root / "diffusers" / part / "config.json").unlink()
    assert not is_diffusers_folder(root / "diffusers")


def test_a_repo_is_downloaded_without_pickled_weights_and_only_as_far_as_wanted(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(repo: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(root / "diffusers")

    monkeypatch.setattr(folders, "snapshot_download", download)
    monkeypatch.chdir(root)
    assert resolve_sources("someone/some-model") == in_folder(root)
    assert locate_model("someone/some-model", ["transformer"]) == root / "diffusers"
    (_, everything), (repo, wanted) = asked
    assert repo == "someone/some-model"
    assert {pattern.split("/")[0] for pattern in wanted if "/" in pattern} == {"transformer"}
    assert {pattern.rsplit(".")[-1] for pattern in everything} == {"json", "safetensors", "txt", "model"}


@pytest.mark.parametrize("path", ["models/anima.safetensors", "./anima", "/no/such/folder", "anima", "a/b/c", ""])
def test_what_is_no_repo_id_is_not_looked_for_on_the_hub(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="anima_transformer"):
        resolve_sources(path)


def test_a_repo_that_cannot_be_had_is_one_clear_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise ConnectionError("offline")

    monkeypatch.setattr(folders, "snapshot_download", download)
    with pytest.raises(InputError, match=r"anima_transformer: someone/some-model: .*ConnectionError: offline"):
        resolve_sources("someone/some-model")
