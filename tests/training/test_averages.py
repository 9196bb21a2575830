"""Runs whose saved weights are an average: what is saved, and that a state goes on exactly."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anima_peft.errors import InputError
from anima_peft.training.run import train

from .conftest import Configure

KINDS = {
    "ema": ["--use_ema", "--ema_decay", "0.8"],
    "RAdamScheduleFree": ["--optimizer_type", "radam_schedulefree", "--optimizer_args", "betas=0.9,0.9"],
    "AdamWScheduleFree": ["--optimizer_type", "AdamWScheduleFree", "--optimizer_args", "warmup_steps=3"],
    "Prodigy": ["--optimizer_type", "Prodigy", "--learning_rate", "1"],
    "Adafactor": ["--optimizer_type", "Adafactor"],
    "Lion": ["--optimizer_type", "Lion", "--lr_scheduler", "cosine_with_min_lr", "--lr_scheduler_min_lr_ratio", "0.1"],
    "AdamW8bit": ["--optimizer_type", "AdamW8bit", "--optimizer_args", "min_8bit_size=16"],
    "CAME": ["--optimizer_type", "CAME", "--network_args", "loraplus_lr_ratio=4", "network_reg_lrs=.*mlp.*=1e-3"],
}
LIBRARIES = {"Prodigy": "prodigyopt", "Lion": "lion_pytorch", "CAME": "came_pytorch", "AdamW8bit": "bitsandbytes"}


def tensors_equal(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("ema", "AdamWScheduleFree") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
def test_a_state_goes_on_exactly(configure: Configure, tmp_path: Path, kind: str) -> None:
    """Also past files that are saved on the way, for which averages are put in place and taken out again."""
    pytest.importorskip("schedulefree" if "ScheduleFree" in kind else LIBRARIES.get(kind, "torch"))
    flags = ["--max_train_steps", "5", *KINDS[kind]]
    through = train(configure(*flags, output_dir=tmp_path / "through"))
    saving = ["--save_every_n_steps", "2", "--save_state"]
    stopped = train(configure(*flags, *saving, output_dir=tmp_path / "stopped"))
    assert tensors_equal(through.adapter, stopped.adapter), "saving changed the run"
    state = tmp_path / "stopped" / "test-step00000002-state"
    resumed = train(configure(*flags, "--resume", str(state), output_dir=tmp_path / "resumed"))
    assert tensors_equal(through.adapter, resumed.adapter)
    assert through.relative_delta == resumed.relative_delta


@pytest.mark.parametrize("kind", ["ema", "AdamWScheduleFree"])
def test_files_hold_the_average_and_states_what_steps_are_taken_at(
    configure: Configure, tmp_path: Path, kind: str
) -> None:
    if kind != "ema":
        pytest.importorskip("schedulefree")
    result = train(configure("--max_train_steps", "4", "--save_state_on_train_end", *KINDS[kind]))
    state = result.adapter.with_name("test-state")
    averaged, present = load_file(result.adapter), load_file(state / "adapter.safetensors")
    ups = [key for key in averaged if "lora_up" in key]
    assert all(not torch.equal(averaged[key], present[key]) for key in ups)
    if kind == "ema":
        plain = train(configure("--max_train_steps", "4", output_dir=tmp_path / "plain"))
        assert tensors_equal(plain.adapter, state / "adapter.safetensors"), "an average changed the training"


def test_the_average_is_that_of_every_steps_weights(configure: Configure, tmp_path: Path) -> None:
    flags = ["--max_train_steps", "4", "--save_every_n_steps", "1", "--save_state", *KINDS["ema"]]
    train(configure(*flags, output_dir=tmp_path))
    steps = [load_file(tmp_path / f"test-step{step:08d}-state" / "adapter.safetensors") for step in range(1, 5)]
    files = [load_file(tmp_path / f"test-step{step:08d}.safetensors") for step in range(1, 5)]
    for key in [key for key in files[0] if "lora_up" in key]:
        average = steps[0][key].double()
        for number, weights in enumerate(steps[1:], start=1):
            decay = min(0.8, (1 + number) / (10 + number))
            average = decay * average + (1 - decay) * weights[key].double()
            torch.testing.assert_close(files[number][key].double(), average, atol=1e-7, rtol=1e-5)
        assert average.norm() > 0


def test_a_state_without_its_average_is_refused(configure: Configure, tmp_path: Path) -> None:
    state = train(configure("--max_train_steps", "1", "--save_state", *KINDS["ema"])).adapter.with_name("test-state")
    with pytest.raises(InputError, match="use_ema is False, and was True"):
        train(configure("--max_train_steps", "2", "--resume", str(state)))
    damaged = shutil.copytree(state, tmp_path / "damaged-state")
    (damaged / "ema.safetensors").unlink()
    with pytest.raises(InputError, match="incomplete or damaged"):
        train(configure("--max_train_steps", "2", "--resume", str(damaged), *KINDS["ema"], output_dir=tmp_path / "b"))
