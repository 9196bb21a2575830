"""Ends that nobody planned: signals, files that ask, numbers that are not finite, memory that runs out."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from anima_peft.cli import report_faults
from anima_peft.errors import InputError, Interrupted, TrainingError
from anima_peft.training import encoding, loop, saving
from anima_peft.training.health import Health
from anima_peft.training.outputs import Outputs
from anima_peft.training.processes import Processes
from anima_peft.training.requests import Action, Requests
from anima_peft.training.run import train
from anima_peft.training.state import Progress

from .conftest import Configure
from .outcomes import same_tensors

# A step of two batches and a step of one; dropout draws from torch's own generator.
FLAGS = ["--gradient_accumulation_steps", "2", "--network_args", "rank_dropout=0.3"]
NAMES = [name for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """Those of a program in the foreground, also where the tests were started in the background of a shell."""
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in NAMES}
    for number in before:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], Any]) -> None:
    """Have something happen inside of a step, after its optimizer's."""
    real = Accelerator.log

    def log(self: Accelerator, values: dict[str, float], step: int, wanted: int = step) -> None:
        real(self, values, step=step)
        if step == wanted:
            action()

    monkeypatch.setattr(Accelerator, "log", log)


def at_batch(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
    """Change the loss of batches by their number in this run, from 1."""
    real, done = loop.batch_loss, []

    def batch_loss(*args: Any) -> torch.Tensor:
        done.append(1)
        return change(len(done), real(*args))

    monkeypatch.setattr(loop, "batch_loss", batch_loss)


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")] if folder.exists() else []


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_ends_with_the_step_saved(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    number = signal.Signals[name]
    before = signal.getsignal(number)
    at_step(monkeypatch, 2, lambda: signal.raise_signal(number))
    assert report_faults(lambda: train(configure("--max_train_steps", "4"))) == 128 + number
    errors = capsys.readouterr().err
    assert f"{name}: finishing this step" in errors
    assert "Stopped after step 2 of 4; go on with --resume" in errors
    assert signal.getsignal(number) is before
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == [
        "test-config.toml",
        "test-log.jsonl",
        "test-report.html",
        "test-step00000002-state",
        "test-step00000002.safetensors",
    ]


def test_a_second_signal_leaves_at_once_and_breaks_nothing(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--max_train_steps", "3", "--save_every_n_steps", "1", "--save_state"]
    through = train(configure(*flags, output_dir=tmp_path / "through"))
    at_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGINT))
    real = Accelerator.save_state

    def save_state(self: Accelerator, folder: str) -> None:
        real(self, folder)
        if "step00000002" in folder:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Accelerator, "save_state", save_state)
    assert report_faults(lambda: train(configure(*flags))) == 130
    assert not (tmp_path / "output" / "test-step00000002-state").exists()
    assert hidden(tmp_path / "output") == []
    monkeypatch.undo()
    resumed = train(configure(*flags, "--resume", "latest"))
    assert same_tensors(through.adapter, resumed.adapter)


