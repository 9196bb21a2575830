"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from anima_peft.files import save_tensors, unfinished_name, write_atomically


@pytest.mark.parametrize(
    "name", ["file.txt", "no suffix", ".hidden", "folder/that is/new/画像.png", "长" * 80 + ".txt", "a.b.c"]
)
def test_a_file_appears_with_what_was_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    seen: list[Path] = []

    def write(temporary: Path) -> None:
        seen.append(temporary)
        assert not path.exists()
        temporary.write_text("content")

    write_atomically(path, write)
    assert path.read_text() == "content"
    assert list(path.parent.iterdir()) == [path]
    assert seen[0].parent == path.parent
    assert unfinished_name(seen[0]) == (path.name if len(path.stem) < 60 else path.stem[:66] + path.suffix)
    assert unfinished_name(path) is None
    assert seen[0].name.endswith(path.suffix)  # some writers choose their format by it


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("earlier", [None, "earlier"])
def test_what_fails_leaves_the_earlier_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException], earlier: str | None
) -> None:
    path = tmp_path / "file.txt"
    if earlier is not None:
        path.write_text(earlier)

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise error("stop")

    with pytest.raises(error, match="stop"):
        write_atomically(path, write)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == ({"file.txt": earlier} if earlier else {})


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file modes")
def test_the_mode_is_that_of_any_new_file(tmp_path: Path) -> None:
    earlier = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", lambda path: path.write_text("x"))
        assert os.umask(0o027) == 0o027  # asking for it has not changed it
    finally:
        os.umask(earlier)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_tensors_of_every_kind_are_saved(tmp_path: Path) -> None:
    tensors = {
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "a part": torch.arange(10)[2:5],
        "trained": torch.nn.Parameter(torch.ones(2)),
        "narrow": torch.ones(3, dtype=torch.bfloat16),
        "a number": torch.tensor(2.5),
    }
    path = tmp_path / "file.safetensors"
    save_tensors(path, tensors, {"key": "値"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(loaded[key], tensor.detach())
        assert loaded[key].dtype == tensor.dtype
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"key": "値"}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows flushes no folders")
def test_drives_that_flush_no_folders_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exFAT and some network drives are."""
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "file", lambda path: path.write_text("x"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_names_the_file(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: .*file\.txt"):
        write_atomically(tmp_path / "file.txt", write)
