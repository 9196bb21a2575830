"""Finding and checking pictures and captions: what is found, and every fault in one report."""

from __future__ import annotations

import codecs
import dataclasses
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, features

from anima_peft.data import DatasetSpec, SubsetSpec, pictures, scan
from anima_peft.errors import InputError

MakePictures = Callable[..., Path]


def dataset(*folders: Path, **options: object) -> DatasetSpec:
    return DatasetSpec(tuple(SubsetSpec(folder) for folder in folders), resolution=(32, 32), **options)  # type: ignore[arg-type]


def test_pictures_come_in_natural_order_with_their_captions(spec: DatasetSpec, folder: Path) -> None:
    (folder / "notes.md").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "sub").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "sub" / "deeper.png")
    found = scan([spec, dataset(folder)], progress=False)
    assert [picture.path.name for picture in found] == ["1 一.png", "2 二.png", "10 十.png"] * 2
    assert [picture.dataset_index for picture in found] == [0, 0, 0, 1, 1, 1]
    first, last = found[0], found[2]
    assert (first.caption, first.size, first.num_repeats, first.flip_aug) == ("caption of 1 一.png", (64, 64), 2, True)
    assert (last.size, last.placement.bucket, last.batch_size) == ((128, 32), (128, 32), 2)
    assert found[3].placement.bucket == (32, 32)


def test_suffixes_in_any_case(make_pictures: MakePictures) -> None:
    names = ["a.PNG", "b.jpg", "c.JPEG", "d.webp", "e.Bmp"]
    if features.check("avif"):
        names.append("f.avif")
    folder = make_pictures("pictures", dict.fromkeys(names, (32, 32)))
    assert [picture.path.name for picture in scan([dataset(folder)], progress=False)] == names


def test_exif_rotation_turns_the_size(make_pictures: MakePictures) -> None:
    folder = make_pictures("pictures", {"a.png": (32, 32)})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40)).save(folder / "turned.jpg", exif=exif)
    assert [picture.size for picture in scan([dataset(folder)], progress=False)] == [(32, 32), (40, 80)]


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"1girl, solo \n second line", "1girl, solo"),
        ("日本語の説明\r\nrest".encode(), "日本語の説明"),
        (codecs.BOM_UTF8 + "中文".encode(), "中文"),
        ("中文\r\nx".encode("utf-16"), "中文"),
        (codecs.BOM_UTF16_BE + "中文".encode("utf-16-be"), "中文"),
        ("one\u2028line".encode(), "one\u2028line"),
        (b"\n \nsecond line", "second line"),
        (b"", ""),
    ],
)
def test_captions_are_the_first_line(make_pictures: MakePictures, content: bytes, caption: str) -> None:
    folder = make_pictures("pictures", {"a.b.png": (32, 32)})
    (folder / "a.b.txt").write_bytes(content)
    assert scan([dataset(folder)], progress=False)[0].caption == caption


def test_pictures_of_one_stem_share_a_caption(make_pictures: MakePictures) -> None:
    folder = make_pictures("pictures", {"a.png": (32, 32), "a.jpg": (32, 32)})
    (folder / "a.txt").write_text("shared")
    assert [picture.caption for picture in scan([dataset(folder)], progress=False)] == ["shared", "shared"]


