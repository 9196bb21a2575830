"""Picture folders with everything wrong in them: one report names each fault, and nothing is written."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, features

from anima_peft.data import DatasetSpec, SubsetSpec, scan
from anima_peft.data.caching import plan_latents
from anima_peft.data.pictures import decode
from anima_peft.data.pixels import decode_rgb
from anima_peft.errors import InputError

from .hostile import POSIX, bind_socket, picture, png, sparse

Make = Callable[[Path], object]


def content(data: bytes) -> Make:
    return lambda path: path.write_bytes(data)


def link(target: str) -> Make:
    return lambda path: path.symlink_to(target)


def damaged_avif(path: Path) -> None:
    """What the AVIF decoder opens and then cannot decode, where PIL has it."""
    data = picture("AVIF", size=(64, 64)) if features.check("avif") else bytes(99)
    path.write_bytes(data[:-40] + bytes(40))


UNKNOWN = "not a picture of a kind that can be read"
NO_FILE = "a pipe, socket or device, and not a file"
PNG, JPEG = picture(), picture("JPEG")
# file -> how it is made, and the reason that is given for it
PICTURES: dict[str, tuple[Make, str]] = {
    "empty.png": (content(b""), UNKNOWN),
    "text.jpg": (content(b"<!DOCTYPE html><html></html>"), UNKNOWN),
    "lfs pointer.png": (content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), UNKNOWN),
    "zip.webp": (content(b"PK\x03\x04" + bytes(60)), UNKNOWN),
    "pickle.bmp": (content(b"\x80\x04\x95cos\nsystem\n."), UNKNOWN),
    "cut 切断.png": (content(PNG[: len(PNG) * 2 // 3]), "image file is truncated"),
    "cut.jpg": (content(JPEG[:-60]), ""),
    "cut.webp": (content(picture("WEBP")[:-20]), ""),
    "cut.bmp": (content(picture("BMP")[:-500]), "image file is truncated"),
    "damaged avif.png": (damaged_avif, ""),
    "cut gif.png": (content(picture("GIF")[:-1] + b"!"), "index out of range"),
    "header only.png": (content(PNG[:33]), ""),
    "magic only.png": (content(b"\x89PNG\r\n\x1a\n"), UNKNOWN),
    "bomb.png": (content(png((60_000, 60_000))), "Image size (3600000000 pixels) exceeds limit of 178956970"),
    "bomb.bmp": (
        content(b"BM" + bytes(8) + b"\x36\0\0\0\x28\0\0\0\0\0\1\0\0\0\1\0\1\0\x18" + bytes(25)),
        "Image size (4294967296 pixels) exceeds limit",
    ),
    "largest.png": (content(png((2**31 - 1, 2**31 - 1))), "Image size (4611686014132420609 pixels)"),
    "negative.png": (content(png((2**32 - 1, 1))), ""),
    "lies.png": (content(png((4000, 4000))), "image file is truncated"),
    "no size.png": (content(png((0, 0))), UNKNOWN),
    "depth.png": (content(png(depth=7)), UNKNOWN),
    "text bomb.png": (
        content(png(chunks=[(b"zTXt", b"a\0\0" + zlib.compress(bytes(9_000_000)))])),
        "Decompressed data too large",
    ),
    "text.png": (content(png(chunks=[(b"tEXt", b"a\0" + bytes(17_000_000))] * 4)), "Too much memory used in text"),
    "profile bomb.png": (
        content(png(chunks=[(b"iCCP", b"a\0\0" + zlib.compress(bytes(9_000_000)))])),
        "Decompressed data too large",
    ),
    "checksum.png": (content(PNG[:20] + b"\1" + PNG[21:]), UNKNOWN),
    "postscript.png": (content(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"), UNKNOWN),
    "tiff.png": (content(picture("TIFF")), UNKNOWN),
    "icon.png": (content(picture("ICO")), UNKNOWN),
    "photoshop.png": (content(b"8BPS\0\1" + bytes(6) + b"\0\3" + b"\0\0\0\x20" * 2 + b"\0\x08\0\3"), UNKNOWN),
    "huge.png": (lambda path: sparse(path, 100 * 2**30), f"{100 * 2**30} bytes, expected at most {2**30}"),
    "folder.png": (lambda path: path.mkdir(), "a folder, and not a file"),
}
ON_POSIX: dict[str, tuple[Make, str]] = {
    "pipe.png": (lambda path: os.mkfifo(path), NO_FILE),
    "socket.png": (bind_socket, NO_FILE),
    "zeros.png": (link("/dev/zero"), NO_FILE),
    "nowhere.png": (link("../gone.png"), "No such file or directory"),
    "loop.png": (link("loop.png"), "Too many levels of symbolic links"),
    "line\nbreak\x1b[2J.png": (content(b""), UNKNOWN),
}
GOOD = {"good.png": PNG, "名 前　二.jpg": JPEG, "gif.png": picture("GIF"), "photo.jpg": picture("MPO", frames=2)}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with all of it, and the faults that one scan finds."""
    folder = tmp_path_factory.mktemp("pictures") / "图 片"
    folder.mkdir()
    for name, (make, _) in {**PICTURES, **(ON_POSIX if os.name == "posix" else {})}.items():
        make(folder / name)
    for name, data in GOOD.items():
        (folder / name).write_bytes(data)
    before = sorted(folder.iterdir())
    with pytest.raises(InputError) as error:
        scan([DatasetSpec((SubsetSpec(folder, class_tokens="a"),), (32, 32))], progress=False)
    assert sorted(folder.iterdir()) == before
    heading, *faults = str(error.value).split("\n  - ")
    assert heading == "The dataset cannot be used:"
    return folder, faults


