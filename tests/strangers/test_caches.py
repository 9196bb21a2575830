"""Cache folders that a disk or a stranger changed: an entry that is not what was written is made anew."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from anima_peft.data import DatasetSpec, FileIndex, SubsetSpec, TensorCache, cache_key, scan
from anima_peft.data.caching import plan_latents
from anima_peft.data.seals import require_shape, seal
from anima_peft.errors import InputError

from .hostile import container, opened, picture

KEY = cache_key(a=1)
OTHER = cache_key(a=2)
LATENTS = {"latents": torch.arange(16.0).reshape(1, 4, 4)}


def at(offset: int, value: bytes = b"\xff") -> Callable[[bytes], bytes]:
    """Another byte at a place of the data, counted from the file's end."""
    return lambda data: data[:offset] + value + data[len(data) + offset + len(value) :]


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def changed(content: bytes) -> bytes:
        head, data = opened(content)
        change(head)
        return container(head, data)

    return changed


ENTRIES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:40],
    "cut in the data": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "text": lambda data: b"<html>" * 20,
    "a header longer than the file": lambda data: (2**40).to_bytes(8, "little") + data[8:],
    "a deep header": lambda data: (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "a small deep header": lambda data: (60_000).to_bytes(8, "little") + b"[" * 60_000,
    "a bit of the data": at(-64),
    "the last byte": at(-1),
    "another dtype": header(lambda head: head["latents"].update(dtype="I32")),
    "another shape": header(lambda head: head["latents"].update(shape=[1, 2, 8])),
    "no dtype": header(lambda head: head["latents"].pop("dtype")),
    "fewer numbers than the shape says": header(lambda head: head["latents"].update(shape=[2, 4, 4])),
    "more dimensions": header(lambda head: head["latents"].update(shape=[1, 1, 4, 4])),
    "another name": header(lambda head: head.update(latent=head.pop("latents"))),
    "offsets beyond": header(lambda head: head["latents"].update(data_offsets=[0, 10**12])),
    "no seal": header(lambda head: head.pop("__metadata__")),
    "a seal of nothing": header(lambda head: head.update(__metadata__={})),
    "another entry's seal": header(lambda head: head.update(__metadata__=seal(OTHER, LATENTS))),
    "another hash": header(lambda head: head["__metadata__"].update(seal=f"{KEY} {'0' * 64}")),
    "more in the seal": header(lambda head: head["__metadata__"].update(more="x")),
    "another entry's file": lambda data: save(LATENTS, seal(OTHER, LATENTS)),
    "a file of others": lambda data: save(LATENTS, {"format": "pt"}),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_a_changed_entry_is_refused_and_made_anew(case: str, tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, "latents")
    path = cache.write(KEY, LATENTS)
    assert cache.contains(KEY)
    path.write_bytes(ENTRIES[case](path.read_bytes()))
    with pytest.raises(
        InputError, match=r"this cache entry is missing or damaged .*; remove it and start anew"
    ) as error:
        cache.read(KEY)
    assert str(error.value).startswith(f"{path}: ")
    assert not cache.contains(KEY)
    cache.write(KEY, LATENTS)
    assert torch.equal(cache.read(KEY)["latents"], LATENTS["latents"])


def test_an_entry_of_any_dtype_and_shape_is_sealed(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, "text")
    tensors = {
        "none": torch.zeros(0, 4),
        "one": torch.tensor(3),
        "half": torch.ones(3, 1).bfloat16(),
        "turned": torch.randn(3, 2).T,
        "truth": torch.tensor([True, False]),
    }
    cache.write(KEY, tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in cache.read(KEY).items())


def test_two_entries_in_each_others_place(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, "latents")
    one, other = cache.write(KEY, LATENTS), cache.write(OTHER, {"latents": LATENTS["latents"] + 1})
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert not cache.contains(KEY)
    assert not cache.contains(OTHER)


# Whoever makes an entry can seal it as well: what is in it is looked at, too.
FORGED: dict[str, dict[str, torch.Tensor]] = {
    "nothing": {},
    "another tensor": {"mask": torch.zeros(16, 4, 4)},
    "another size": {"latents": torch.zeros(16, 4, 5)},
    "another dtype": {"latents": torch.zeros(16, 4, 4, dtype=torch.int32)},
    "flat": {"latents": torch.zeros(16)},
    "not finite": {"latents": torch.full((16, 4, 4), torch.nan)},
}


@pytest.mark.parametrize("case", FORGED)
def test_a_sealed_entry_of_another_kind_is_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "entry.safetensors"
    with pytest.raises(InputError, match=r"entry\.safetensors: .*expected finite `latents` of the shape \[0, 4, 4\]"):
        require_shape(path, FORGED[case], "latents", (0, 4, 4))


FACTS = {"size": 1, "mtime_ns": 1, "sha256": "0" * 64, "picture_size": [1, 1]}


def with_facts(**changes: object) -> str:
    return json.dumps({"version": 1, "files": {"a.png": {**FACTS, **changes}}})


INDEXES: dict[str, bytes] = {
    "deep": b"[" * 100_000,
    "deep objects": b'{"files":' * 100_000,
    "an endless size": with_facts(size=float("inf")).encode(),
    "no size": with_facts(size=float("nan")).encode(),
    "an endless side": with_facts(picture_size=[float("inf"), 1]).encode(),
    "three sides": with_facts(picture_size=[1, 1, 1]).encode(),
    "a negative side": with_facts(picture_size=[-4, 4]).encode(),
    "a hash that is a path": with_facts(sha256="../../etc/passwd").encode(),
    "a time of 5000 digits": with_facts().replace('"mtime_ns": 1', '"mtime_ns": ' + "9" * 5000).encode(),
    "a list of facts": b'{"version": 1, "files": {"a.png": [1, 1]}}',
    "no UTF-8": b'{"version": 1, "files": {"\xff": 1}}',
    "zeros": bytes(4096),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_cannot_be_one_is_rebuilt(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".anima_cache").mkdir()
    index = tmp_path / ".anima_cache" / "index.json"
    index.write_bytes(INDEXES[case])
    (tmp_path / "a.png").write_bytes(picture())
    with caplog.at_level(logging.WARNING):
        (found,) = scan([DatasetSpec((SubsetSpec(tmp_path, class_tokens="a"),), (32, 32))], progress=False)
    assert found.size == (32, 32)
    assert f"{index}: this index is not usable" in caplog.text
    assert FileIndex(index.parent).known(tmp_path / "a.png") is not None


def test_a_link_in_place_of_an_entry_is_replaced_and_not_followed(tmp_path: Path) -> None:
    """What a cache folder of others points to is not written to."""
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"mine")
    cache = TensorCache(tmp_path / "cache", "latents")
    path = cache.path(KEY)
    path.parent.mkdir(parents=True)
    try:
        path.symlink_to(mine)
    except OSError:
        pytest.skip("links need a right on Windows")
    assert not cache.contains(KEY)
    cache.write(KEY, LATENTS)
    assert mine.read_bytes() == b"mine"
    assert not path.is_symlink()


def test_a_damaged_entry_is_encoded_again_in_the_next_run(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    pictures = scan([DatasetSpec((SubsetSpec(tmp_path, class_tokens="a"),), (32, 32))], progress=False)

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return pixels[:, :1, ::8, ::8]

    plan = plan_latents(pictures, model="m")
    plan.encode(encode, progress=False)
    (files,) = plan.files
    assert files is not None
    plain = Path(files.plain)
    whole = plain.read_bytes()
    plain.write_bytes(at(-3)(whole))
    with pytest.raises(InputError):
        TensorCache(tmp_path / ".anima_cache", "latents").read(plain.stem)
    again = plan_latents(pictures, model="m")
    assert again.missing == 1
    again.encode(encode, progress=False)
    assert plain.read_bytes() == whole
