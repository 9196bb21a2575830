"""What commands print of strangers' files, and what a run's state may hold."""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from anima_peft.cli import FAULTY_INPUT, main, report_faults
from anima_peft.data import DatasetSpec, SubsetSpec, scan
from anima_peft.errors import InputError
from anima_peft.texts import cut, escaped
from anima_peft.training.state import Progress, load_state, read_progress

from .hostile import ESCAPES, POSIX, picture


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("plain 文字　é 🐈", "plain 文字　é 🐈"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\x9b31m", r"\x9b31m"),
        ("\x7f\x00\r", r"\x7f\x00\r"),
        ("\u202e\u2066\u200f\u200b\ufeff", r"\u202e\u2066\u200f\u200b\ufeff"),
        ("\u2028\u2029\x85", r"\u2028\u2029\x85"),
        ("\ud800\udcff", r"\ud800\udcff"),
        ("\U000e0041", r"\U000e0041"),
        ("a\nb", "a\nb"),
    ],
)
def test_escaping(text: str, plain: str) -> None:
    assert escaped(text, keep="\n") == plain
    assert escaped("a\nb") == r"a\nb"


def test_cutting() -> None:
    assert (cut("abcd", 4), cut("abcde", 4)) == ("abcd", "abc…")


@pytest.mark.parametrize("error", [InputError, OSError])
def test_errors_and_warnings_are_escaped(error: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:

        def fail() -> None:
            logging.getLogger("anima_peft.somewhere").warning("of %s", f"a{ESCAPES}\nb")
            raise error(f"c{ESCAPES}\n  - d")

        assert report_faults(fail) != 0
    finally:
        root.handlers = handlers
    shown = capsys.readouterr().err
    assert shown == f"WARNING: of a{escaped(ESCAPES)}\nb\nerror: c{escaped(ESCAPES)}\n  - d\n"


def write_dataset(folder: Path, caption: bytes, name: str = "a") -> Path:
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(2):
        (pictures / f"{name}{number}.png").write_bytes(picture(size=(64, 48)))
        (pictures / f"{name}{number}.txt").write_bytes(caption)
    file = folder / "dataset.toml"
    file.write_text(
        f"[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nimage_dir = '{pictures.as_posix()}'\n", encoding="utf-8"
    )
    return file


def test_check_shows_captions_escaped_and_cut(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = write_dataset(tmp_path, f"a{ESCAPES}, {'x' * 5000}".encode())
    assert main(["check", "--dataset_config", str(file)]) == 0
    out = capfd.readouterr().out
    assert escaped(out, keep="\n") == out
    assert r"a\x1b]0;owned\x07" in out
    assert max(map(len, out.splitlines())) < 300


@POSIX
def test_check_shows_names_escaped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = write_dataset(tmp_path, b"", name=ESCAPES + "\n" + os.fsdecode(b"\xff"))
    assert main(["check", "--dataset_config", str(file)]) == 0  # crops, likenesses and the longest caption name files
    out, err = capfd.readouterr()
    assert escaped(out, keep="\n") == out
    assert escaped(err.replace("\r", ""), keep="\n") == err.replace("\r", "")
    assert r"\n\udcff0.png" in out


def test_a_faulty_set_ends_check_with_all_faults(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = write_dataset(tmp_path, "一个女孩，长发".encode("gbk"))
    (tmp_path / "pictures" / "a0.png").write_bytes(b"")
    assert main(["check", "--dataset_config", str(file)]) == FAULTY_INPUT
    err = capfd.readouterr().err
    assert "error: The dataset cannot be used:" in err
    assert [name in err for name in ("a0.txt", "a1.txt", "a0.png")] == [True] * 3
    assert "Traceback" not in err


class Bomb:
    """Runs when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({str(self.trace)!r}, 'w').close()",)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process, which has other tests to run


@pytest.mark.parametrize("raw", [False, True], ids=["as torch saves", "a bare pickle"])
def test_a_states_pickles_are_read_as_weights_only(raw: bool, accelerator: Accelerator, tmp_path: Path) -> None:
    trace, state = tmp_path / "trace", tmp_path / "x-state"
    state.mkdir()
    file = state / "random_states_0.pkl"
    if raw:
        file.write_bytes(pickle.dumps(Bomb(trace), protocol=2))
    else:
        torch.save(Bomb(trace), file)
    with pytest.raises(InputError, match=r"x-state holds more than tensors and numbers, which is not read; use an"):
        load_state(accelerator, Progress(), state, seed=0)
    assert not trace.exists()


PROGRESS = {
    "empty": b"",
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "null": b"null",
    "no UTF-8": b"\xff",
    "unknown keys": b'{"saved_steps": [], "saved_epochs": [], "x": 1}',
    "steps in words": b'{"saved_steps": [["a", "b"]], "saved_epochs": []}',
    "steps that are none": b'{"saved_steps": 3, "saved_epochs": []}',
}


@pytest.mark.parametrize("case", PROGRESS)
def test_a_states_progress_that_cannot_be_read(case: str, tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_bytes(PROGRESS[case])
    with pytest.raises(InputError, match=r"resume: .*progress\.json cannot be read .*; use an earlier state"):
        read_progress(tmp_path)


def test_nothing_listens(tmp_path: Path) -> None:
    """Looking over and caching a set opens no port."""
    bound: list[object] = []
    state = {"on": True}

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if state["on"] and event in ("socket.bind", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            bound.append((event, arguments))

    sys.addaudithook(note)
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match=r"b\.png: cannot read this picture"):
        scan([DatasetSpec((SubsetSpec(tmp_path, class_tokens="a"),), (32, 32))], progress=False)
    state["on"] = False
    assert bound == []
