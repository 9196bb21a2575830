"""TOML and prompts of strangers: told in one report, in a moment, whatever they hold."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from anima_peft.config import load
from anima_peft.config.files import read_toml
from anima_peft.config.prompt_files import read_prompts
from anima_peft.config.prompts import parse_prompt_line
from anima_peft.config.reading import shown
from anima_peft.errors import InputError

from .hostile import ESCAPES, POSIX, sparse

TOO_LARGE = "more than 16 MiB, which is no text file of options or prompts"
# content, and words of the fault
TOMLS: dict[str, tuple[bytes, str]] = {
    "deep arrays": (b"a = " + b"[" * 100_000, "not TOML"),
    "deep tables": (b"a = " + b"{b = " * 100_000, "not TOML"),
    "UTF-16": ("a = 1".encode("utf-16"), "line 1: not UTF-8; save the file as UTF-8"),
    "UTF-32": ("a = 1".encode("utf-32"), "line 1: not UTF-8; save the file as UTF-8"),
    "GBK": ("a = '女孩'".encode("gbk"), "line 1: not UTF-8; save the file as UTF-8"),
    "half a pair": (b'a = "\\uD800"', "line 1: not TOML"),
    "a NUL": (b'a = "\0"', "line 1: not TOML"),
    "an escape": (b'a = "\x1b[2J"', "line 1: not TOML"),
    "a number of 5000 digits": (b"a = " + b"9" * 5000, "not TOML: Exceeds the limit"),
    "a key twice": (b"a = 1\na = 2", "line 2: not TOML"),
    "a table twice": (b"[a]\n[a]", "line 2: not TOML"),
    "a date that is none": (b"a = 2026-99-99", "not TOML"),
    "JSON": (b'{"a": 1}', "line 1: not TOML"),
    "YAML": (b"a: 1", "line 1: not TOML"),
    "a picture": (b"\x89PNG\r\n\x1a\n", "line 1: not UTF-8"),
}


@pytest.mark.parametrize("case", TOMLS)
def test_files_that_are_no_toml(case: str, tmp_path: Path) -> None:
    path = tmp_path / "配 置.toml"
    path.write_bytes(TOMLS[case][0])
    with pytest.raises(InputError) as error:
        read_toml(path)
    assert str(error.value).startswith(f"{path}, ")
    assert TOMLS[case][1] in str(error.value)
    assert len(str(error.value)) < 500


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "huge": (lambda path: sparse(path, 2**40), TOO_LARGE),
    "a folder": (lambda path: path.mkdir(), "cannot be read"),
    "missing": (lambda path: None, "cannot be read (No such file or directory)"),
}
ON_POSIX: dict[str, tuple[Callable[[Path], object], str]] = {
    "endless": (lambda path: path.symlink_to("/dev/zero"), TOO_LARGE),
    "a loop": (lambda path: path.symlink_to(path.name), "cannot be read (Too many levels of symbolic links)"),
}


@pytest.mark.parametrize("case", [*FILES, *(pytest.param(case, marks=POSIX) for case in ON_POSIX)])
def test_files_that_cannot_be_read(case: str, tmp_path: Path) -> None:
    make, words = {**FILES, **ON_POSIX}[case]
    path = tmp_path / "a.toml"
    make(path)
    with pytest.raises(InputError) as error:
        read_toml(path)
    assert str(error.value).startswith(f"{path}: ")
    assert words in str(error.value)


@pytest.mark.parametrize("name", ["a\0b.toml", "a" * 5000, "\ud800.toml"])
def test_names_that_no_file_has(name: str) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_toml(Path(name))


@POSIX
def test_a_pipe_is_read_as_shells_make_it(tmp_path: Path) -> None:
    import threading

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"a = 1",))
    writer.start()
    assert read_toml(pipe) == {"a": 1}
    writer.join()


# lines of the train args, and words of the fault
TRAIN_ARGS: dict[str, tuple[str, str]] = {
    "deep value": ("vae = " + "[" * 200 + "]" * 200, "vae: expected a text, got [[[[...]]]]"),
    "an endless key": ("a" * 100_000 + " = 1", "unknown option"),
    "escapes in a key": (f"{json.dumps('a' + ESCAPES)} = 1", "unknown option"),
    "an endless text": (f'timestep_sampling = "{"s" * 100_000}"', "timestep_sampling: expected one of"),
    "a NUL": (r'vae = "a\u0000"', r'vae: expected a text without NUL characters, got "a\x00"'),
    "a NUL in a list": (r'compare_prompts = ["a\u0000"]', "compare_prompts[0]: expected a text without NUL characters"),
    "a name that leads out": ('output_name = "../../x"', 'output_name: expected a file name without "/"'),
    "a name with an escape": (r'output_name = "a\u001b[2J"', r'output_name: expected a file name without "\x1b"'),
    "a name from right to left": (r'output_name = "a\u202eb"', r'output_name: expected a file name without "\u202e"'),
    "a size beyond all": ("network_dim = 9223372036854775808", "network_dim: "),
    "no number": ("learning_rate = nan", "learning_rate: expected a number above 0, got nan"),
    "a pattern without end": ('network_args = ["exclude_patterns=((((("]', "is not a regular expression"),
    "a class that runs a program": ('optimizer_type = "os.system"', "optimizer_type: "),
    "a class of another kind": (
        'optimizer_type = "http.server.HTTPServer"',
        "optimizer_type: http.server.HTTPServer is no torch",
    ),
    "an address with a password": ('t5_tokenizer_repo_id = "https://u:secret@huggingface.co/a/b"', "without user name"),
    "an address elsewhere": ('t5_tokenizer_repo_id = "https://evil.example/a/b"', "is neither of the two"),
    "a folder out of a repo": ('t5_tokenizer_subfolder = "../../x"', "expected a folder inside the repo"),
}
DATASETS: dict[str, tuple[str, str]] = {
    "a suffix that leads out": ('caption_extension = "/../../x"', "expected the suffix of caption files"),
    "a suffix by a backslash": (r"caption_extension = '\..\x'", "expected the suffix of caption files"),
    "no suffix": ('caption_extension = "."', "expected the suffix of caption files"),
    "a NUL in a suffix": (r'caption_extension = ".t\u0000"', "expected a text without NUL characters"),
    "a NUL in a folder": (r'image_dir = "a\u0000"', "expected a text without NUL characters"),
    "a folder that is a number": ("image_dir = 3", "image_dir: expected a text, got 3"),
    "repeats beyond all": ("num_repeats = 1e300", "num_repeats: expected an integer of at least 1, got 1e+300"),
    "a table for a text": ("class_tokens = {a = 1}", "class_tokens: expected a text, got a table"),
}
BASE = {
    "anima_transformer": '"models"',
    "network_module": '"networks.lora_anima"',
    "learning_rate": "1.0",
    "output_dir": '"out"',
    "output_name": '"x"',
}


def load_text(tmp_path: Path, train: str, subset: str) -> object:
    given = dict(BASE)
    given.pop(train.partition(" = ")[0], None)
    text = "".join(f"{key} = {value}\n" for key, value in given.items()) + train
    (tmp_path / "train.toml").write_text(text, encoding="utf-8")
    image_dir = "" if subset.startswith("image_dir") else 'image_dir = "p"\n'
    dataset = f"[[datasets]]\n[[datasets.subsets]]\n{image_dir}{subset}\n"
    (tmp_path / "dataset.toml").write_text(dataset, encoding="utf-8")
    return load(["--config_file", str(tmp_path / "train.toml"), "--dataset_config", str(tmp_path / "dataset.toml")])


@pytest.mark.parametrize("case", [*TRAIN_ARGS, *DATASETS])
def test_values_that_are_refused(case: str, tmp_path: Path) -> None:
    text, words = {**TRAIN_ARGS, **DATASETS}[case]
    with pytest.raises(InputError) as error:
        load_text(tmp_path, text if case in TRAIN_ARGS else "", text if case in DATASETS else "")
    assert words in str(error.value)
    assert "The configuration has 1 fault " in str(error.value)
    assert "secret" not in str(error.value)


def test_what_is_shown_of_a_value_is_short_and_plain() -> None:
    assert shown(ESCAPES) == r'"\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.\u2066\u200b"'
    nested: list[object] = []
    for _ in range(5000):
        nested = [nested]
    assert shown(nested) == "[[[[...]]]]"
    assert len(shown(["x" * 1000] * 1000)) < 400


# file, content, words of the fault
PROMPTS: dict[str, tuple[str, str, str]] = {
    "deep": ("p.json", "[" * 100_000, "not JSON (nested too deeply)"),
    "deep value": (
        "p.json",
        '[{"prompt": "a", "width": ' + "[" * 900 + "]" * 900 + "}]",
        "[0]: width: expected a text",
    ),
    "a table as a value": ("p.toml", '[prompt]\n[[prompt.subset]]\nprompt = "a"\nwidth = {a = 1}', "width: expected a"),
    "half a pair": ("p.json", r'[{"prompt": "\ud800"}]', "[0]: expected a text in Unicode"),
    "half a pair in the negative": ("p.json", r'[{"prompt": "a", "negative_prompt": "\udc00"}]', "in Unicode"),
    "a NUL": ("p.json", r'[{"prompt": "a\u0000"}]', r'[0]: expected a text without NUL characters, got "a\x00"'),
    "a NUL in a line": ("p.txt", "fine\na\0b", "line 2: expected a text without NUL characters"),
    "a separator of lines": ("p.txt", "a\u2028b", "line 1: expected one line, got a text with line breaks"),
    "a number of 5000 digits": ("p.txt", "a --d " + "9" * 5000, "line 1: --d: expected an integer from 0 to"),
    "another alphabet's digits": ("p.txt", "a --w ٣", "line 1: --w: expected an integer from 16 to 2048, got 3"),
    "no number": ("p.txt", "a --l nan", "line 1: --l: expected a number of at least 0"),
    "a list": ("p.json", "[[]]", "[0]: expected a table with a text `prompt`"),
    "null": ("p.json", "null", "expected a list of objects with a prompt each"),
    "a script": ("p.py", "import os", "expected a .txt, .toml or .json file of prompts"),
    "only flags": ("p.txt", "--x y", "line 1: unknown --x"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_that_are_refused(case: str, tmp_path: Path) -> None:
    name, text, words = PROMPTS[case]
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as error:
        read_prompts(path)
    assert str(error.value).startswith(f"{path}:")
    assert words in str(error.value)


def test_halves_of_pairs_from_a_command_line(tmp_path: Path) -> None:
    """Python turns bytes that are no UTF-8 into these."""
    with pytest.raises(InputError, match="half of a surrogate pair"):
        parse_prompt_line("a \udcff")