def test_a_signal_at_the_last_step_ends_after_it(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that comes while the last files are written."""
    plain = train(configure("--max_train_steps", "2", output_dir=tmp_path / "plain"))
    for when in ("in the step", "in the save"):
        with monkeypatch.context() as patched:
            if when == "in the step":
                at_step(patched, 2, lambda: signal.raise_signal(signal.SIGTERM))
            else:
                real = saving.write_atomically
                patched.setattr(
                    saving, "write_atomically", lambda *a, real=real: (signal.raise_signal(signal.SIGTERM), real(*a))
                )
            with pytest.raises(Interrupted, match="adapter is complete") as end:
                train(configure("--max_train_steps", "2", "--overwrite"))
        assert end.value.exit_code == 143
        assert same_tensors(plain.adapter, tmp_path / "output" / "test.safetensors")
        left = ["test-config.toml", "test-log.jsonl", "test-report.html", "test.safetensors"]
        assert sorted(p.name for p in (tmp_path / "output").iterdir()) == left


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
def test_what_nohup_ignores_stays_ignored(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGHUP))
    assert train(configure("--max_train_steps", "2")).steps == 2


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals to single processes")
def test_a_signal_to_all_processes_leaves_the_loaders_workers_at_work(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C and a closed terminal reach them too, and the step has yet to be finished."""
    workers: list[int] = []

    def signal_workers() -> None:
        for worker in multiprocessing.active_children():
            assert worker.pid is not None
            workers.append(worker.pid)
            for number in (signal.SIGINT, signal.SIGHUP):
                os.kill(worker.pid, number)
                os.kill(worker.pid, number)
        time.sleep(0.2)

    at_step(monkeypatch, 1, signal_workers)
    assert train(configure("--max_train_steps", "7", "--max_data_loader_n_workers", "1")).steps == 7
    assert workers
    assert "finishing this step" not in capfd.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals to single processes")
def test_a_service_that_terminates_all_processes_loses_no_step(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def terminate() -> None:
        signal.raise_signal(signal.SIGTERM)
        for worker in multiprocessing.active_children():
            worker.terminate()
        time.sleep(0.3)  # torch hears of their end and raises; should it come later, the step is finished first

    at_step(monkeypatch, 1, terminate)
    code = report_faults(lambda: train(configure("--max_train_steps", "7", "--max_data_loader_n_workers", "1")))
    assert code == 143
    assert re.search("after step 1 .*go on with --resume", capsys.readouterr().err)


@pytest.mark.parametrize("suffix", ["", ".txt"])
def test_files_ask_for_a_save_and_for_the_end(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, suffix: str
) -> None:
    folder = tmp_path / "output"
    folder.mkdir()
    (folder / f"test-stop{suffix}").touch()  # too late for the run that it was meant for
    at_step(monkeypatch, 1, (folder / f"test-save{suffix}").touch)
    at_step(monkeypatch, 3, (folder / f"test-stop{suffix}").touch)
    assert report_faults(lambda: train(configure("--max_train_steps", "5"))) == 0
    assert sum("not heeded" in message for message in caplog.messages) == 1
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "test-step00000001-state",
        "test-step00000003-state",
    ]
    assert not (folder / f"test-stop{suffix}").exists()
    assert train(configure("--max_train_steps", "5", "--resume", "latest")).steps == 5


def test_a_launcher_that_is_gone_ends_the_run(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    parents = iter([100])
    monkeypatch.setattr("anima_peft.training.requests.os.getppid", lambda: next(parents, 1))
    with pytest.raises(Interrupted, match="Stopped after step 1 of 3") as end:
        train(configure("--max_train_steps", "3"))
    assert end.value.exit_code == 143


def out_of_memory(batch: int, loss: torch.Tensor, *, at: int = 4) -> torch.Tensor:
    if batch == at:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    return loss


def not_finite(batch: int, loss: torch.Tensor, *, at: int = 4) -> torch.Tensor:
    return loss * float("nan") if batch == at else loss


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (out_of_memory, r"Tried to allocate 2 GiB.*gradient_checkpointing = true.*lower batch_size"),
        (not_finite, r"the loss is nan in step 3, .*sigma 0\.\d+\)"),
    ],
)
def test_a_failure_leaves_a_state_that_goes_on_exactly(
    configure: Configure,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: Callable[[int, torch.Tensor], torch.Tensor],
    message: str,
) -> None:
    """In the first of the two batches of a step, when dropout has drawn for it already."""
    through = train(configure("--max_train_steps", "5", *FLAGS, output_dir=tmp_path / "through"))
    at_batch(monkeypatch, failure)
    with pytest.raises(TrainingError, match=f"{message}(.|\n)*The state after step 2 is saved"):
        train(configure("--max_train_steps", "5", *FLAGS))
    monkeypatch.undo()
    resumed = train(configure("--max_train_steps", "5", *FLAGS, "--resume", "latest"))
    assert same_tensors(through.adapter, resumed.adapter)


