"""Random input for what reads pictures, captions and caches."""

from __future__ import annotations

import contextlib
import json
import random
import string
from pathlib import Path

import torch
from hypothesis import strategies as st

from anima_peft.data import CaptionSpec, FileIndex, TensorCache, cache_key
from anima_peft.data.caption_choice import process_caption
from anima_peft.data.captions import read_caption, read_metadata
from anima_peft.data.pixels import DECODE_ERRORS, decode_alpha, decode_rgb, look_over
from anima_peft.errors import InputError

from .fuzzing import FUZZ, faults_are_told, fuzz, json_values, mutated, texts
from .hostile import picture

pytestmark = FUZZ


def test_headers_of_pictures() -> None:
    forms: list[bytes] = [
        picture(form, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0")
        for form in ("PNG", "JPEG", "WEBP")
    ]
    forms += [
        picture("BMP"),
        picture("GIF", frames=2),
        picture(frames=2),
        picture("WEBP", frames=2),
        picture("MPO", frames=2),
    ]
    with contextlib.suppress(KeyError, OSError, ValueError):
        forms.append(picture("AVIF"))

    def check(data: bytes) -> None:
        try:
            look = look_over(data)
        except DECODE_ERRORS:
            return
        # What was looked over is decoded as well, as the same.
        assert decode_rgb(data).size == look.size
        alpha = decode_alpha(data)
        assert alpha is None or alpha.size == look.size

    known = [picture("GIF")[:-1] + b"!", *(form[:-40] + bytes(40) for form in forms[-1:])]  # GIF, and AVIF if there is
    fuzz(mutated(tuple(forms)), check, known)


SPECS = st.builds(
    CaptionSpec,
    caption_prefix=st.none() | texts,
    caption_suffix=st.none() | texts,
    caption_dropout_rate=st.floats(0, 1),
    caption_dropout_every_n_epochs=st.integers(0, 3),
    enable_wildcard=st.booleans(),
    caption_separator=texts.filter(bool),
    shuffle_caption=st.booleans(),
    caption_tag_dropout_rate=st.floats(0, 1),
    token_warmup_step=st.integers(0, 20) | st.floats(0, 0.99),
    token_warmup_min=st.integers(0, 5),
    keep_tokens=st.integers(0, 5),
    keep_tokens_separator=st.none() | texts,
    secondary_separator=st.none() | texts,
)


def test_captions(tmp_path: Path) -> None:
    encodings = st.sampled_from(("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "gb18030", "shift-jis", "latin-1"))
    encoded = st.builds(lambda text, name: text.encode(name, "ignore"), texts | st.text(), encodings)
    path = tmp_path / "a.txt"

    def check(case: tuple[bytes, CaptionSpec, int]) -> None:
        data, spec, seed = case
        path.write_bytes(data)
        with faults_are_told():
            text = read_caption(path)
            assert text is not None
            text.encode()
            assert "\0" not in text
            made = [
                process_caption(text, spec, random.Random(seed), epoch=1, step=step, total_steps=9)
                for step in (0, 4, 9)
            ]
            assert made == [
                process_caption(text, spec, random.Random(seed), epoch=1, step=step, total_steps=9)
                for step in (0, 4, 9)
            ]

    fuzz(st.tuples(encoded | st.binary(max_size=80), SPECS, st.integers(0, 9)), check)


def test_metadata_files(tmp_path: Path) -> None:
    keys = st.sampled_from(("caption", "tags", "text", "image_path", "file_name", "x"))
    entries = st.dictionaries(keys, json_values | st.lists(texts), max_size=4)
    document = st.dictionaries(texts, entries | json_values, max_size=4) | json_values
    lines = st.lists(entries | json_values, max_size=4).map(lambda found: "\n".join(map(json.dumps, found)))
    files = st.tuples(st.just("m.json"), document.map(json.dumps)) | st.tuples(st.just("m.jsonl"), lines | texts)

    def check(case: tuple[str, str]) -> None:
        path = tmp_path / case[0]
        path.write_bytes(case[1].encode("utf-8", "surrogatepass"))
        with faults_are_told():
            for entry in read_metadata(path):
                for text in (entry.caption, entry.tags, entry.text(CaptionSpec())):
                    assert text is None or text.encode() is not None

    fuzz(files, check)


def test_caches(tmp_path: Path) -> None:
    cache, key = TensorCache(tmp_path, "latents"), cache_key(a=1)
    tensors = {"latents": torch.randn(2, 4, 4), "ids": torch.arange(5)}
    path = cache.write(key, tensors)
    entry = path.read_bytes()
    picture_file, index = tmp_path / "a.png", tmp_path / "cache" / "index.json"
    picture_file.write_bytes(b"x")
    facts = FileIndex(index.parent)
    facts.hash(picture_file)
    facts.save()
    indexes = (index.read_bytes(), json.dumps({"version": 1, "files": {string.ascii_letters: {}}}).encode())

    def check(case: tuple[bytes, bytes]) -> None:
        path.write_bytes(case[0])
        try:
            found = cache.read(key)
        except InputError:
            # Refused, and made anew by the next run.
            assert not cache.contains(key)
            cache.write(key, tensors)
            found = cache.read(key)
        assert cache.contains(key)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        index.write_bytes(case[1])
        known = FileIndex(index.parent).known(picture_file)
        assert known is None or len(known.sha256) == 64

    fuzz(st.tuples(mutated((entry,)), mutated(indexes) | json_values.map(lambda v: json.dumps(v).encode())), check)
