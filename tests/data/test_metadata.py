"""Metadata files: which pictures and captions they name, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from anima_peft.data import CaptionSpec, DatasetSpec, SubsetSpec, scan
from anima_peft.data.captions import read_metadata
from anima_peft.errors import InputError

MakePictures = Callable[..., Path]


@pytest.fixture
def folder(make_pictures: MakePictures) -> Path:
    return make_pictures("图 片", {"1.png": (32, 32), "2.png": (32, 32), "三.png": (32, 32)}, captions=False)


def found(folder: Path | None, text: str, name: str = "meta.json", **options: object) -> list[tuple[str, str]]:
    """Names and captions of the pictures that a metadata file gives."""
    assert folder is not None
    file = folder / name
    file.write_text(text, encoding="utf-8")
    image_dir = options.pop("image_dir", folder)
    subset = SubsetSpec(image_dir, metadata_file=file, **options)  # type: ignore[arg-type]
    return [(p.path.name, p.caption) for p in scan([DatasetSpec((subset,), (32, 32))], progress=False)]


def test_pictures_come_in_the_order_of_the_file_and_others_stay_out(folder: Path) -> None:
    text = json.dumps({"三.png": {"caption": "three", "image_size": [1, 1]}, "1": {"tags": "a, b"}})
    assert found(folder, text) == [("三.png", "three"), ("1.png", "a, b")]


@pytest.mark.parametrize(
    ("entry", "wildcards", "caption"),
    [
        ({"caption": "a"}, False, "a"),
        ({"caption": "a", "tags": "b, c"}, False, "a, b, c"),
        ({"caption": "", "tags": "b"}, False, "b"),
        ({"caption": "a", "tags": ""}, False, "a"),
        ({"caption": "a\nb", "tags": "c"}, False, "a, c"),
        ({"caption": "a\n\nb", "tags": "c\nd"}, True, "a, c,d\nb, c,d"),
        ({"caption": ["a", "b"]}, True, "a\nb"),
        ({"caption": ["a", "b"]}, False, "a"),
        ({"text": "from datasets"}, False, "from datasets"),
        ({}, False, "class"),
    ],
)
def test_captions_and_tags(folder: Path, entry: dict[str, object], wildcards: bool, caption: str) -> None:
    options = {"captions": CaptionSpec(enable_wildcard=wildcards), "class_tokens": "class"}
    assert found(folder, json.dumps({"1.png": entry}), **options) == [("1.png", caption)]
    line = json.dumps({"image_path": "1.png", **entry}) + "\n\n"
    assert found(folder, line, "meta.jsonl", **options) == [("1.png", caption)]
    line = json.dumps({"file_name": "1.png", **entry})
    assert found(folder, line, "META.JSONL", **options) == [("1.png", caption)]


def test_absolute_paths_need_no_folder(folder: Path) -> None:
    assert found(folder, json.dumps({str(folder / "2.png"): {"caption": "x"}}), image_dir=None) == [("2.png", "x")]


@pytest.mark.parametrize(
    ("name", "text", "image_dir", "fault"),
    [
        ("meta.json", "{", True, "not JSON"),
        ("meta.json", "[]", True, "expected an object whose keys are pictures, or one object a line"),
        ("meta.json", "{}", True, "no pictures in this metadata file"),
        ("meta.json", '{"1.png": {"caption": 3}}', True, 'expected a text under "caption"'),
        ("meta.json", '{"1.png": {"tags": ["a"]}}', True, 'expected a text under "tags"'),
        ("meta.json", '{"9.png": {}}', True, "there is no picture"),
        ("meta.json", '{"1.png": {}, "1": {}}', True, "'1.png' and '1' are the same picture; remove one"),
        ("meta.json", '{"1.png": {}}', False, "is a relative path; set image_dir"),
        ("meta.jsonl", '{"caption": "a"}', True, 'line 1: expected an object with a text "image_path"'),
        ("meta.jsonl", '{"image_path": "1.png"}\nx', True, "line 2 is not JSON"),
    ],
)
def test_faults(folder: Path, name: str, text: str, image_dir: bool, fault: str) -> None:
    with pytest.raises(InputError) as caught:
        found(folder, text, name, image_dir=folder if image_dir else None)
    assert fault in str(caught.value)
    assert "datasets[0].subsets[0].metadata_file" in str(caught.value)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such metadata file"):
        read_metadata(tmp_path / "none.json")
