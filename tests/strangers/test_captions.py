"""Caption files and metadata files in odd encodings, of odd sizes, with odd content, or leading out of the folder."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from anima_peft.data import DatasetSpec, SubsetSpec, scan
from anima_peft.data.captions import MOST_CAPTION_BYTES, read_caption
from anima_peft.errors import InputError

from .hostile import POSIX, picture, sparse

Make = Callable[[Path], object]
NO_UTF8 = "this caption file is not UTF-8 (byte {}"
MEND = "; save it as UTF-8"


def content(data: bytes) -> Make:
    return lambda path: path.write_bytes(data)


# how it is made, and what is said of it
CAPTIONS: dict[str, tuple[Make, str, str]] = {
    "GBK": (content("一个女孩，长发".encode("gbk")), NO_UTF8.format(""), MEND),
    "GB 18030": (content("一个女孩".encode("gb18030")), NO_UTF8.format(""), MEND),
    "Big5": (content("女孩".encode("big5")), NO_UTF8.format(0), MEND),
    "Shift JIS": (content("少女、長い髪".encode("shift-jis")), NO_UTF8.format(0), MEND),
    "EUC-KR": (content("소녀".encode("euc-kr")), NO_UTF8.format(0), MEND),
    "Latin 1": (content("une fée".encode("latin-1")), NO_UTF8.format(5), MEND),
    "UTF-16 without a mark": (content("1girl, solo".encode("utf-16-le")), "has NUL characters, as UTF-16", MEND),
    "UTF-16 BE without a mark": (content("1girl".encode("utf-16-be")), "has NUL characters, as UTF-16", MEND),
    "UTF-16 cut": (content(codecs.BOM_UTF16_LE + "ab".encode("utf-16-le")[:-1]), NO_UTF8.format(4), MEND),
    "UTF-16 with half a pair": (content(codecs.BOM_UTF16_LE + b"\x00\xd8a\0"), NO_UTF8.format(2), MEND),
    "UTF-32": (content("ab".encode("utf-32")), "has NUL characters", MEND),
    "half a surrogate pair": (content(b"a \xed\xa0\x80"), NO_UTF8.format(2), MEND),
    "overlong": (content(b"\xc0\xaf"), NO_UTF8.format(0), MEND),
    "cut in a character": (content("猫".encode()[:-1]), NO_UTF8.format(0), MEND),
    "a NUL": (content(b"a\0b"), "has NUL characters", MEND),
    "a picture": (content(picture()), NO_UTF8.format(0), MEND),
    "huge": (lambda path: sparse(path, 30 * 2**30), f"({30 * 2**30} bytes, expected at most {MOST_CAPTION_BYTES})", ""),
    "a folder": (lambda path: path.mkdir(), "cannot read this caption file (a folder, and not a file)", ""),
}
ON_POSIX: dict[str, tuple[Make, str, str]] = {
    "a pipe": (lambda path: os.mkfifo(path), "(a pipe, socket or device, and not a file)", ""),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "(a pipe, socket or device, and not a file)", ""),
    "a loop": (lambda path: path.symlink_to(path.name), "(Too many levels of symbolic links)", ""),
}


@pytest.mark.parametrize("case", [*CAPTIONS, *(pytest.param(case, marks=POSIX) for case in ON_POSIX)])
def test_caption_files_that_are_refused(case: str, tmp_path: Path) -> None:
    make, words, advice = {**CAPTIONS, **ON_POSIX}[case]
    path = tmp_path / "标 签.txt"
    make(path)
    with pytest.raises(InputError) as error:
        read_caption(path)
    assert str(error.value).startswith(f"{path}: ")
    assert words in str(error.value)
    assert str(error.value).endswith(advice)


def test_faulty_captions_and_pictures_are_in_one_report(tmp_path: Path) -> None:
    for number, (make, _, _) in enumerate(CAPTIONS.values()):
        (tmp_path / f"{number}.png").write_bytes(picture())
        make(tmp_path / f"{number}.txt")
    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(InputError) as error:
        scan([DatasetSpec((SubsetSpec(tmp_path),), (32, 32))], progress=False)
    faults = str(error.value).split("\n  - ")[1:]
    files = [f"{number}.txt" for number in range(len(CAPTIONS))] + ["broken.png"]
    assert [fault.split(": ")[0] for fault in faults] == [str(tmp_path / name) for name in files]


@pytest.mark.parametrize(
    ("data", "caption"),
    [
        (b"", ""),
        (b"\n \r\n\t\n", ""),
        (codecs.BOM_UTF8, ""),
        (codecs.BOM_UTF16_LE, ""),
        (b"a\x1b[2Jb\x07", "a\x1b[2Jb\x07"),  # what it is, and shown escaped
        ("\u202egnp.\u202c".encode(), "\u202egnp.\u202c"),
        ("\ufffe猫".encode(), "\ufffe猫"),
        (b"a\rb\r\nc\nd", "a\nb\nc\nd"),
    ],
)
def test_caption_files_that_are_taken_as_they_are(data: bytes, caption: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    assert read_caption(tmp_path / "a.txt") == caption


DEEP = "[" * 100_000
# file, content, words of the fault
METADATA: dict[str, tuple[str, str, str]] = {
    "deep": ("m.json", DEEP, "not JSON (maximum recursion depth"),
    "deep lines": ("m.jsonl", '{"image_path": "a.png"}\n' + DEEP, "line 2 is not JSON"),
    "a number of 5000 digits": ("m.json", '{"a.png": {"caption": ' + "9" * 5000 + "}}", "not JSON (Exceeds the limit"),
    "no number": ("m.json", '{"a.png": {"caption": NaN}}', '"a.png": expected a text under "caption"'),
    "half a pair": ("m.json", r'{"a.png": {"caption": "\ud800"}}', 'the text under "caption" has half of a surrogate'),
    "half a pair in tags": (
        "m.json",
        r'{"a.png": {"tags": "\udfff"}}',
        'the text under "tags" has half of a surrogate',
    ),
    "a NUL": ("m.json", r'{"a.png": {"caption": "a\u0000"}}', 'the text under "caption" has NUL characters'),
    "a NUL in a list": ("m.json", r'{"a.png": {"caption": ["a", "\u0000"]}}', "has NUL characters"),
    "a key twice": ("m.json", '{"a.png": {"caption": "x"}, "a.png": {"caption": "y"}}', "'a.png' stands in it twice"),
    "a caption twice": ("m.jsonl", '{"image_path": "a.png", "caption": "x", "caption": "y"}', "stands in it twice"),
    "up": ("m.json", '{"../other/b.png": {}}', "'../other/b.png' is outside of image_dir"),
    "up and down": ("m.json", '{"x/../../other/b.png": {}}', "is outside of image_dir"),
    "another folder": ("m.json", '{"OTHER/b.png": {}}', "is outside of image_dir"),
    "another drive": ("m.json", r'{"\\\\server\\share\\a.png": {}}', "server"),
    "the folder": ("m.json", '{".": {}}', "there is no picture"),
    "a NUL in a path": ("m.json", r'{"a\u0000.png": {}}', "there is no picture"),
    "half a pair in a path": ("m.json", r'{"\ud800.png": {}}', "there is no picture"),
    "a long path": ("m.json", json.dumps({"a" * 5000 + ".png": {}}), "there is no picture"),
    "a long folder": ("m.json", json.dumps({"a" * 5000 + "/a.png": {}}), "there is no picture"),
    "an empty path": ("m.json", '{"": {}}', 'expected an object with a text "image_path"'),
    "a path that is none": ("m.jsonl", '{"image_path": 3}', 'line 1: expected an object with a text "image_path"'),
    "null": ("m.json", "null", "expected an object whose keys are pictures"),
    "nothing": ("m.json", "", "not JSON"),
    "no lines": ("m.jsonl", "\n\n", "no pictures in this metadata file"),
}


def metadata_of(tmp_path: Path, name: str, text: str, *, image_dir: bool = True) -> list[tuple[str, str]]:
    folder, other = tmp_path / "set", tmp_path / "other"
    for path in (folder / "a.png", other / "b.png"):
        path.parent.mkdir()
        path.write_bytes(picture())
    file = tmp_path / name
    file.write_text(text.replace("OTHER", other.as_posix()), encoding="utf-8")
    subset = SubsetSpec(folder if image_dir else None, metadata_file=file, class_tokens="class")
    return [(p.path.name, p.caption) for p in scan([DatasetSpec((subset,), (32, 32))], progress=False)]


@pytest.mark.parametrize("case", METADATA)
def test_metadata_files_that_are_refused(case: str, tmp_path: Path) -> None:
    name, text, words = METADATA[case]
    with pytest.raises(InputError) as error:
        metadata_of(tmp_path, name, text)
    assert "datasets[0].subsets[0].metadata_file: " in str(error.value)
    assert words in str(error.value)


def test_separators_of_lines_inside_a_text_do_not_end_it(tmp_path: Path) -> None:
    text = '{"image_path": "a.png", "caption": "one\u2028line\x85of text"}\n'
    assert metadata_of(tmp_path, "m.jsonl", text) == [("a.png", "one\u2028line\x85of text")]


def test_paths_are_followed_inside_of_the_folder(tmp_path: Path) -> None:
    assert metadata_of(tmp_path, "m.json", '{"./a.png": {"tags": "t"}}') == [("a.png", "t")]


def test_without_a_folder_absolute_paths_lead_anywhere(tmp_path: Path) -> None:
    assert metadata_of(tmp_path, "m.json", '{"OTHER/b.png": {}}', image_dir=False) == [("b.png", "class")]
