"""Disks that fail or are full, at every write of a run: what was saved before still goes on."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import TensorBoardTracker

from anima_peft import files
from anima_peft.cli import DONE, FAILED, FAULTY_INPUT, report_faults
from anima_peft.training.run import train
from anima_peft.training.saving import Saver

from .conftest import Configure
from .outcomes import names_in, same_tensors

FLAGS = ["--max_train_steps", "3", "--save_every_n_steps", "1", "--save_state", "--save_last_n_steps", "1", "--use_ema"]
# Where something is written, flushed or put in place: (module, name).
WRITES: list[tuple[Any, str]] = [
    (os, "fsync"),
    (os, "replace"),
    (os, "rename"),
    (files, "save_file"),
    (torch, "save"),
    (Path, "write_text"),
]


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, first: int, last: int | None = None) -> Iterator[list[str]]:
    """Writes from the `first` (counted from 1) to the `last` fail; gives the names of all that were tried."""
    tried: list[str] = []

    def around(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            tried.append(name)
            if first <= len(tried) and (last is None or len(tried) <= last):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        return write

    with monkeypatch.context() as patched:
        for owner, name in WRITES:
            patched.setattr(owner, name, around(getattr(owner, name), name))
        yield tried


def has_state(folder: Path) -> bool:
    return any(folder.glob("*-state/progress.json")) or any(folder.glob(".*-state-old/progress.json"))


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")] if folder.exists() else []


def check_goes_on(configure: Configure, through: Path, folder: Path) -> None:
    """Nothing half-written is left, and the run ends as the undisturbed one."""
    assert hidden(folder) == []
    if not (folder / "test-state").exists():  # the run's last file; with it nothing is left to do
        go_on = ["--resume", "latest"] if has_state(folder) else ["--overwrite"]
        train(configure(*FLAGS, *go_on, output_dir=folder))
    assert same_tensors(through, folder / through.name)
    assert names_in(folder) == names_in(through.parent)
    assert hidden(folder) == []


def count_writes(configure: Configure, monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[Path, list[str]]:
    train(configure("--max_train_steps", "1", output_dir=folder / "cached"))  # whose writes are not counted
    shutil.rmtree(folder)
    with failing(monkeypatch, 10**9) as tried:
        through = train(configure(*FLAGS, output_dir=folder)).adapter
    assert {name for _, name in WRITES} <= set(tried)
    return through, tried


def try_faults(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, through: Path, writes: Iterator[int]
) -> None:
    for number in writes:
        for last in (None, number):  # a disk that stays full, and one fault
            folder = tmp_path / f"{number} {last}"
            with failing(monkeypatch, number, last):
                code = report_faults(lambda folder=folder: train(configure(*FLAGS, output_dir=folder)))  # type: ignore[misc]
            assert code in (FAILED, FAULTY_INPUT), f"write {number} failed, and the run did not notice"
            check_goes_on(configure, through, folder)


def test_a_write_that_fails_leaves_the_earlier_state(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    through, tried = count_writes(configure, monkeypatch, tmp_path / "through")
    # One of each kind, within the second of three saves.
    wanted = {name: number for number, name in enumerate(tried[: len(tried) * 2 // 3], start=1)}
    for number in wanted.values():
        folder = tmp_path / str(number)
        with failing(monkeypatch, number):
            assert report_faults(lambda folder=folder: train(configure(*FLAGS, output_dir=folder))) == FAILED  # type: ignore[misc]
        assert "No space left on device" in capsys.readouterr().err
        assert has_state(folder)
        check_goes_on(configure, through, folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_write_that_fails_leaves_the_earlier_state(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    through, tried = count_writes(configure, monkeypatch, tmp_path / "through")
    try_faults(configure, monkeypatch, tmp_path, through, iter(range(1, len(tried) + 1)))


def limits() -> Iterator[int]:
    """Sizes of files at which a disk is full: below, between and above those of a state."""
    yield from (0, 100, 4_000, 40_000, 100_000)


def test_a_file_cut_short_by_the_system_is_no_file(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by a stand-in: the system itself refuses to write past a size."""
    resource = pytest.importorskip("resource", reason="a limit of POSIX systems")
    through = train(configure(*FLAGS, output_dir=tmp_path / "through")).adapter
    largest = max(path.stat().st_size for path in through.parent.rglob("*") if path.is_file())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = Saver._write
    for size in (100, largest - 1, largest):
        folder = tmp_path / str(size)

        def write(self: Saver, path: Path, *, state: bool, size: int = size) -> None:
            try:
                if "step00000001" not in path.name:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
                real(self, path, state=state)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        with monkeypatch.context() as patched:
            patched.setattr(Saver, "_write", write)
            code = report_faults(lambda folder=folder: train(configure(*FLAGS, output_dir=folder)))  # type: ignore[misc]
        assert code == (DONE if size == largest else FAILED)
        if code == FAILED:
            assert has_state(folder)
            check_goes_on(configure, through, folder)


def test_a_log_that_cannot_be_written_costs_no_step(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = TensorBoardTracker.log

    def log(self: TensorBoardTracker, values: dict[str, float], step: int) -> None:
        real(self, values, step=step)
        if step == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events.out")

    monkeypatch.setattr(TensorBoardTracker, "log", log)
    code = report_faults(lambda: train(configure("--max_train_steps", "4", "--log_with", "tensorboard")))
    errors = capsys.readouterr().err
    assert code == FAILED
    assert "events.out" in errors
    assert "The state after step 2 is saved" in errors
    assert train(configure("--max_train_steps", "4", "--resume", "latest")).steps == 4


@pytest.mark.parametrize("failed", ["replace", "save_file"])
def test_a_cache_that_cannot_be_written_keeps_what_it_has(
    configure: Configure, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: str
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(pictures, folder, ignore=shutil.ignore_patterns(".anima_cache"))
    owner = next(owner for owner, name in WRITES if name == failed)
    real, done = getattr(owner, failed), []

    def write(*args: Any, **kwargs: Any) -> Any:
        done.append(1)
        if len(done) >= 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, failed, write)
    assert report_faults(lambda: train(configure("--max_train_steps", "1", image_dir=folder))) == FAULTY_INPUT
    monkeypatch.undo()
    entries = {path: path.read_bytes() for path in (folder / ".anima_cache").rglob("*.safetensors")}
    assert entries
    assert not [path for path in entries if path.name.startswith(".")]
    train(configure("--max_train_steps", "1", image_dir=folder))
    assert all(path.read_bytes() == content for path, content in entries.items())
