"""Only what is missing is encoded: counted by encoders that remember what they were given."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from anima_peft.data import DatasetSpec, SubsetSpec, TensorCache, load_pixels, plan_captions, plan_latents, scan
from anima_peft.data.cache import read_entry
from anima_peft.errors import InputError

from .conftest import written
from .encoders import CountingText, CountingVae, encode

ALL = ["caption of 10 十.png", "caption of 1 一.png", "caption of 2 二.png"]


def test_everything_is_encoded_once(spec: DatasetSpec) -> None:
    batches, captions = encode(spec)
    # Two pictures of 64 x 64 and one of 128 x 32, each with its mirror image; the longest captions first.
    assert batches == [(2, 3, 64, 64), (2, 3, 64, 64), (2, 3, 32, 128)]
    assert captions == ALL
    assert encode(spec) == ([], [])


def test_files_hold_what_was_encoded(spec: DatasetSpec, folder: Path) -> None:
    pictures = scan([spec], progress=False)
    latents = plan_latents(pictures, model="vae")
    captions = plan_captions(written(pictures), model="qwen", options={})
    latents.encode(CountingVae(), batch_size=2, progress=False)
    captions.encode(CountingText(), progress=False)
    for picture, files in zip(pictures, latents.files, strict=True):
        assert files is not None
        assert files.flipped is not None
        text = captions.of_caption[picture.caption]
        for flip, path in ((False, files.plain), (True, files.flipped)):
            assert Path(path).is_relative_to(folder / ".anima_cache" / "latents")
            stored = read_entry(path)["latents"]
            assert stored.dtype == torch.float32
            assert torch.equal(stored, CountingVae()(load_pixels(picture, flip)[None])[0])
        assert torch.equal(read_entry(text)["prompt_embeds"], CountingText()([picture.caption])[0]["prompt_embeds"])


@pytest.mark.parametrize(
    ("change", "latents", "captions"),
    [
        (lambda folder: (folder / "2 二.txt").write_text("new"), 0, ["new"]),
        (lambda folder: (folder / "2 二.txt").write_text("caption of 10 十.png", encoding="utf-8"), 0, []),
        (lambda folder: (folder / "2 二.txt").unlink(), 0, [""]),
        (lambda folder: Image.new("RGB", (50, 50)).save(folder / "2 二.png"), 2, []),
        (lambda folder: (folder / "2 二.png").rename(folder / "2 二 renamed.png"), 0, [""]),
        (lambda folder: os.utime(folder / "2 二.png"), 0, []),
        (lambda folder: (folder / "2 二.png").unlink(), 0, []),
    ],
    ids=["caption", "caption of another", "no caption", "picture", "name", "touched", "removed"],
)
def test_a_change_encodes_exactly_its_own_entries(
    spec: DatasetSpec, folder: Path, change: Callable[[Path], None], latents: int, captions: list[str]
) -> None:
    encode(spec)
    change(folder)
    batches, encoded = encode(spec)
    assert (sum(shape[0] for shape in batches), encoded) == (latents, captions)
    assert encode(spec) == ([], [])


def test_options_and_models_have_entries_of_their_own(spec: DatasetSpec, folder: Path) -> None:
    encode(spec)
    other_size = dataclasses.replace(spec, resolution=(32, 32), enable_bucket=False)
    no_flip = dataclasses.replace(spec, subsets=(SubsetSpec(folder),), batch_size=9)
    assert encode(spec, vae="vae 2") == ([(2, 3, 64, 64), (2, 3, 64, 64), (2, 3, 32, 128)], [])
    assert encode(spec, text="qwen 2") == ([], ALL)
    assert encode(spec, length="1024") == ([], ALL)
    assert encode(other_size) == ([(2, 3, 32, 32)] * 3, [])
    assert encode(no_flip) == ([], [])
    assert encode(spec) == ([], [])


def test_equal_captions_and_pictures_are_encoded_once(spec: DatasetSpec, folder: Path) -> None:
    for path in folder.glob("*.txt"):
        path.write_text("same")
    (folder / "copy.png").write_bytes((folder / "1 一.png").read_bytes())
    (folder / "copy.txt").write_text("same")
    batches, captions = encode(spec)
    assert sum(shape[0] for shape in batches) == 6
    assert captions == ["same"]
    pictures = scan([spec], progress=False)
    assert len({files.plain for files in plan_latents(pictures, model="vae 1").files if files}) == 3


def test_interrupted_caching_goes_on_where_it_stopped(spec: DatasetSpec) -> None:
    pictures = scan([spec], progress=False)
    plan = plan_latents(pictures, model="vae 1")
    with pytest.raises(KeyboardInterrupt):
        plan.encode(CountingVae(fail_at=2), batch_size=2, progress=False)
    assert plan.missing == plan_latents(pictures, model="vae 1").missing == 2
    assert encode(spec)[0] == [(2, 3, 32, 128)]


def test_a_damaged_entry_is_encoded_again(spec: DatasetSpec) -> None:
    encode(spec)
    files = plan_latents(scan([spec], progress=False), model="vae 1").files[2]
    assert files is not None
    path = Path(files.plain)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert encode(spec) == ([(1, 3, 32, 128)], [])
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_said_before_encoding(
    spec: DatasetSpec, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(spec)

    def read_only(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    monkeypatch.setattr(TensorCache, "write", read_only)
    assert encode(spec) == ([], [])  # a complete cache needs no writing
    with pytest.raises(InputError, match=r"cache_dir: .* cannot be written to .*Read-only file system") as caught:
        encode(spec, vae="vae 2")
    assert str(folder / ".anima_cache") in str(caught.value)
    monkeypatch.undo()
    assert len(encode(spec, cache_dir=tmp_path / "elsewhere")[1]) == 3


def test_values_that_are_not_finite_are_refused(spec: DatasetSpec) -> None:
    plan = plan_latents(scan([spec], progress=False), model="vae")
    with pytest.raises(InputError, match=r"1 一.png: .*NaN"):
        plan.encode(lambda pixels: CountingVae()(pixels) * float("nan"), progress=False)
    assert plan.missing == 6


def test_progress_is_shown_only_when_there_is_something_to_do(
    spec: DatasetSpec, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    pictures = scan([spec], progress=False)
    plan_latents(pictures, model="vae").encode(CountingVae(), batch_size=4)
    assert "caching latents" in capsys.readouterr().err
    plan_latents(pictures, model="vae").encode(CountingVae(), batch_size=4)
    assert capsys.readouterr().err == ""
