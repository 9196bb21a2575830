"""Random input for what reads configurations, command lines and prompts."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path

from hypothesis import strategies as st

from anima_peft.config import load
from anima_peft.config.dataset_options import BatchKeys, DatasetKeys, PlaceKeys, SubsetKeys
from anima_peft.config.loading import OPTIONS
from anima_peft.config.network import ARGUMENT_LISTS
from anima_peft.config.options import options_of
from anima_peft.config.prompt_files import read_prompts
from anima_peft.config.prompts import parse_prompt_line, prompt_text
from tests.config.conftest import TRAIN_ARGS

from .fuzzing import FUZZ, faults_are_told, fuzz, json_values, mutated, texts

pytestmark = FUZZ


_DATASET_KEYS = (DatasetKeys, BatchKeys, SubsetKeys, PlaceKeys)
NAMES = st.sampled_from(
    [*OPTIONS, *ARGUMENT_LISTS, *(option.name for keys in _DATASET_KEYS for option in options_of(keys)), "general"]
)


def toml_text(value: object) -> str:
    """A value as TOML writes it; what TOML lacks as something near."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return '""'
    if isinstance(value, str):
        return json.dumps(value.encode("utf-8", "replace").decode(), ensure_ascii=True).replace("\\/", "/")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml_text(key)} = {toml_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_text, value)) + "]"
    return repr(value)


TABLES = st.dictionaries(NAMES | texts, json_values | st.lists(texts, max_size=3), max_size=6)
HEADS = "[[datasets]]\n", "[[datasets.subsets]]\nimage_dir = 'p'\n", "[general]\n", "[a]\n", ""


def lines_of(found: Mapping[str, object]) -> str:
    return "".join(f"{toml_text(key)} = {toml_text(value)}\n" for key, value in found.items())


def test_configurations(tmp_path: Path) -> None:
    train, dataset = tmp_path / "train.toml", tmp_path / "dataset.toml"
    valid = lines_of(TRAIN_ARGS)
    shipped = (Path(__file__).parents[2] / "configs").rglob("*.toml")
    texts_of_files = (
        valid,
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'p'\n",
        *(f.read_text("utf-8") for f in shipped),
    )
    originals = tuple(text.encode() for text in texts_of_files)
    built = st.lists(st.tuples(st.sampled_from(HEADS), TABLES), max_size=3).map(
        lambda parts: "".join(head + lines_of(found) for head, found in parts).encode()
    )
    merged = TABLES.map(lambda found: lines_of({**TRAIN_ARGS, **found}).encode())
    files = st.tuples(merged | built | mutated(originals), built | mutated(originals) | st.just(originals[1]))

    def check(case: tuple[bytes, bytes]) -> None:
        train.write_bytes(case[0])
        dataset.write_bytes(case[1])
        with faults_are_told():
            load(["--config_file", str(train), "--dataset_config", str(dataset)])

    fuzz(files, check)


def test_command_lines() -> None:
    flags = st.builds("--{}".format, NAMES) | st.just("--no-xformers") | texts
    words = st.lists(flags | texts | st.integers().map(str) | st.floats().map(str), max_size=8)

    def check(argv: list[str]) -> None:
        if any(word in ("-h", "--help") for word in argv):
            return
        with faults_are_told(), contextlib.redirect_stderr(io.StringIO()):
            load(argv)

    fuzz(words, check)


def test_prompts(tmp_path: Path) -> None:
    line = st.builds(" ".join, st.lists(st.sampled_from(("--w", "--h", "--d", "--s", "--l", "--n", "--fs")) | texts))
    entry = st.dictionaries(st.sampled_from(("prompt", "width", "seed", "scale", "flow_shift", "x")), json_values)
    as_txt = st.tuples(st.just(".txt"), st.lists(line | texts).map(lambda lines: "\n".join(lines)))
    as_json_text = st.tuples(st.just(".json"), (st.lists(entry) | json_values).map(json.dumps))
    as_toml = st.tuples(
        st.just(".toml"),
        st.lists(entry).map(lambda all_of: "".join("[[prompt.subset]]\n" + lines_of(e) for e in all_of)),
    )

    def check(case: tuple[str, str]) -> None:
        path = tmp_path / f"p{case[0]}"
        path.write_bytes(case[1].encode("utf-8", "surrogatepass"))
        with faults_are_told():
            for prompt in read_prompts(path):
                prompt.prompt.encode()
                assert parse_prompt_line(prompt_text(prompt) or "--s 30") == prompt or not prompt.prompt

    fuzz(as_txt | as_json_text | as_toml, check)
