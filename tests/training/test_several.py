"""Several processes train the adapter that one would train with their batches together."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from anima_peft.data.cache import TensorCache
from anima_peft.data.dataset import CachedDataset
from anima_peft.errors import InputError
from anima_peft.training.run import train
from tests.several import in_processes, report, reported, this_process

from .conftest import DATASET, Configure
from .outcomes import names_in, same_tensors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has imported torch")

# The update is the gradient times the rate: what Adam would hide, or blow up, is seen as it is.
SGD = ["--optimizer_type", "torch.optim.SGD", "--learning_rate", "0.05", "--max_grad_norm", "0"]
FLAGS = ["--max_train_epochs", "2", "--network_args", "train_llm_adapter=true"]


def batches_of(size: int, pictures: Path, subset: str = "") -> list[str]:
    """The flag that names a dataset of these pictures with this batch size."""
    file = pictures.with_name(f"batches_of_{size}.toml")
    text = DATASET.format(image_dir=pictures).replace("batch_size = 4", f"batch_size = {size}")
    file.write_text(text + subset, encoding="utf-8")
    return ["--dataset_config", str(file)]


def largest_difference(one: Path, other: Path) -> float:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def size_of_learning(adapter: Path) -> float:
    """The largest number in what starts at zero."""
    return max(float(v.abs().max()) for k, v in load_file(adapter).items() if "lora_up" in k or "norm" in k)


def note_logs(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Every process writes what it logs into a file of its own."""

    def log(self: Accelerator, values: dict[str, float], step: int, **_: Any) -> None:
        timeless = {name: value for name, value in values.items() if "per_second" not in name and "memory" not in name}
        with (folder / f"log_{self.num_processes}_{self.process_index}.txt").open("a") as file:
            file.write(json.dumps({"step": step, **timeless}) + "\n")

    monkeypatch.setattr(Accelerator, "log", log)


def logged(folder: Path, count: int, process: int) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / f"log_{count}_{process}.txt").read_text().splitlines()]


