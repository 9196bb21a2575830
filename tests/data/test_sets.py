"""Regularisation sets, size limits, several resolutions of one folder, and masks: what of them is found and faulty."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anima_peft.data import DatasetSpec, Picture, SubsetSpec, scan
from anima_peft.data.buckets import place
from anima_peft.data.masks import MaskSource, load_mask
from anima_peft.errors import InputError

MakePictures = Callable[..., Path]


def folders(make_pictures: MakePictures, train: int, regular: int) -> tuple[Path, Path]:
    return (
        make_pictures("train", {f"{n}.png": (32, 32) for n in range(train)}),
        make_pictures("reg", {f"r{n}.png": (32, 32) for n in range(regular)}),
    )


def repeats(pictures: tuple[Picture, ...]) -> dict[str, int]:
    return {picture.path.stem: picture.num_repeats for picture in pictures if picture.is_reg}


@pytest.mark.parametrize(
    ("train", "train_repeats", "regular", "regular_repeats", "expected"),
    [
        # (pictures, repeats) of each, and the repeats of the regularisation pictures, by sd-scripts' loop
        (2, 5, 3, 1, {"r0": 4, "r1": 3, "r2": 3}),
        (2, 1, 2, 1, {"r0": 1, "r1": 1}),
        (2, 1, 5, 1, {"r0": 1, "r1": 1}),
        (5, 1, 3, 2, {"r0": 2, "r1": 2, "r2": 2}),
        (5, 1, 4, 3, {"r0": 3, "r1": 3}),
        (7, 1, 1, 2, {"r0": 7}),
    ],
)
def test_regularisation_pictures_are_balanced_as_in_sd_scripts(
    make_pictures: MakePictures,
    train: int,
    train_repeats: int,
    regular: int,
    regular_repeats: int,
    expected: dict[str, int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    own, others = folders(make_pictures, train, regular)
    subsets = (SubsetSpec(others, regular_repeats, is_reg=True), SubsetSpec(own, train_repeats))
    with caplog.at_level(logging.WARNING):
        pictures = scan([DatasetSpec(subsets, (32, 32))], progress=False)
    assert repeats(pictures) == expected
    assert sum(not picture.is_reg for picture in pictures) == train
    left_out = regular - len(expected)
    assert (f"{left_out} regularisation pictures are left out" in caplog.text) == (left_out > 0)


def test_a_dataset_of_regularisation_pictures_alone_is_refused(make_pictures: MakePictures) -> None:
    own, others = folders(make_pictures, 1, 1)
    specs = [DatasetSpec((SubsetSpec(own),), (32, 32)), DatasetSpec((SubsetSpec(others, is_reg=True),), (32, 32))]
    with pytest.raises(InputError, match=r"datasets\[1\]: only regularisation pictures"):
        scan(specs, progress=False)


def test_pictures_up_to_the_limit_are_left_out(make_pictures: MakePictures, caplog: pytest.LogCaptureFixture) -> None:
    """As sd-scripts' documentation has it: of one folder at several resolutions, each picture where it is large."""
    sizes = {"a.png": (32, 32), "b.png": (48, 48), "c.png": (31, 33), "d.png": (64, 64), "e.png": (100, 10)}
    spec = DatasetSpec((SubsetSpec(make_pictures("set", sizes)),), (32, 32))
    larger = dataclasses.replace(spec, resolution=(64, 64), skip_image_resolution=(32, 32))
    with caplog.at_level(logging.WARNING):
        found = scan([spec, larger], progress=False)
    names = [[p.path.stem for p in found if p.dataset_index == index] for index in (0, 1)]
    assert names == [["a", "b", "c", "d", "e"], ["b", "d"]]
    assert {p.placement.bucket for p in found if p.dataset_index == 1} == {(64, 64)}
    assert "3 pictures are left out, because they are not larger than skip_image_resolution" in caplog.text
    nothing = dataclasses.replace(spec, skip_image_resolution=(64, 64))
    with pytest.raises(InputError, match=r"datasets\[0\]: skip_image_resolution leaves none of its pictures"):
        scan([nothing], progress=False)


