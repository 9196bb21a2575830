"""What a change makes the next run encode again: exactly its own entries, by a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anima_peft.data import (
    BucketBatchSampler,
    CaptionChoice,
    CaptionSpec,
    DatasetSpec,
    SampleTable,
    SubsetSpec,
    captions_of_run,
    plan_captions,
    plan_latents,
    plan_masks,
    scan,
)

from .conftest import noise_image
from .encoders import encode_captions, encode_latents

MakePictures = Callable[..., Path]
Keys = dict[str, object]
EPOCHS = 2


def prepared(spec: DatasetSpec, vae: str, text: str, length: int, seed: int) -> tuple[int, int, int]:
    """(latents, masks, captions) that a run of two epochs encodes."""
    pictures = scan([spec], progress=False)
    table = SampleTable(pictures)
    sampler = BucketBatchSampler(table.groups, table.batch_sizes, seed=seed)
    batches = [batch for epoch in range(EPOCHS) for batch in sampler.batches(epoch)]
    choose = CaptionChoice(seed, len(sampler), 1, EPOCHS * len(sampler))
    needed = captions_of_run(pictures, table.picture_of_sample, batches, choose)
    latents, masks = plan_latents(pictures, model=vae), plan_masks(pictures)
    captions = plan_captions(((pictures[n], c) for n, c in needed), model=text, options={"length": length})
    counts = latents.missing, masks.missing, captions.missing
    latents.encode(encode_latents, progress=False)
    masks.encode(progress=False)
    captions.encode(encode_captions, progress=False)
    return counts


def paint(path: Path, seed: int = 99) -> None:
    with Image.open(path) as image:
        size = image.size
    noise_image(size, seed).save(path)


def subset(change: Keys) -> Callable[[DatasetSpec], DatasetSpec]:
    return lambda spec: dataclasses.replace(spec, subsets=(dataclasses.replace(spec.subsets[0], **change),))  # type: ignore[arg-type]


def dataset(**change: object) -> Callable[[DatasetSpec], DatasetSpec]:
    return lambda spec: dataclasses.replace(spec, **change)  # type: ignore[arg-type]


def write(name: str, text: str) -> Callable[[Path, Path], None]:
    def change(pictures: Path, masks: Path) -> None:
        (pictures / name).write_text(text, encoding="utf-8")

    return change


def rename(pictures: Path, masks: Path) -> None:
    for path in (pictures / "a.png", pictures / "a.txt", masks / "a.png"):
        path.rename(path.with_stem("z"))


# three pictures, mirrored, with a mask each: 6 latents, 3 masks, 3 captions.
# name: what changes in the folders, in the dataset, in the run, and (latents, masks, captions) encoded again
TABLE: dict[
    str, tuple[Callable[[Path, Path], None] | None, Callable[[DatasetSpec], DatasetSpec] | None, Keys, tuple]
] = {
    "nothing": (None, None, {}, (0, 0, 0)),
    "a caption": (write("a.txt", "new"), None, {}, (0, 0, 1)),
    "a caption to another's": (write("a.txt", "caption of b.png"), None, {}, (0, 0, 0)),
    "an unused line of a caption": (write("a.txt", "caption of a.png\nmore"), None, {}, (0, 0, 0)),
    "a picture": (lambda pictures, masks: paint(pictures / "a.png"), None, {}, (2, 0, 0)),
    "the name of a picture, its caption and its mask": (rename, None, {}, (0, 0, 0)),
    "a mask": (lambda pictures, masks: paint(masks / "a.png"), None, {}, (0, 1, 0)),
    "the VAE": (None, None, {"vae": "other"}, (6, 0, 0)),
    "the text model": (None, None, {"text": "other"}, (0, 0, 3)),
    "the length of captions": (None, None, {"length": 64}, (0, 0, 3)),
    "the seed of captions that do not vary": (None, None, {"seed": 7}, (0, 0, 0)),
    "the size": (None, dataset(resolution=(32, 32)), {}, (6, 3, 0)),
    "the crop of one picture": (None, dataset(resolution=(64, 48)), {}, (6, 3, 0)),
    "mirroring off": (None, subset({"flip_aug": False}), {}, (0, 0, 0)),
    "masks off": (None, subset({"conditioning_data_dir": None}), {}, (0, 0, 0)),
    "masks by opacity": (None, subset({"conditioning_data_dir": None, "alpha_mask": True}), {}, (0, 3, 0)),
    "the filter": (None, dataset(resize_interpolation="nearest"), {}, (6, 0, 0)),
    "repeats": (None, subset({"num_repeats": 5}), {}, (0, 0, 0)),
    "the batch size": (None, dataset(batch_size=3), {}, (0, 0, 0)),
    "a prefix": (None, subset({"captions": CaptionSpec(caption_prefix="p")}), {}, (0, 0, 3)),
    "dropout, which needs the empty caption": (
        None,
        subset({"captions": CaptionSpec(caption_dropout_every_n_epochs=2)}),
        {},
        (0, 0, 1),
    ),
    "colours, which are not kept": (None, subset({"color_aug": True}), {}, (0, 0, 0)),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_change_encodes_exactly_its_own_entries(make_pictures: MakePictures, tmp_path: Path, name: str) -> None:
    pictures = make_pictures("set 图", {"a.png": (64, 64), "b.png": (80, 64), "c.png": (64, 100)})
    masks = make_pictures("masks", {"a.png": (64, 64), "b.png": (80, 64), "c.png": (64, 100)}, captions=False)
    for number, mask in enumerate(sorted(masks.glob("*.png"))):
        paint(mask, seed=50 + number)
    spec = DatasetSpec((SubsetSpec(pictures, flip_aug=True, conditioning_data_dir=masks),), (64, 64))
    run: Keys = {"vae": "vae", "text": "text", "length": 512, "seed": 1}
    assert prepared(spec, **run) == (6, 3, 3)  # type: ignore[arg-type]
    change_files, change_spec, change_run, expected = TABLE[name]
    if change_files:
        change_files(pictures, masks)
    changed = change_spec(spec) if change_spec else spec
    assert prepared(changed, **{**run, **change_run}) == expected  # type: ignore[arg-type]
    assert prepared(changed, **{**run, **change_run}) == (0, 0, 0)  # type: ignore[arg-type]
    if not change_files:
        assert prepared(spec, **run) == (0, 0, 0)  # type: ignore[arg-type]  # what was kept stays


def test_shuffled_captions_of_another_seed_or_more_epochs_are_added(make_pictures: MakePictures) -> None:
    pictures = make_pictures("set", {"a.png": (64, 64)})
    (pictures / "a.txt").write_text(", ".join(map(str, range(12))), encoding="utf-8")
    captions = CaptionSpec(shuffle_caption=True)
    spec = DatasetSpec((SubsetSpec(pictures, captions=captions),), (64, 64))
    assert prepared(spec, "vae", "text", 512, 1) == (1, 0, EPOCHS)
    assert prepared(spec, "vae", "text", 512, 1) == (0, 0, 0)
    assert prepared(spec, "vae", "text", 512, 2) == (0, 0, EPOCHS)
    twice = dataclasses.replace(spec, subsets=(dataclasses.replace(spec.subsets[0], num_repeats=2),))
    assert prepared(twice, "vae", "text", 512, 1) == (0, 0, EPOCHS)  # the second sample of each epoch
    assert np.prod(prepared(spec, "vae", "text", 512, 1)) == 0