def assert_alike(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    assert [row.keys() for row in one] == [row.keys() for row in other]
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_the_adapter_is_that_of_one_process(
    configure: Configure, tmp_path: Path, uneven: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conditioner and norms included, with batches that do not go round evenly; what is cached is made once."""
    note_logs(monkeypatch, tmp_path)
    made = tmp_path / "made.txt"
    real = TensorCache.write

    def write(self: TensorCache, key: str, tensors: Any) -> Path:
        with made.open("a") as file:
            file.write(f"{this_process()} {key}\n")
        return real(self, key, tensors)

    monkeypatch.setattr(TensorCache, "write", write)
    in_processes(2, train, configure(*FLAGS, *SGD, *batches_of(2, uneven), output_dir=tmp_path / "two"))
    keys = Counter(line.split()[1] for line in made.read_text().splitlines())
    assert set(keys.values()) == {1}
    assert Counter(line.split()[0] for line in made.read_text().splitlines()) == {"0": 8, "1": 8}

    one = train(configure(*FLAGS, *SGD, *batches_of(4, uneven), output_dir=tmp_path / "one"))
    assert len(made.read_text().splitlines()) == 16, "one process uses the same cache"
    assert size_of_learning(one.adapter) > 1e-3
    assert largest_difference(one.adapter, tmp_path / "two" / "test.safetensors") < 1e-6
    assert_alike(logged(tmp_path, 2, 0), logged(tmp_path, 1, 0))
    assert logged(tmp_path, 2, 0) == logged(tmp_path, 2, 1)
    assert names_in(tmp_path / "two") == names_in(tmp_path / "one")


EQUAL = {
    "AdamW": ["--optimizer_type", "AdamW", "--learning_rate", "1e-4", "--use_ema", "--scale_weight_norms", "0.01"],
    "accumulation": [*SGD[:-1], "0.01", "--gradient_accumulation_steps", "2"],
    "LoKr": [*SGD, "--network_module", "networks.lokr_anima"],
    "LoKr's sentinel": [*SGD, "--network_module", "networks.lokr_anima", "--network_dim", "100000"],
    "DoRA": [*SGD, "--network_args", "use_dora=true"],
    "schedule-free": ["--optimizer_type", "AdamWScheduleFree", "--learning_rate", "1e-4"],
    "checkpointing": [*SGD, "--gradient_checkpointing"],
    "pixels and captions in every step": [*SGD, "--no-cache_latents", "--no-cache_text_encoder_outputs"],
}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("kind", EQUAL)
def test_any_training_is_that_of_one_process(
    configure: Configure, tmp_path: Path, uneven: Path, kind: str, processes: int
) -> None:
    """With 4 processes, a bucket of one picture leaves three of them without any."""
    flags = ["--max_train_epochs", "2", "--save_every_n_steps", "2", "--save_state", *EQUAL[kind]]
    one = train(configure(*flags, *batches_of(4, uneven), output_dir=tmp_path / "one"))
    config = configure(*flags, *batches_of(4 // processes, uneven), output_dir=tmp_path / "several")
    in_processes(processes, train, config)
    assert largest_difference(one.adapter, tmp_path / "several" / "test.safetensors") < 1e-6
    assert names_in(tmp_path / "several") == names_in(tmp_path / "one")


@pytest.mark.slow
def test_captions_of_unlike_length_are_those_of_one_batch(configure: Configure, tmp_path: Path, uneven: Path) -> None:
    """Beyond 512 tokens, the rows of zeros after a caption depend on the longest of the whole batch."""
    for number, file in enumerate(sorted(uneven.glob("*.txt"))):
        file.write_text("a " * (700 if number % 3 == 0 else 20) + file.stem, encoding="utf-8")
    flags = [*FLAGS, *SGD, "--anima_seq_len", "800"]
    one = train(configure(*flags, *batches_of(4, uneven), output_dir=tmp_path / "one"))
    in_processes(2, train, configure(*flags, *batches_of(2, uneven), output_dir=tmp_path / "two"))
    assert largest_difference(one.adapter, tmp_path / "two" / "test.safetensors") < 1e-6
    frozen = ["--max_train_epochs", "2", *SGD, "--anima_seq_len", "800", "--overwrite"]
    one = train(configure(*frozen, *batches_of(4, uneven), output_dir=tmp_path / "one"))
    in_processes(2, train, configure(*frozen, *batches_of(2, uneven), output_dir=tmp_path / "two"))
    assert largest_difference(one.adapter, tmp_path / "two" / "test.safetensors") < 1e-6


@pytest.mark.slow
def test_validation_is_that_of_one_process(
    configure: Configure, tmp_path: Path, uneven: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note_logs(monkeypatch, tmp_path)
    flags = ["--max_train_epochs", "2", *SGD, "--validate_every_n_epochs", "1"]
    split = "[general]\nvalidation_split = 0.4\n"
    train(configure(*flags, *batches_of(4, uneven, split), output_dir=tmp_path / "one"))
    in_processes(2, train, configure(*flags, *batches_of(2, uneven, split), output_dir=tmp_path / "two"))
    assert any("validation/loss" in row for row in logged(tmp_path, 1, 0))
    assert_alike(logged(tmp_path, 2, 0), logged(tmp_path, 1, 0))
    assert logged(tmp_path, 2, 0) == logged(tmp_path, 2, 1)


@pytest.mark.slow
def test_dropout_differs_between_the_processes(
    configure: Configure, tmp_path: Path, uneven: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.nn.functional.dropout
    seen = tmp_path / "seen.txt"

    def dropout(value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = real(torch.ones(64), *args, **kwargs)
        with seen.open("a") as file:
            file.write(f"{this_process()} {''.join(str(int(number > 0)) for number in result)}\n")
        return real(value, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    config = configure("--max_train_steps", "1", "--network_dropout", "0.5", *batches_of(2, uneven))
    in_processes(2, train, config)
    lines = [line.split() for line in seen.read_text().splitlines()]
    masks = {number: [mask for process, mask in lines if process == number and "0" in mask] for number in ("0", "1")}
    assert len(masks["0"]) == len(masks["1"]) > 0
    assert not set(masks["0"]) & set(masks["1"])


DROPS = ["--network_module", "networks.lokr_anima", "--network_args", "rank_dropout=0.3", "module_dropout=0.2"]


def stop_after_every_step(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def log(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        if self.is_main_process:
            (folder / "test-stop.txt").touch()

    monkeypatch.setattr(Accelerator, "log", log)


@pytest.mark.slow
def test_stopped_after_every_step_a_run_is_the_same(
    configure: Configure, tmp_path: Path, uneven: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, with each process's own dropout, also inside of an epoch and with accumulated batches."""
    flags = ["--max_train_epochs", "2", "--gradient_accumulation_steps", "2", *DROPS, *batches_of(2, uneven)]
    in_processes(2, train, configure(*flags, output_dir=tmp_path / "through"))
    folder = tmp_path / "stopped"
    folder.mkdir()
    stop_after_every_step(monkeypatch, folder)
    for step in range(1, 5):
        resume = ["--resume", "latest"] if step > 1 else []
        in_processes(2, report, configure(*flags, *resume, output_dir=folder), tmp_path)
        if step < 4:
            assert f"Stopped after step {step} of 4" in reported(tmp_path, 0)
            assert reported(tmp_path, 1) == "\nexit code 0"
    assert same_tensors(tmp_path / "through" / "test.safetensors", folder / "test.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4), (4, 1)])
def test_another_number_of_processes_goes_on_with_as_large_batches(
    configure: Configure, tmp_path: Path, uneven: Path, before: int, after: int
) -> None:
    """In the middle of an epoch, as if one process had done it all."""
    flags = ["--network_args", "train_llm_adapter=true", *SGD, "--save_state", "--lr_scheduler", "linear"]
    through = [*flags, "--max_train_epochs", "2", "--save_every_n_steps", "2"]
    one = train(configure(*through, *batches_of(4, uneven), output_dir=tmp_path / "one"))
    folder = tmp_path / "several"
    in_processes(before, train, configure(*through, *batches_of(4 // before, uneven), output_dir=folder))
    state = folder / "test-step00000002-state"
    config = configure(*through, *batches_of(4 // after, uneven), "--resume", str(state), output_dir=folder)
    (folder / "test.safetensors").unlink()
    in_processes(after, train, config)
    assert largest_difference(one.adapter, folder / "test.safetensors") < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_with_other_batches(
    configure: Configure, tmp_path: Path, uneven: Path, before: int, after: int
) -> None:
    """The epochs stay as many; shuffled captions of all of them are there."""
    per_epoch = {1: 5, 2: 3}  # buckets of 4, 3 and 1 in batches of 2 and 4
    shuffled = "shuffle_caption = true\nflip_aug = true\n"
    flags = [*batches_of(2, uneven, shuffled), "--save_state", "--max_train_epochs", "3", "--save_every_n_steps", "1"]
    in_processes(before, report, configure(*flags), tmp_path)
    done = per_epoch[before] + 1  # one batch into the second epoch
    state = tmp_path / "output" / f"test-step{done:08d}-state"
    in_processes(after, report, configure(*flags, "--resume", str(state)), tmp_path)
    said = reported(tmp_path, 0)
    assert "exit code 0" in said
    assert f"made with {before} process(es), and there are {after} now" in said
    progress = json.loads((tmp_path / "output" / "test-state" / "progress.json").read_text())
    assert (progress["epoch"], progress["processes"]) == (3, after)
    # After its first batch, what is left of the second epoch, and the third.
    assert done + per_epoch[after] < progress["step"] <= done + 2 * per_epoch[after]


@pytest.mark.slow
def test_other_batches_with_as_many_processes_are_refused(configure: Configure, tmp_path: Path, uneven: Path) -> None:
    train(configure("--max_train_steps", "1", "--save_state", *batches_of(4, uneven)))
    with pytest.raises(InputError, match=r"batch sizes is \[2\], and was \[4\]"):
        train(configure("--max_train_steps", "2", "--resume", "latest", *batches_of(2, uneven)))


def fail_in(
    process: int, error: BaseException, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int
) -> None:
    """The call number `at` of a method raises in one process."""
    real, calls = getattr(owner, name), iter(range(1, 10**6))

    def call(*args: Any, **kwargs: Any) -> Any:
        if this_process() == process and next(calls) == at:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_an_error_in_one_process_ends_all_with_one_report(
    configure: Configure, tmp_path: Path, uneven: Path, monkeypatch: pytest.MonkeyPatch, process: int
) -> None:
    """And the state is saved, which goes on to the same adapter."""
    flags = ["--max_train_epochs", "2", *DROPS, *batches_of(2, uneven)]
    in_processes(2, train, configure(*flags, output_dir=tmp_path / "through"))
    with monkeypatch.context() as patched:
        # Its third batch, if each is of two samples at most.
        fail_in(process, InputError("a file is gone"), patched, CachedDataset, "__getitem__", 5)
        in_processes(2, report, configure(*flags), tmp_path)
    by = "" if process == 0 else "process 2 of 2: "
    assert f"error: {by}a file is gone\nThe state after step" in reported(tmp_path, 0)
    assert "exit code 2" in reported(tmp_path, 0)
    assert reported(tmp_path, 1) == "\nexit code 2"
    in_processes(2, train, configure(*flags, "--resume", "latest"))
    assert same_tensors(tmp_path / "through" / "test.safetensors", tmp_path / "output" / "test.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name"), [(TensorCache, "write"), (Accelerator, "save_state")], ids=["caching", "saving"]
)
def test_a_disk_that_is_full_for_one_ends_all(
    configure: Configure, tmp_path: Path, uneven: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    process = 1 if name == "write" else 0
    fail_in(process, OSError(28, "No space left on device"), monkeypatch, owner, name, 1)
    in_processes(2, report, configure("--max_train_steps", "1", "--save_state", *batches_of(2, uneven)), tmp_path)
    assert reported(tmp_path, 0).count("No space left on device") == 1
    assert "exit code 1" in reported(tmp_path, 0)
    assert reported(tmp_path, 1) == "\nexit code 1"


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_an_error_in_the_middle_of_a_step_leaves_a_state(
    configure: Configure, tmp_path: Path, uneven: Path, monkeypatch: pytest.MonkeyPatch, process: int
) -> None:
    """Nobody can agree there: gradients are on their way."""
    flags = ["--max_train_epochs", "2", *SGD, *batches_of(2, uneven)]
    in_processes(2, train, configure(*flags, output_dir=tmp_path / "through"))
    with monkeypatch.context() as patched:
        fail_in(process, torch.OutOfMemoryError("out of it"), patched, Accelerator, "backward", 3)
        in_processes(2, report, configure(*flags), tmp_path)
    said, other = reported(tmp_path, process), reported(tmp_path, 1 - process)
    assert "out of it" in said
    assert "exit code 1" in said
    assert "exit code 1" in other
    assert "The state after step 2 is saved" in reported(tmp_path, 0)
    in_processes(2, train, configure(*flags, "--resume", "latest"))
    assert same_tensors(tmp_path / "through" / "test.safetensors", tmp_path / "output" / "test.safetensors")


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_after_the_same_step(
    configure: Configure, tmp_path: Path, uneven: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log(self: Accelerator, values: dict[str, float], step: int, **_: Any) -> None:
        if self.process_index == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Accelerator, "log", log)
    in_processes(2, report, configure("--max_train_steps", "30", *batches_of(2, uneven)), tmp_path)
    assert "Stopped after step 2 of 30" in reported(tmp_path, 0)
    for process in (0, 1):
        assert "exit code 143" in reported(tmp_path, process)


@pytest.mark.slow
def test_previews_and_a_comparison_are_drawn_once(configure: Configure, tmp_path: Path, uneven: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2\n", encoding="utf-8")
    flags = ["--max_train_steps", "2", "--sample_prompts", str(prompts), "--sample_every_n_steps", "1", *SGD]
    flags += ["--compare_prompts", "a cat --w 64 --h 64 --s 2"]
    one = train(configure(*flags, *batches_of(4, uneven), output_dir=tmp_path / "one"))
    in_processes(2, train, configure(*flags, *batches_of(2, uneven), output_dir=tmp_path / "two"))
    assert names_in(tmp_path / "two") == names_in(tmp_path / "one")
    assert names_in(tmp_path / "two" / "sample") == names_in(tmp_path / "one" / "sample")
    assert largest_difference(one.adapter, tmp_path / "two" / "test.safetensors") < 1e-6
