"""Several processes as users start them: the lines of docs/several-cards.md."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from anima_peft.errors import InputError
from anima_peft.training.run import train
from tests.several import LOOPBACK, free_port

from .conftest import Configure
from .launching import LAUNCH, SCRIPT, end, kill, start, wait_for, written
from .test_several import SGD, batches_of, largest_difference

on_loopback = pytest.mark.skipif(sys.platform != "linux", reason="the loopback is called otherwise elsewhere")


def start_several(folder: Path, flags: list[str], *words: str) -> subprocess.Popen[str]:
    """`accelerate launch` with these flags, and the script with these words."""
    return start(folder, [*LAUNCH, *flags, SCRIPT, *words], LOOPBACK)


@pytest.mark.slow
@on_loopback
@pytest.mark.parametrize("machines", [1, 2])
def test_accelerate_starts_two_processes(configure: Configure, tmp_path: Path, uneven: Path, machines: int) -> None:
    """On one machine, and on two, which here are two launchers that meet on the loopback."""
    flags = ["--max_train_epochs", "2", *SGD]
    one = train(configure(*flags, *batches_of(4, uneven), output_dir=tmp_path / "one"))
    config = written(configure, tmp_path, *flags, *batches_of(2, uneven))
    own_places = ["--cache_dir", str(tmp_path / "own cache"), "--output_dir", str(tmp_path / "nothing")]
    line = ["--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())]
    if machines == 1:
        runs = [start_several(tmp_path, line, "--config_file", config)]
    else:
        line += ["--num_machines", "2", "--main_process_ip", "127.0.0.1"]
        runs = [
            start_several(tmp_path, [*line, "--machine_rank", "0"], "--config_file", config),
            # Machines need not share a disk.
            start_several(tmp_path, [*line, "--machine_rank", "1"], "--config_file", config, *own_places),
        ]
    said = [end(run) for run in runs]
    assert [run.returncode for run in runs] == [0] * machines, said
    assert largest_difference(one.adapter, tmp_path / "output" / "test.safetensors") < 1e-6
    outputs, errors = zip(*said, strict=True)
    assert "".join(outputs).count("6 steps; the adapter's size is") == 1
    assert "".join([*outputs, *errors]).count("2 processes train together") == 1
    assert not (tmp_path / "nothing").exists()
    assert len(list((tmp_path / "own cache").rglob("*.safetensors"))) == (16 if machines == 2 else 0)


@pytest.mark.slow
@on_loopback
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_saves_and_ends(
    configure: Configure,
    tmp_path: Path,
    uneven: Path,
    number: signal.Signals,
) -> None:
    config = written(
        configure, tmp_path, "--max_train_steps", "3000", "--save_every_n_steps", "2", *batches_of(2, uneven)
    )
    line = ["--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())]
    run = start_several(tmp_path, line, "--config_file", config)
    try:
        wait_for(tmp_path / "output" / "test-step00000002.safetensors", run)
        (os.killpg if number is signal.SIGINT else os.kill)(run.pid, number)
        _, errors = end(run)
    finally:
        kill(run)
    assert run.returncode != 0
    found = re.search(r"Stopped after step (\d+) of 3000; go on with --resume (.*-state)", errors)
    assert found is not None, errors
    assert (Path(found[2]) / "random_states_1.pkl").is_file()
    assert errors.count("Stopped after step") == 1
    assert not list((tmp_path / "output").glob(".*"))


@pytest.mark.slow
@on_loopback
def test_a_fault_is_reported_once(configure: Configure, tmp_path: Path, uneven: Path) -> None:
    config = written(configure, tmp_path, "--max_train_steps", "1", *batches_of(2, uneven))
    (uneven / "00.png").write_bytes(b"not a picture")
    line = ["--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())]
    _, errors = end(run := start_several(tmp_path, line, "--config_file", config))
    assert run.returncode == 1, "the launcher's own"
    assert errors.count("error: ") == 1, errors
    assert "00.png" in errors


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "set up for FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "set up for DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "set up for Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "set up for parallelism_config"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "asked for several processes and started one"),
    ],
)
def test_what_does_not_train_so_is_refused(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        train(configure("--max_train_steps", "1"))


@pytest.mark.slow
@on_loopback
def test_a_launcher_that_starts_one_of_two_is_refused(
    configure: Configure,
    tmp_path: Path,
    uneven: Path,
) -> None:
    config = written(configure, tmp_path, "--max_train_steps", "1", *batches_of(2, uneven))
    _, errors = end(run := start_several(tmp_path, ["--cpu", "--num_processes", "2"], "--config_file", config))
    assert run.returncode == 1
    assert "add --multi_gpu" in errors