def masked(folder: Path, masks: Path) -> DatasetSpec:
    return DatasetSpec((SubsetSpec(folder, conditioning_data_dir=masks),), (32, 32))


def test_masks_are_found_by_stem(make_pictures: MakePictures) -> None:
    folder = make_pictures("set", {"a.png": (32, 32), "b.png": (64, 64)})
    masks = make_pictures("masks 遮罩", {"a.jpg": (64, 64), "b.png": (64, 64), "c.png": (9, 9)}, captions=False)
    found = scan([masked(folder, masks)], progress=False)
    assert [picture.mask and picture.mask.path.name for picture in found] == ["a.jpg", "b.png"]
    assert not any(picture.mask and picture.mask.from_alpha for picture in found)
    assert not (masks / ".anima_cache").exists()


@pytest.mark.parametrize(
    ("masks", "fault"),
    [
        ({"b.png": (32, 32)}, "no mask under this name in"),
        ({"a.png": (32, 16)}, "has 32 x 16 pixels, which is another shape than the picture's 32 x 32"),
        ({"a.png": (32, 32), "a.jpg": (32, 32)}, "are masks for the same picture; remove one"),
        (None, "not a folder that can be read"),
    ],
)
def test_faulty_masks(make_pictures: MakePictures, masks: dict[str, tuple[int, int]] | None, fault: str) -> None:
    folder = make_pictures("set", {"a.png": (32, 32)})
    place = folder / "none" if masks is None else make_pictures("masks", masks, captions=False)
    with pytest.raises(InputError) as caught:
        scan([masked(folder, place)], progress=False)
    assert fault in str(caught.value)


def source(path: Path, *, from_alpha: bool) -> MaskSource:
    return MaskSource(path, hashlib.sha256(path.read_bytes()).hexdigest(), from_alpha)


def test_a_mask_is_the_mean_over_each_latent_where_the_picture_is_placed(tmp_path: Path) -> None:
    """A picture of 64 x 32 in a bucket of 32 x 32: the middle is kept. White right of the middle."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, 36:] = 255
    Image.fromarray(pixels).save(tmp_path / "m.png")
    placement = place((64, 32), DatasetSpec((), (32, 32)))
    mask = load_mask(source(tmp_path / "m.png", from_alpha=False), placement)
    assert (mask.shape, mask.dtype) == ((1, 4, 4), torch.float32)
    assert torch.equal(mask[0], torch.tensor([0, 0, 0.5, 1]).expand(4, 4))
    moved = load_mask(source(tmp_path / "m.png", from_alpha=False), placement, crop=(28, 0))
    assert torch.equal(moved[0], torch.tensor([0, 1, 1, 1.0]).expand(4, 4))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_opacity_as_a_mask(tmp_path: Path, mode: str) -> None:
    alpha = Image.fromarray(np.tile(np.repeat(np.array([0, 255], np.uint8), 16), (32, 1)))
    image = Image.new("RGB", (32, 32), "red")
    if mode == "P":
        image = Image.fromarray(np.tile(np.repeat(np.array([0, 1], np.uint8), 16), (32, 1))).convert("P")
        image.putpalette([255, 0, 0, 0, 255, 0])
        image.save(tmp_path / "a.png", transparency=b"\x00\xff")
    else:
        if mode != "RGB":
            image = image.convert(mode)
            image.putalpha(alpha)
        image.save(tmp_path / "a.png")
    placement = place((32, 32), DatasetSpec((), (32, 32)))
    mask = load_mask(source(tmp_path / "a.png", from_alpha=True), placement)
    assert torch.equal(mask[0], torch.tensor([1, 1, 1, 1.0] if mode == "RGB" else [0, 0, 1, 1.0]).expand(4, 4))


def test_enlarging_a_mask_leaves_no_values_beyond_its_own(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 2, (10, 10), dtype=np.uint8) * 255
    Image.fromarray(pixels).save(tmp_path / "m.png")
    mask = load_mask(source(tmp_path / "m.png", from_alpha=False), place((10, 10), DatasetSpec((), (64, 64))))
    assert 0 <= mask.min() < mask.max() <= 1
