"""Runs that are stopped and gone on with: to the last bit what they would have been."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from anima_peft.data.dataset import CachedDataset
from anima_peft.errors import InputError, Interrupted
from anima_peft.training.run import train

from .conftest import Configure, Logged
from .outcomes import names_in, same_tensors

# Three batches an epoch: a step of two and a step of one.
FLAGS = ["--max_train_epochs", "3", "--gradient_accumulation_steps", "2", "--save_every_n_epochs", "1"]
STEPS, BATCH = 6, 4
NETWORKS = {
    "LoKr": ["--network_module", "networks.lokr_anima", "--network_args", "rank_dropout=0.3", "module_dropout=0.2"],
    "LoRA": ["--network_dropout", "0.3", "--scale_weight_norms", "0.5", "--lr_scheduler", "cosine"],
}


def stop_after_every_step(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    real = Accelerator.log

    def log(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        (folder / "test-stop.txt").touch()

    monkeypatch.setattr(Accelerator, "log", log)


@pytest.mark.parametrize("network", NETWORKS)
def test_stopped_after_every_step_a_run_is_the_same(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: Logged, network: str
) -> None:
    """Also where an epoch ends with a step, where a step is of fewer batches, and with what dropout draws."""
    flags = [*FLAGS, *NETWORKS[network], *(["--use_ema", "--ema_decay", "0.9"] if network == "LoKr" else [])]
    through = train(configure(*flags, output_dir=tmp_path / "through"))
    expected = list(logged)
    assert [step for step, _ in expected] == list(range(1, STEPS + 1))
    logged.clear()

    read: list[tuple[int, int]] = []
    real = CachedDataset.__getitem__
    monkeypatch.setattr(CachedDataset, "__getitem__", lambda self, item: (read.append(item), real(self, item))[1])
    folder = tmp_path / "stopped"
    folder.mkdir()
    stop_after_every_step(monkeypatch, folder)
    for step in range(1, STEPS):
        read.clear()
        with pytest.raises(Interrupted, match=f"Stopped after step {step} of {STEPS}") as stopped:
            train(configure(*flags, *(["--resume", "latest"] if step > 1 else []), output_dir=folder))
        assert stopped.value.exit_code == 0
        # The step's own batches, and the one that the loader has ready.
        assert len(read) <= 3 * BATCH, "samples were read that the state is past"
    resumed = train(configure(*flags, "--resume", "latest", output_dir=folder))

    assert same_tensors(through.adapter, resumed.adapter)
    assert through.relative_delta == resumed.relative_delta
    assert logged == expected
    for epoch in (1, 2, 3):
        name = f"test-{epoch:06d}.safetensors"
        assert same_tensors(tmp_path / "through" / name, folder / name), "an epoch that ended with the last step"


def test_a_finished_run_is_continued_for_more_epochs(configure: Configure, tmp_path: Path, logged: Logged) -> None:
    through = train(configure("--max_train_epochs", "3", output_dir=tmp_path / "a"))
    expected = list(logged)
    logged.clear()
    train(configure("--max_train_epochs", "1", "--save_state_on_train_end", output_dir=tmp_path / "b"))
    with pytest.raises(InputError, match="raise max_train_steps or max_train_epochs"):
        train(configure("--max_train_epochs", "1", "--resume", "latest", output_dir=tmp_path / "b"))
    more = train(configure("--max_train_epochs", "3", "--resume", "latest", output_dir=tmp_path / "b"))
    assert same_tensors(through.adapter, more.adapter)
    assert logged == expected


def test_a_run_killed_after_its_last_step_is_finished(configure: Configure, tmp_path: Path) -> None:
    """The state of the last step was saved, and not yet what comes after it."""
    flags = ["--max_train_epochs", "2", "--save_every_n_steps", "3", "--save_state", "--save_every_n_epochs", "1"]
    through = train(configure(*flags, output_dir=tmp_path / "a"))
    folder = tmp_path / "b"
    train(configure(*flags, output_dir=folder))
    for path in ("test.safetensors", "test-000002.safetensors"):
        (folder / path).unlink()
    (folder / "test-000002-state").rename(tmp_path / "gone")
    (folder / "test-state").rename(tmp_path / "gone too")
    resumed = train(configure(*flags, "--resume", "latest", output_dir=folder))
    assert resumed.steps == 6
    assert same_tensors(through.adapter, resumed.adapter)
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in through.adapter.parent.iterdir())


def change_a_caption(folder: Path) -> None:
    (folder / "00.txt").write_text("something else", encoding="utf-8")


def remove_a_picture(folder: Path) -> None:
    (folder / "00.png").unlink()


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (change_a_caption, [], "content of the pictures"),
        (remove_a_picture, [], "number of pictures is 11, and was 12"),
        (None, ["--gradient_accumulation_steps", "2"], "gradient_accumulation_steps is 2, and was 1"),
        (None, ["--seed", "5"], "seed is 5, and was"),
        (None, ["--use_ema"], "use_ema is True, and was False"),
        (None, ["--network_args", "target_modules=.*mlp.*"], "another network"),
        (None, ["--network_module", "networks.lokr_anima"], "another network"),
    ],
)
def test_a_state_is_not_continued_as_something_else(
    configure: Configure,
    pictures: Path,
    tmp_path: Path,
    change: Callable[[Path], None] | None,
    flags: list[str],
    message: str,
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(pictures, folder)
    train(configure("--max_train_steps", "1", "--save_state", image_dir=folder))
    if change is not None:
        change(folder)
    with pytest.raises(InputError, match=message):
        train(configure("--max_train_steps", "2", "--resume", "latest", *flags, image_dir=folder))


def test_what_may_change_is_said(configure: Configure, caplog: pytest.LogCaptureFixture) -> None:
    train(configure("--max_train_steps", "1", "--save_state"))
    caplog.clear()
    train(configure("--max_train_steps", "2", "--resume", "latest", "--timestep_sampling", "uniform"))
    (said,) = [message for message in caplog.messages if "other options" in message]
    assert "timestep_sampling = 'uniform' (was " in said
    assert "max_train_steps = 2 (was 1)" in said


def test_latest_is_of_the_run_that_was_started_last(configure: Configure, tmp_path: Path) -> None:
    """An overwritten run's states may stand further on."""
    flags = ["--save_state", "--save_every_n_steps", "2"]
    train(configure("--max_train_steps", "5", *flags))
    other = ["--overwrite", "--seed", "9", *flags]
    train(configure("--max_train_steps", "2", *other))
    assert train(configure("--max_train_steps", "3", "--seed", "9", "--resume", "latest", *flags)).steps == 3


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("optimizer.bin", "short"),
        ("scheduler.bin", "missing"),
        ("random_states_0.pkl", "short"),
        ("adapter.safetensors", "short"),
    ],
)
def test_a_damaged_state_is_refused(configure: Configure, tmp_path: Path, file: str, damage: str) -> None:
    state = train(configure("--max_train_steps", "1", "--save_state")).adapter.with_name("test-state")
    path = state / file
    content = path.read_bytes()
    path.unlink()
    if damage == "short":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"test-state"):
        train(configure("--max_train_steps", "2", "--resume", str(state)))


