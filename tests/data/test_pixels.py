"""What the VAE sees of a picture: modes, rotation, resizing, cropping, mirroring."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anima_peft.data import DatasetSpec, Picture, load_pixels, place
from anima_peft.data.pixels import INTERPOLATIONS, _shrink, look_over
from anima_peft.errors import InputError


def picture_of(path: Path, spec: DatasetSpec) -> Picture:
    data = path.read_bytes()
    size = look_over(data).size
    return Picture(path, hashlib.sha256(data).hexdigest(), size, "", 1, False, place(size, spec), 0, 1)


def colours(pixels: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3) in 0..255."""
    return ((pixels + 1) * 127.5).round().permute(1, 2, 0).to(torch.uint8).numpy()


@pytest.fixture
def square() -> DatasetSpec:
    return DatasetSpec((), resolution=(32, 32))


def test_pixels_of_a_picture_that_fits(tmp_path: Path, square: DatasetSpec) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    rgb[0, 0], rgb[0, 1] = 0, 255
    Image.fromarray(rgb).save(tmp_path / "a.png")
    pixels = load_pixels(picture_of(tmp_path / "a.png", square), flip=False)
    assert (pixels.shape, pixels.dtype) == ((3, 32, 32), torch.float32)
    assert pixels.is_contiguous()
    assert (pixels.min(), pixels.max()) == (-1.0, 1.0)
    assert np.array_equal(colours(pixels), rgb)
    mirrored = load_pixels(picture_of(tmp_path / "a.png", square), flip=True)
    assert torch.equal(mirrored, pixels.flip(-1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_modes_keep_a_grey_ramp(tmp_path: Path, square: DatasetSpec, mode: str) -> None:
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    if mode == "1":
        ramp = np.where(ramp < 128, 0, 255).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode == "P":
        image = Image.fromarray(ramp).convert("P")
    else:
        image = Image.fromarray(ramp).convert("RGB").convert(mode, dither=Image.Dither.NONE)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path, quality=100) if mode == "CMYK" else image.save(path)
    with Image.open(path) as saved:
        assert saved.mode == mode
    pixels = colours(load_pixels(picture_of(path, square), flip=False)).astype(int)
    assert np.abs(pixels - ramp[:, :, None]).max() <= (3 if mode == "CMYK" else 0)


@pytest.mark.parametrize("name", INTERPOLATIONS)
@pytest.mark.parametrize("side", [96, 16], ids=["shrunk", "enlarged"])
def test_filters(tmp_path: Path, square: DatasetSpec, name: str, side: int) -> None:
    rgb = Image.fromarray(np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8))
    rgb.save(tmp_path / "a.png")
    picture = dataclasses.replace(picture_of(tmp_path / "a.png", square), interpolation=name)
    seen = colours(load_pixels(picture, flip=False)).astype(int)
    # Whole ratios: averaging areas is PIL's box filter.
    expected = np.asarray(rgb.resize((32, 32), INTERPOLATIONS[name] or Image.Resampling.BOX)).astype(int)
    assert np.abs(seen - expected).max() <= (1 if name == "area" else 0)


def test_transparency_is_dropped(tmp_path: Path, square: DatasetSpec) -> None:
    Image.new("RGBA", (32, 32), (200, 100, 50, 0)).save(tmp_path / "rgba.png")
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.save(tmp_path / "palette.png", transparency=b"\xff\x00")
    for name in ("rgba.png", "palette.png"):
        assert (colours(load_pixels(picture_of(tmp_path / name, square), flip=False)) == (200, 100, 50)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((32, 64, 3), np.uint8)
    upright[:16, :16] = (255, 0, 0)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    picture = picture_of(tmp_path / "a.png", DatasetSpec((), resolution=(64, 32)))
    assert picture.size == (64, 32)
    assert np.array_equal(colours(load_pixels(picture, flip=False)), upright)


def area_by_overlap(values: np.ndarray, length: int) -> np.ndarray:
    """Mean of (n,) values over `length` intervals, from the overlap of each with each pixel."""
    scale = len(values) / length
    weights = np.array(
        [[max(0.0, min((i + 1) * scale, j + 1) - max(i * scale, j)) for j in range(len(values))] for i in range(length)]
    )
    return weights @ values / scale


@pytest.mark.parametrize(("source", "length"), [(64, 32), (50, 32), (33, 32), (100, 7), (96, 96), (1000, 999)])
def test_shrinking_averages_areas(source: int, length: int) -> None:
    values = np.random.default_rng(source).integers(0, 256, source)
    for axis in (0, 1):
        pixels = np.broadcast_to(
            values.reshape(-1, 1, 1) if axis == 0 else values.reshape(1, -1, 1), (source,) * 2 + (1,)
        )
        mean = _shrink(pixels.astype(np.uint8), length, axis)
        np.testing.assert_allclose(
            mean[:, 0, 0] if axis == 0 else mean[0, :, 0], area_by_overlap(values, length), atol=1e-2
        )


def test_shrinking_by_whole_numbers_equals_pil(tmp_path: Path, square: DatasetSpec) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    pixels = colours(load_pixels(picture_of(tmp_path / "a.png", square), flip=False)).astype(int)
    assert np.abs(pixels - np.asarray(image.resize((32, 32), Image.Resampling.BOX))).max() <= 1


def test_enlarging_is_lanczos_and_the_middle_is_cut_out(tmp_path: Path, square: DatasetSpec) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    pixels = colours(load_pixels(picture_of(tmp_path / "a.png", square), flip=False))
    assert np.array_equal(pixels, np.asarray(image.resize((48, 32), Image.Resampling.LANCZOS))[:, 8:40])


def test_a_picture_that_is_gone(tmp_path: Path, square: DatasetSpec) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "消えた.png")
    picture = picture_of(tmp_path / "消えた.png", square)
    picture.path.unlink()
    with pytest.raises(InputError, match=r"消えた\.png: cannot read this file any more"):
        load_pixels(picture, flip=False)


def test_a_picture_that_changed_after_it_was_checked(tmp_path: Path, square: DatasetSpec) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    picture = picture_of(tmp_path / "a.png", square)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    with pytest.raises(InputError, match="changed after it was checked"):
        load_pixels(picture, flip=False)
