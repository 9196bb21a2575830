"""A run's record: what it holds, when it is written, and what becomes of it when a run goes on."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from anima_peft.errors import InputError, Interrupted
from anima_peft.training import record as module
from anima_peft.training.outputs import Outputs
from anima_peft.training.record import Record, recording
from anima_peft.training.report.history import read_history
from anima_peft.training.run import train

from .conftest import Configure

logger = logging.getLogger("anima_peft.somewhere")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "图-log.jsonl"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_steps(path: Path, first: int, last: int, *, continued: bool = False) -> None:
    record = Record(path)
    with recording(record):
        record.begin(first - 1, {"name": "图"}, continued=continued)
        for step in range(first, last + 1):
            record.log({"loss": 1 / step}, step=step)


def test_nothing_is_written_before_a_step(path: Path) -> None:
    record = Record(path)

    @recording(record)
    def fail() -> None:
        logger.warning("before")
        record.begin(0, {}, continued=False)
        record.preview(0, "a prompt", path.parent / "sample" / "a.png")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not path.exists()
    assert not record.is_on_disk


def test_what_is_logged_is_there(path: Path) -> None:
    record = Record(path)
    with recording(record):
        logger.warning("early %d", 1)
        record.begin(0, {"name": "图"}, continued=False)
        record.log({"loss": 0.12345678, "gradient_norm": math.inf}, step=1)
        record.preview(1, "a </script> prompt", path.parent / "sample" / "a.png")
        record.compared("a dog", path.parent / "1.png", path.parent / "2.png")
    found = lines(path)
    assert [line["kind"] for line in found] == ["session", "warning", "values", "picture", "compared", "end"]
    assert (found[2]["loss"], found[2]["gradient_norm"]) == (0.123457, None)
    assert found[3]["file"] == "sample/a.png"
    assert found[5]["how"] == "done"
    history = read_history(path)
    assert history.curves == {"loss": {1: 0.123457}, "gradient_norm": {1: None}}
    assert history.warnings == {"early 1": 0}
    assert (history.end, history.sessions, history.step) == (("done", ""), 1, 1)


def test_it_is_written_about_every_second(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    record = Record(path)
    record.begin(0, {}, continued=False)
    sizes = []
    for step in range(1, 9):
        clock[0] += 0.3
        record.log({"loss": 1.0}, step=step)
        sizes.append(len(lines(path)) if path.exists() else 0)
    assert sizes == [0, 0, 0, 5, 5, 5, 5, 9]
    assert lines(path)[-1]["time"] == 2.4


def test_a_run_that_goes_on_keeps_what_it_has_done(path: Path) -> None:
    write_steps(path, 1, 6)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"kind":"values","step":')  # a process that was killed
    assert read_history(path).damaged == 1
    write_steps(path, 5, 8, continued=True)  # from the state of step 4
    history = read_history(path)
    assert list(history.curves["loss"]) == list(range(1, 9))
    assert (history.sessions, history.damaged) == (2, 0)
    write_steps(path, 1, 2)
    assert list(read_history(path).curves["loss"]) == [1, 2]


@pytest.mark.parametrize(
    ("error", "how"),
    [(Interrupted("stopped after 1", 2), "stopped"), (KeyboardInterrupt(), "stopped"), (OSError("full"), "failed")],
)
def test_how_it_ended(path: Path, error: BaseException, how: str) -> None:
    record = Record(path)

    @recording(record)
    def fail() -> None:
        record.begin(0, {}, continued=False)
        record.log({"loss": 1.0}, step=1)
        raise error

    with pytest.raises(type(error)):
        fail()
    assert read_history(path).end == (how, str(error))


@pytest.mark.parametrize("content", ["", "x\n", "[1]\n", '{"kind":"values","step":1,"loss":2}\n', "[" * 100_000])
def test_what_is_no_record_is_refused(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="expected the record of a run"):
        read_history(path)


def test_lines_that_lie_do_no_harm(path: Path) -> None:
    """Of other types than written: left out, or shown as text."""
    session = {"kind": "session", "step": 0, "at": 5, "facts": [1]}
    values = {"kind": "values", "step": 1, "time": "x", "loss": "0.1", "lr": [1], "good": 2}
    others = [{"kind": "picture", "step": 1}, {"kind": "values", "step": "1"}, {"kind": 3, "step": 1}]
    entries = [session, values, *others]
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")
    history = read_history(path)
    assert history.curves == {"good": {1: 2}}
    assert history.facts == {}


def test_a_resumed_run_has_one_record_of_all_its_steps(configure: Configure, tmp_path: Path) -> None:
    flags = ["--save_every_n_steps", "2", "--save_state", "--validation_split", "0.25", "--validate_every_n_steps", "2"]
    train(configure("--max_train_steps", "3", *flags))
    resumed = train(
        configure("--max_train_steps", "5", *flags, "--resume", str(tmp_path / "output/test-step00000002-state"))
    )
    through = train(configure("--max_train_steps", "5", *flags, output_dir=tmp_path / "through"))
    one, other = (read_history(Outputs(r.adapter.parent, "test").record) for r in (resumed, through))
    for name in ("loss", "lr", "gradient_norm", "validation/loss", "validation/sigma_0.5"):
        assert one.curves[name] == other.curves[name], name
    assert list(one.curves["loss"]) == [1, 2, 3, 4, 5]
    assert (one.sessions, other.sessions) == (2, 1)
