"""Safetensors files tensor by tensor, against the library's own reader and writer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from anima_peft.adapters.metadata import with_hashes, with_hashes_of
from anima_peft.adapters.streaming import TensorFile, TensorSpool, rewrite
from anima_peft.errors import InputError

TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a": torch.tensor(0.5),
    "odd": torch.ones(3, dtype=torch.bfloat16),
    "half": torch.full((2, 1, 5), 3.0, dtype=torch.float16),
    "double": torch.rand(4, dtype=torch.float64),
    "名 字": torch.zeros(0, 4),
}
TEXT = {"ss_note": 'mine "quoted" \\ 注', "title": "x\ny"}


@pytest.mark.parametrize("metadata", [{}, TEXT], ids=["without metadata", "with metadata"])
def test_a_spool_writes_the_file_that_the_library_writes(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = tmp_path / "新 folder" / "file.safetensors"
    with TensorSpool(path.parent) as spool:
        for key, tensor in TENSORS.items():
            spool.add(key, tensor)
        spool.save(path, metadata)
        hashed = with_hashes_of(spool, metadata)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    theirs = save(TENSORS, metadata or None)
    assert len(path.read_bytes()) == len(theirs)
    start = 8 + int.from_bytes(theirs[:8], "little")
    assert path.read_bytes()[start:] == theirs[start:]
    assert hashed == with_hashes(TENSORS, metadata)
    with safe_open(path, framework="pt") as file:
        assert (file.metadata() or {}) == metadata


def test_hashes_reach_into_large_files(tmp_path: Path) -> None:
    """kohya's short one is of 64 KiB at 1 MiB."""
    tensors = {"x": torch.rand(300_000), "y": torch.rand(300_000).half()}
    with TensorSpool(tmp_path) as spool:
        for key, tensor in tensors.items():
            spool.add(key, tensor)
        assert with_hashes_of(spool, TEXT) == with_hashes(tensors, TEXT)


def test_tensors_are_read_as_the_library_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file(TENSORS, path, TEXT)
    with TensorFile(path) as file:
        assert file.metadata == TEXT
        assert file.entries.keys() == TENSORS.keys()
        for key, tensor in load_file(path).items():
            read = file.read(key)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)


def test_a_rewritten_file_differs_where_it_is_to(tmp_path: Path) -> None:
    path, new = tmp_path / "file.safetensors", tmp_path / "new.safetensors"
    integers = {"index": torch.arange(3)}
    save_file(TENSORS | integers, path, TEXT)
    seen: list[int] = []
    with TensorFile(path) as file:
        rewrite(file, new, {"odd": lambda old: old + 1}, {"made": "here"}, seen.append)
    expected = TENSORS | integers | {"odd": TENSORS["odd"] + 1}
    found = load_file(new)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in expected.items())
    assert sum(seen) == sum(tensor.nbytes for tensor in expected.values())
    with safe_open(new, framework="pt") as file:
        assert file.metadata() == {"made": "here"}


def test_a_rewrite_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file(TENSORS, path)

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise InputError("no")

    with TensorFile(path) as file, pytest.raises(InputError):
        rewrite(file, tmp_path / "new.safetensors", {"odd": fail}, {})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_integers_are_not_read_as_weights(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"index": torch.arange(3)}, path)
    with TensorFile(path) as file, pytest.raises(InputError, match="is I64, expected floating point"):
        file.read("index")


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}x"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a readable safetensors file"):
        TensorFile(path)
