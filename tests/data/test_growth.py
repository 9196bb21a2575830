"""What a run takes that starts on an unchanged dataset: counted for each picture, since runs have 100,000 of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from accelerate import skip_first_batches
from torch.utils.data import DataLoader

from anima_peft.data import (
    BucketBatchSampler,
    CachedDataset,
    CaptionChoice,
    DatasetSpec,
    SubsetSpec,
    TensorCache,
    cache,
    collate,
    plan_captions,
    plan_latents,
    scan,
)
from anima_peft.data import (
    pictures as pictures_module,
)
from anima_peft.data.summary import bucket_rows
from anima_peft.training.settings import _fingerprint

from .conftest import written
from .encoders import draw_sigma, encode, encode_captions, encode_latents

_MOST_BYTES = 2300  # of memory for a picture; 100,000 may take 300 MB with what a run takes besides

opened: list[str] | None = None


def _notice(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and opened is not None:
        opened.append(str(arguments[0]))


@contextmanager
def files_opened() -> Iterator[list[str]]:
    """The paths of all files that Python opens meanwhile."""
    global opened
    if not _installed:
        sys.addaudithook(_notice)
        _installed.append(True)
    opened = []
    try:
        yield opened
    finally:
        opened = None


_installed: list[bool] = []  # a hook stays until the process ends


def _specs(make_pictures: Callable[..., Path], count: int) -> DatasetSpec:
    folder = make_pictures(f"{count} pictures", {f"{number}.png": (16, 16) for number in range(count)})
    return DatasetSpec(subsets=(SubsetSpec(folder, flip_aug=True),), resolution=(16, 16))


def test_an_unchanged_picture_is_looked_at_once(
    make_pictures: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def count(module: object, name: str) -> None:
        original = getattr(module, name)

        def counting(*arguments: object, **options: object) -> object:
            calls[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, counting)

    of_count = {}
    specs = {number: _specs(make_pictures, number) for number in (4, 9)}
    for spec in specs.values():
        encode(spec)
    count(cache, "file_stamp")
    count(TensorCache, "contains")
    count(pictures_module, "look_over")
    count(pictures_module, "place")
    count(cache.hashlib, "file_digest")
    for number, spec in specs.items():
        calls.clear()
        with files_opened() as paths:
            assert encode(spec) == ([], [])
        own = Counter(Path(path).suffix for path in paths if f"{number} pictures" in path)
        of_count[number] = {**calls, **own}
    # The caption is read; the picture's stamp is compared; latents, mirrored latents and text are found whole.
    assert of_count[4] == {"file_stamp": 4, "place": 1, "contains": 12, ".txt": 4, ".safetensors": 12, ".json": 1}
    assert of_count[9] == {"file_stamp": 9, "place": 1, "contains": 27, ".txt": 9, ".safetensors": 27, ".json": 1}


def test_memory_of_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the search to the sampler, at its highest, for captions of 200 letters."""
    count = 2000
    folder = tmp_path / "a folder with a name of some length, as people have them"
    folder.mkdir()
    index = cache.FileIndex(folder / cache.CACHE_FOLDER_NAME)
    for number in range(count):
        path = folder / f"picture {number:06}.png"
        path.write_bytes(b"%d" % number)  # known to the index, it is not opened
        path.with_suffix(".txt").write_text(f"{number:>200}", encoding="utf-8")
        facts = cache.FileFacts(hashlib.sha256(b"%d" % number).hexdigest(), (64 + number % 50, 64))
        index.remember(path, cache.file_stamp(path), facts)
    index.save()
    del index
    monkeypatch.setattr(TensorCache, "contains", lambda self, key: True)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        pictures = scan([DatasetSpec((SubsetSpec(folder),), resolution=(64, 64))], progress=False)
        latents = plan_latents(pictures, model="vae")
        captions = plan_captions(written(pictures), model="text", options={})
        _fingerprint(pictures)
        dataset = CachedDataset(
            pictures, latents.files, captions.of_caption, seed=0, draw_sigma=draw_sigma, choose_caption=CaptionChoice()
        )
        batches = BucketBatchSampler(dataset.groups, dataset.batch_sizes, seed=0).batches(0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(batches) == count
    assert (peak - before) / count < _MOST_BYTES


def test_skipped_batches_are_not_loaded(spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = scan([spec], progress=False)
    latents, captions = plan_latents(pictures, model="vae"), plan_captions(written(pictures), model="q", options={})
    latents.encode(encode_latents, progress=False)
    captions.encode(encode_captions, progress=False)
    loaded = []
    get = CachedDataset.__getitem__
    monkeypatch.setattr(CachedDataset, "__getitem__", lambda self, key: (loaded.append(key), get(self, key))[1])
    dataset = CachedDataset(
        pictures, latents.files, captions.of_caption, seed=3, draw_sigma=draw_sigma, choose_caption=CaptionChoice(3)
    )
    sampler = BucketBatchSampler(dataset.groups, dataset.batch_sizes, seed=3)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)
    assert len(list(skip_first_batches(loader, 2))) == 1
    assert loaded == sampler.batches(0)[2]


def test_the_fingerprint_is_that_of_one_list(spec: DatasetSpec) -> None:
    pictures = scan([spec], progress=False)
    known = [{**dataclasses.asdict(picture), "path": None, "batch_size": None} for picture in pictures]
    text = json.dumps(known, sort_keys=True)
    assert _fingerprint(pictures) == hashlib.sha256(text.encode()).hexdigest()


def test_a_bucket_has_only_its_own_pictures(spec: DatasetSpec) -> None:
    pictures = scan([spec], progress=False)
    rows = bucket_rows((*pictures, *(dataclasses.replace(picture, dataset_index=1) for picture in pictures)))
    assert [(row.dataset_index, row.bucket, row.pictures, row.samples) for row in rows] == [
        (0, (64, 64), 2, 4),
        (0, (128, 32), 1, 2),
        (1, (64, 64), 2, 4),
        (1, (128, 32), 1, 2),
    ]
