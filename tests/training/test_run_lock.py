"""Two runs that are started into the same place: the second one is refused, and touches nothing of the first."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from anima_peft.errors import InputError
from anima_peft.training import resuming, run
from anima_peft.training.outputs import Outputs
from anima_peft.training.run_lock import is_running, run_lock

from .conftest import Configure

HOLD = """
import sys, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_run_is_refused_before_it_touches_anything(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Outputs(tmp_path / "output", "test")
    monkeypatch.setattr(run, "scan", lambda *_, **__: pytest.fail("the pictures are looked at"))
    with run_lock(first):
        half_written = first.folder / ".test-step00000001-state-new"
        half_written.mkdir()
        asked = first.folder / "test-stop"
        asked.touch()
        for flags in ([], ["--overwrite"], ["--resume", "latest"]):
            with pytest.raises(InputError, match="output_dir: another run is writing"):
                run.train(configure(*flags))
        assert half_written.is_dir()
        assert asked.is_file()
        with run_lock(Outputs(first.folder, "other")):
            pass
    assert not is_running(first)


def test_a_killed_run_is_in_nobodys_way(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "图 out", "n")
    outputs.folder.mkdir()
    words = [sys.executable, "-c", HOLD, str(outputs.lock)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"held"
        assert is_running(outputs)
        with pytest.raises(InputError, match="another run"), run_lock(outputs):
            pass
        process.kill()
        process.wait()
    assert not is_running(outputs)
    with run_lock(outputs):
        assert is_running(outputs)
    assert list(outputs.folder.iterdir()) == []


def test_a_folder_that_was_made_for_the_lock_goes_with_it_if_it_is_empty(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "a" / "b", "n")
    with run_lock(outputs):
        assert outputs.lock.is_file()
    assert not (tmp_path / "a").exists()
    with run_lock(outputs):
        outputs.final.touch()
    assert list(tmp_path.rglob("*")) == [tmp_path / "a", outputs.folder, outputs.final]


def test_resuming_leaves_alone_what_another_run_is_writing(tmp_path: Path) -> None:
    own, other = Outputs(tmp_path / "own", "n"), Outputs(tmp_path / "other", "n")
    state, half_written = other.folder / "n-step00000001-state", other.folder / ".n-step00000002-state-new"
    with run_lock(other):
        half_written.mkdir()
        assert resuming._resume_from(str(state), own) == state
        assert half_written.is_dir()
    assert resuming._resume_from(str(state), own) == state
    assert not half_written.exists()


def test_a_drive_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with run_lock(Outputs(tmp_path / "out", "n")):
        pass
    assert "this drive knows no locks ([Errno" in caplog.text