def test_missing_captions_are_class_tokens_or_one_warning(
    make_pictures: MakePictures, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_pictures("pictures", {f"{i}.png": (32, 32) for i in range(7)}, captions=False)
    with caplog.at_level(logging.WARNING):
        found = scan([dataset(folder), dataset(folder)], progress=False)
    assert {picture.caption for picture in found} == {""}
    assert len(caplog.records) == 1
    assert "7 pictures" in caplog.text
    assert str(folder / "4.png") in caplog.text
    assert "5.png" not in caplog.text

    caplog.clear()
    subset = SubsetSpec(folder, class_tokens="a cat", caption_extension="caption")
    (folder / "3.caption").write_text("a dog")
    found = scan([DatasetSpec((subset,), (32, 32))], progress=False)
    assert [picture.caption for picture in found] == ["a cat"] * 3 + ["a dog"] + ["a cat"] * 3
    assert not caplog.records


def test_all_faults_come_in_one_report_and_nothing_is_written(
    make_pictures: MakePictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_pictures(
        "one 一", {"good.png": (32, 32), "cut.png": (64, 64), "cut.jpg": (64, 64), "bomb.png": (99, 99)}
    )
    for name in ("cut.png", "cut.jpg"):
        data = (one / name).read_bytes()
        (one / name).write_bytes(data[: len(data) * 2 // 3])
    (one / "text.webp").write_text("not a picture")
    (one / "empty.bmp").write_bytes(b"")
    (one / "good.txt").write_bytes("日本語".encode("shift-jis"))
    two = make_pictures("two", {"thin.png": (64, 8)})
    (two / "thin.txt").unlink()
    (two / "thin.txt").mkdir()
    empty = make_pictures("empty", {})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4200)
    no_upscale = dataset(two, enable_bucket=True, bucket_reso_steps=16, bucket_no_upscale=True)
    no_buckets = DatasetSpec((SubsetSpec(one), SubsetSpec(tmp_path / "away")), (500, 500))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as caught:
        scan([dataset(one, empty, tmp_path / "nowhere"), no_upscale, no_buckets], progress=False)
    report = str(caught.value)
    for words in (
        f"{one / 'cut.png'}: cannot read this picture",
        f"{one / 'cut.jpg'}: cannot read this picture",
        f"{one / 'text.webp'}: cannot read this picture",
        f"{one / 'empty.bmp'}: cannot read this picture",
        f"{one / 'bomb.png'}: cannot read this picture (Image size (9801 pixels) exceeds limit",
        f"{one / 'good.txt'}: this caption file is not UTF-8",
        f"datasets[0].subsets[1].image_dir = {str(empty)!r}: no pictures",
        f"datasets[0].subsets[2].image_dir = {str(tmp_path / 'nowhere')!r}: not a folder",
        f"{two / 'thin.txt'}: cannot read this caption file",
        f"{two / 'thin.png'}: 64 x 8 pixels leave a side shorter",
        "datasets[2]: resolution 500 x 500",
        f"datasets[2].subsets[1].image_dir = {str(tmp_path / 'away')!r}: not a folder",
    ):
        assert words in report
    assert len(report.splitlines()) == 13
    assert sorted(tmp_path.rglob("*")) == before


def test_unchanged_files_are_not_read_again(spec: DatasetSpec, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    inspect = pictures._inspect

    def counting(path: Path) -> object:
        read.append(path.name)
        return inspect(path)

    monkeypatch.setattr(pictures, "_inspect", counting)
    first = scan([spec, dataset(folder)], progress=False)
    assert sorted(read) == ["1 一.png", "10 十.png", "2 二.png"]
    read.clear()
    assert scan([spec, dataset(folder)], progress=False) == first
    assert read == []

    # A dataset that moves keeps its index.
    moved = folder.rename(folder.with_name("moved"))
    scan([dataset(moved)], progress=False)
    assert read == []

    Image.new("RGB", (64, 64)).save(moved / "2 二.png")
    changed = scan([dataset(moved)], progress=False)
    assert read == ["2 二.png"]
    assert [a.sha256 == b.sha256 for a, b in zip(first, changed, strict=False)] == [True, False, True]


def test_a_good_picture_that_is_cut_later_is_reported(spec: DatasetSpec, folder: Path) -> None:
    scan([spec], progress=False)
    (folder / "2 二.png").write_bytes((folder / "2 二.png").read_bytes()[:-900])
    with pytest.raises(InputError, match=r"2 二\.png: cannot read this picture"):
        scan([spec], progress=False)


def test_one_cache_folder_for_all(make_pictures: MakePictures, tmp_path: Path) -> None:
    folders = [make_pictures(name, {"a.png": (32, 32)}) for name in ("one", "two")]
    scan([dataset(*folders)], cache_dir=tmp_path / "cache", progress=False)
    assert (tmp_path / "cache" / "index.json").is_file()
    assert [sorted(path.name for path in folder.iterdir()) for folder in folders] == [["a.png", "a.txt"]] * 2


def test_a_cache_folder_that_cannot_be_written(spec: DatasetSpec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cache_dir"):
        scan([spec], cache_dir=tmp_path / "file" / "cache", progress=False)


def test_progress_is_shown_only_while_files_are_read(
    spec: DatasetSpec, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    scan([spec])
    assert "checking pictures" in capsys.readouterr().err
    scan([dataclasses.replace(spec, batch_size=1)])
    assert capsys.readouterr().err == ""