def test_weights_of_half_a_step_are_not_saved(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, done = torch.optim.AdamW.step, []

    def step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        done.append(1)
        if len(done) == 2:
            raise torch.OutOfMemoryError("")
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(TrainingError, match=r"ran out of memory(.|\n)*not saved"):
        train(configure("--max_train_steps", "3", "--optimizer_type", "AdamW"))
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == ["test-log.jsonl", "test-report.html"]
    monkeypatch.undo()
    train(configure("--max_train_steps", "1"))  # these two stop nobody: nothing was saved


def test_a_cache_file_that_is_gone_costs_no_step(
    configure: Configure, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(pictures, folder)
    at_step(monkeypatch, 1, lambda: shutil.rmtree(folder / ".anima_cache" / "latents"))
    with pytest.raises(InputError, match=r"cache entry is missing(.|\n)*The state after step \d is saved"):
        train(configure("--max_train_steps", "9", image_dir=folder))


def test_memory_that_ends_while_caching_keeps_what_is_cached(
    configure: Configure, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(pictures, folder, ignore=shutil.ignore_patterns(".anima_cache"))
    real, done = encoding.encode_latents, []

    def encode(*args: Any) -> torch.Tensor:
        done.append(1)
        if len(done) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*args)

    monkeypatch.setattr(encoding, "encode_latents", encode)
    with pytest.raises(TrainingError, match="lower vae_batch_size"):
        train(configure("--max_train_steps", "1", image_dir=folder))
    assert len(list((folder / ".anima_cache" / "latents").rglob("*.safetensors"))) == 3


@pytest.mark.parametrize("accumulated", ["1", "2"])
def test_the_pictures_of_the_batch_with_the_bad_loss_are_named(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, accumulated: str
) -> None:
    seen: list[list[float]] = []
    real = loop.batch_loss

    def batch_loss(model: Any, batch: dict[str, torch.Tensor], *args: Any) -> torch.Tensor:
        seen.append(batch["sigma"].tolist())
        return real(model, batch, *args) * (float("inf") if len(seen) == 1 else 1.0)

    monkeypatch.setattr(loop, "batch_loss", batch_loss)
    with pytest.raises(TrainingError, match=r"the loss is inf in step 1") as error:
        train(configure("--max_train_steps", "2", "--gradient_accumulation_steps", accumulated))
    text = str(error.value)
    assert text.count(".png") == len(seen[0])
    assert all(f"(sigma {sigma:.3f})" in text for sigma in seen[0])


def test_steps_that_are_not_finite_are_left_out_up_to_the_limit(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also across a state: the limit is the run's."""
    flags = ["--max_train_steps", "4", "--skip_nonfinite_steps", "1", "--save_every_n_steps", "2", "--save_state"]
    at_batch(monkeypatch, lambda batch, loss: not_finite(batch, loss, at=2))
    result = train(configure(*flags))
    assert sum("left out (1 of at most 1)" in message for message in caplog.messages) == 1
    assert result.relative_delta > 1e-3
    state = result.adapter.with_name("test-step00000002-state")
    at_batch(monkeypatch, lambda batch, loss: not_finite(batch, loss, at=1))
    with pytest.raises(TrainingError, match="the loss is nan in step 3"):
        train(configure(*flags, "--resume", str(state)))


def test_spikes_are_reported_a_few_times(caplog: pytest.LogCaptureFixture) -> None:
    health = Health(0, Progress(), lambda batches: [["a.png"]] * batches)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 100):
            norm = 30.0 if step > 50 and step % 5 == 0 else 1.0
            assert health.may_step(step, [1.0], [torch.tensor([0.5])], norm, scaled=False)
    assert len(caplog.messages) == 5
    assert caplog.messages[0].startswith("step 55: the gradient's norm is 30, usual is 1; a.png (sigma 0.500)")
    assert "further ones are not reported" in caplog.messages[-1]


def test_a_signal_that_comes_while_processes_agree_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(Accelerator(cpu=True))
    requests = Requests(Outputs(tmp_path, "lora"), processes)

    def gather(value: Any) -> list[Any]:
        monkeypatch.undo()
        signal.raise_signal(signal.SIGTERM)
        return [value]

    with requests.listening():
        monkeypatch.setattr(processes, "gather", gather)
        assert requests.take() is None
        assert requests.take() is Action.STOP
        assert requests.signal == signal.SIGTERM
