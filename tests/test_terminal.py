"""What a command shows: bars and lines, warnings once, and no character that a console cannot take."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from anima_peft import terminal
from anima_peft.cli import DONE, report_faults
from anima_peft.terminal import progress_bar


class Screen(io.StringIO):
    """Standard error as a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """tqdm's; ten seconds pass at each look."""
    now = [0.0]
    from tqdm import std

    def tell() -> float:
        now[0] += 10
        return now[0]

    monkeypatch.setattr(std, "time", tell)
    return now


def test_lines_where_there_is_no_terminal(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress_bar(total=20, desc="training", unit="step") as bar:
        for _ in range(20):
            bar.update()
    lines = capsys.readouterr().err.split("\n")
    assert lines.pop() == ""
    assert 3 <= len(lines) <= 12
    assert len(set(lines)) == len(lines)
    assert lines[-1].startswith("training: 100%, 20 of 20 [")
    assert all(line.isascii() and line.isprintable() and line == line.strip() for line in lines)


def test_what_is_soon_done_is_not_worth_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(total=2, desc="caching") as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal_is_not_broken_by_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler(terminal._BesideBars())
    record = logging.LogRecord("a", logging.WARNING, "", 0, "a warning", (), None)
    with progress_bar(total=2, desc="training") as bar:
        bar.update()
        handler.emit(record)
        bar.update()
    shown = [line.split("\r")[-1].strip() for line in screen.getvalue().split("\n")]
    assert shown[0] == "a warning"
    assert shown[1].startswith("training: 100%")


def test_a_warning_is_shown_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])

    def warn() -> None:
        for number in (1, 1, 2):
            logging.getLogger("anima_peft.a").warning("number %d", number)

    assert report_faults(warn) == DONE
    assert capsys.readouterr().err == "WARNING: number 1\nWARNING: number 2\n"


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", r"\u89d2 \u2192 \xe9"), ("cp1252", r"\u89d2 \u2192 é"), ("gbk", "角 → é")]
)
def test_consoles_of_windows(monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def say() -> None:
        print("角 → é")
        logging.getLogger("anima_peft.a").warning("角 → é")

    assert report_faults(say) == DONE
    monkeypatch.undo()
    for stream, expected in zip(streams.values(), (shown, f"WARNING: {shown}"), strict=True):
        stream.flush()
        assert stream.buffer.getvalue().decode(encoding).split() == expected.split()  # type: ignore[attr-defined]