@pytest.mark.parametrize("name", [*PICTURES, *(pytest.param(name, marks=POSIX) for name in ON_POSIX)])
def test_every_fault_is_in_one_report(name: str, report: tuple[Path, list[str]]) -> None:
    folder, faults = report
    reason = {**PICTURES, **ON_POSIX}[name][1]
    (found,) = [fault for fault in faults if fault.startswith(f"{folder / name}: ")]
    assert found.startswith(f"{folder / name}: cannot read this picture ({reason}")
    assert found.endswith("); replace or remove it")


def test_good_pictures_are_no_faults(report: tuple[Path, list[str]]) -> None:
    folder, faults = report
    assert len(faults) == len(PICTURES) + (len(ON_POSIX) if os.name == "posix" else 0)
    assert not [fault for fault in faults if any(str(folder / name) in fault for name in GOOD)]


def folder_of(path: Path, **files: bytes) -> DatasetSpec:
    for name, data in files.items():
        (path / name.replace("_", ".")).write_bytes(data)
    return DatasetSpec((SubsetSpec(path, class_tokens="a"),), (32, 32))


def test_of_an_animation_the_first_frame_is_trained_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forms = {"a_png": picture(frames=3), "b_webp": picture("WEBP", frames=2), "c_png": picture("GIF", frames=2)}
    spec = folder_of(tmp_path, **forms, still_png=PNG, photo_jpg=picture("MPO", frames=2))
    for _ in range(2):  # the second time from the index, without opening the files
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = scan([spec], progress=False)
        assert len(found) == 5
        (record,) = caplog.records
        names = ", ".join(str(tmp_path / name) for name in ("a.png", "b.webp", "c.png"))
        assert record.getMessage() == f"3 pictures are animations, of which only the first frame is trained: {names}"
    for data in forms.values():
        assert decode_rgb(data).getpixel((0, 0))[0] < 20  # type: ignore[index]


@POSIX
def test_links_to_pictures_are_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "blob").write_bytes(PNG)
    (tmp_path / "elsewhere" / "text").write_text("of the link")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.png").symlink_to("../elsewhere/blob")
    (folder / "a.txt").symlink_to("../elsewhere/text")
    (found,) = scan([DatasetSpec((SubsetSpec(folder),), (32, 32))], progress=False)
    assert (found.path, found.caption) == (folder / "a.png", "of the link")


@POSIX
def test_names_that_are_no_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = os.fsdecode(b"\xff\xfe.png")
    caplog.set_level(logging.CRITICAL)  # pytest itself cannot hand on such names
    spec = DatasetSpec((SubsetSpec(tmp_path),), (32, 32))
    (tmp_path / name).write_bytes(PNG)
    for _ in range(2):
        (found,) = scan([spec], progress=False)
        assert found.path.name == name


def test_pictures_of_one_stem_are_two_pictures(tmp_path: Path) -> None:
    spec = folder_of(tmp_path, a_png=PNG, a_jpg=JPEG, a_txt=b"both")
    found = scan([spec], progress=False)
    assert [(p.path.name, p.caption) for p in found] == [("a.jpg", "both"), ("a.png", "both")]


# Masks are pictures too.
MASKS: dict[str, tuple[bytes, str]] = {
    "cut": (PNG[:60], "cannot read this picture"),
    "bomb": (png((60_000, 60_000)), "exceeds limit of 178956970"),
    "text": (b"x", UNKNOWN),
    "shape": (picture(size=(32, 8)), "has 32 x 8 pixels, which is another shape than the picture's 32 x 32"),
}


@pytest.mark.parametrize("case", MASKS)
def test_faulty_masks(case: str, tmp_path: Path) -> None:
    folder, masks = tmp_path / "pictures", tmp_path / "masks"
    folder.mkdir()
    masks.mkdir()
    (folder / "a.png").write_bytes(PNG)
    (masks / "a.png").write_bytes(MASKS[case][0])
    subset = SubsetSpec(folder, class_tokens="a", conditioning_data_dir=masks)
    with pytest.raises(InputError) as error:
        scan([DatasetSpec((subset,), (32, 32))], progress=False)
    assert str(masks / "a.png") in str(error.value)
    assert MASKS[case][1] in str(error.value)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = folder_of(tmp_path, a_png=PNG)
    real = Path.mkdir

    def read_only(self: Path, *args: object, **options: object) -> None:
        if self.name == ".anima_cache":
            raise PermissionError(13, "Permission denied", str(self))
        real(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(
        InputError, match=r"\.anima_cache: cannot write the cache here \(Permission denied\).*cache_dir"
    ):
        scan([spec], progress=False)


def test_an_index_that_lies_of_a_size(tmp_path: Path) -> None:
    spec = folder_of(tmp_path, a_png=PNG)
    scan([spec], progress=False)
    index = tmp_path / ".anima_cache" / "index.json"
    index.write_text(index.read_text().replace("32,\n32", "64,\n16"))
    (lied,) = scan([spec], progress=False)
    with pytest.raises(InputError, match=r"a\.png: has 32 x 32 pixels, and index\.json .* says 64 x 16; remove index"):
        decode(lied)
    with pytest.raises(InputError, match=r"a\.png: has 32 x 32 pixels"):
        plan_latents([lied], model="m").encode(lambda pixels: pixels, progress=False)


def test_pictures_with_many_pixels_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anima_peft.data.pixels._LARGE", 100)
    held: list[bool] = []

    class Lock:
        def __enter__(self) -> None:
            held.append(True)

        def __exit__(self, *error: object) -> None:
            held.append(False)

    monkeypatch.setattr("anima_peft.data.pixels._decoding_large", Lock())
    assert decode_rgb(PNG).size == (32, 32)
    assert held == [True, False]
    Image.init()
    assert decode_rgb(picture(size=(8, 8))).size == (8, 8)
    assert len(held) == 2