def test_what_a_killed_save_left_is_put_right(configure: Configure, tmp_path: Path) -> None:
    """Between taking the earlier state away and putting the new one there; other runs' files are not touched."""
    folder = tmp_path / "output"
    flags = ["--save_every_n_steps", "1", "--save_state"]
    through = train(configure("--max_train_steps", "3", *flags, output_dir=tmp_path / "through"))
    train(configure("--max_train_steps", "2", *flags))
    (folder / "test-state").rename(folder / ".test-state-old")
    (folder / "test-step00000002-state").rename(tmp_path / "gone")
    (folder / ".test-state-new").mkdir()
    (folder / ".test-step00000002-abcdefgh.tmp.safetensors").touch()
    others = [".test-b-step00000002-abcdefgh.tmp.safetensors", ".tester-state-new", ".hidden"]
    for name in others:
        (folder / name).touch()
    resumed = train(configure("--max_train_steps", "3", *flags, "--resume", "latest"))
    assert same_tensors(through.adapter, resumed.adapter)
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == sorted(others)


def test_what_was_to_be_dropped_is_dropped_after_a_kill(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--save_every_n_steps", "1", "--save_state", "--save_last_n_steps", "1"]
    train(configure("--max_train_steps", "3", *flags, output_dir=tmp_path / "through"))

    def die(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("anima_peft.training.saving.remove", die)
    with pytest.raises(KeyboardInterrupt):
        train(configure("--max_train_steps", "3", *flags))
    monkeypatch.undo()
    train(configure("--max_train_steps", "3", *flags, "--resume", "latest"))
    assert names_in(tmp_path / "output") == names_in(tmp_path / "through")
