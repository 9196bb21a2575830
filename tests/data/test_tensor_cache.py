"""Entries and the file index: whole or absent, never stale, never trusted when damaged."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import pytest
import torch

from anima_peft.data import FileIndex, TensorCache, cache_key
from anima_peft.data.cache import FileFacts, file_stamp
from anima_peft.errors import InputError

KEY = cache_key(caption="猫", size=(2, 3))


def test_key_is_canonical() -> None:
    assert cache_key(b=(1, 2), a="x") == cache_key(a="x", b=[1, 2]) != cache_key(a="x", b=[2, 1])
    assert hashlib.sha256(b'{"a":"x","b":[1,2]}').hexdigest() == cache_key(b=(1, 2), a="x")
    with pytest.raises(TypeError):
        cache_key(path=Path("x"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        cache_key(a=float("nan"))


def test_entries_come_back_as_they_were(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path / "cache 缓存", "text")
    batch = torch.randn(4, 3, 2)
    tensors = {
        "row": batch[1],
        "turned": batch[2].T,
        "half": torch.randn(2).bfloat16(),
        "ids": torch.tensor([1, 2]),
        "none": torch.zeros(0, 8),
    }
    assert not cache.contains(KEY)
    path = cache.write(KEY, tensors)
    assert path == tmp_path / "cache 缓存" / "text" / KEY[:2] / f"{KEY}.safetensors" == cache.path(KEY)
    assert cache.contains(KEY)
    read = cache.read(KEY)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:40],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"x" * 99,
    ],
    ids=["empty", "header cut", "data cut", "too long", "foreign"],
)
def test_a_damaged_entry_counts_as_missing(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    cache = TensorCache(tmp_path, "latents")
    path = cache.write(KEY, {"latents": torch.randn(4, 4)})
    path.write_bytes(damage(path.read_bytes()))
    assert not cache.contains(KEY)
    with pytest.raises(InputError, match="missing or damaged"):
        cache.read(KEY)
    cache.write(KEY, {"latents": torch.ones(4, 4)})
    assert torch.equal(cache.read(KEY)["latents"], torch.ones(4, 4))


def test_a_failed_write_leaves_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TensorCache(tmp_path, "latents")
    path = cache.write(KEY, {"latents": torch.zeros(4)})

    def no_space(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(InputError, match=r"No space left on device.*cache_dir"):
        cache.write(KEY, {"latents": torch.ones(4)})
    assert torch.equal(cache.read(KEY)["latents"], torch.zeros(4))
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_index_reads_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "模型 a.bin"
    file.write_bytes(b"one")
    digests: list[str] = []
    real = hashlib.file_digest

    def counting(*args):  # type: ignore[no-untyped-def]
        digests.append(args[0].name)
        return real(*args)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    index = FileIndex(tmp_path / "cache")
    assert index.hash(file) == index.hash(file) == hashlib.sha256(b"one").hexdigest()
    index.save()
    assert FileIndex(tmp_path / "cache").hash(file) == hashlib.sha256(b"one").hexdigest()
    assert len(digests) == 1

    file.write_bytes(b"two")
    os.utime(file, ns=(0, 1))
    assert FileIndex(tmp_path / "cache").hash(file) == hashlib.sha256(b"two").hexdigest()
    assert len(digests) == 2
    with pytest.raises(FileNotFoundError):
        index.hash(tmp_path / "missing")


def test_index_writes_only_what_is_new(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"x")
    FileIndex(tmp_path / "cache").save()
    assert not (tmp_path / "cache").exists()
    index = FileIndex(tmp_path / "cache")
    index.remember(file, file_stamp(file), FileFacts("0" * 64, (3, 4)))
    index.save()
    stamp = file_stamp(tmp_path / "cache" / "index.json")
    again = FileIndex(tmp_path / "cache")
    assert again.known(file) == FileFacts("0" * 64, (3, 4))
    assert again.known(tmp_path / "gone.png") is None
    again.save()
    assert file_stamp(tmp_path / "cache" / "index.json") == stamp


ENTRY = {"size": 1, "mtime_ns": 1, "sha256": "0" * 64, "picture_size": None}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b'{"version": 1, "fi',
        b"[1, 2]",
        b'{"version": 99, "files": {}}',
        b'{"version": 1, "files": [1]}',
        *(
            json.dumps({"version": 1, "files": {"a.png": {**ENTRY, **change}}}).encode()
            for change in (
                {"sha256": "?"},
                {"sha256": 1},
                {"size": None},
                {"picture_size": [1]},
                {"picture_size": [0, 1]},
            )
        ),
    ],
)
def test_an_unusable_index_is_rebuilt(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"x")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "index.json").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        index = FileIndex(tmp_path / "cache")
    assert "index is rebuilt" in caplog.text
    assert index.known(file) is None
    index.hash(file)
    index.save()
    caplog.clear()
    assert FileIndex(tmp_path / "cache").known(file) is not None
    assert not caplog.records
