"""Options of the training in whole runs: that they reach the loop, the log and the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from anima_peft.errors import InputError
from anima_peft.training import run
from anima_peft.training.run import train

from .conftest import Configure
from .outcomes import events_of


def logged(folder: Path | None) -> dict[str, list[float]]:
    events = events_of(folder)
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_rates_norms_and_losses_are_logged(configure: Configure) -> None:
    flags = ["--max_train_steps", "3", "--log_with", "tensorboard", "--scale_weight_norms", "0.05", "--unet_lr", "0.02"]
    network = ["--network_args", "train_llm_adapter=true", "loraplus_lr_ratio=4"]
    result = train(configure(*flags, *network, "--loss_type", "huber", "--huber_schedule", "constant"))
    values = logged(result.log_folder)
    assert values["lr"] == values["lr/dit"] == pytest.approx([0.02] * 3)
    assert values["lr/dit_plus"] == pytest.approx([0.08] * 3)
    assert values["lr/text_conditioner"] == pytest.approx([5e-3] * 3)
    assert values["max_norm/keys_scaled"][-1] > 0
    assert max(values["max_norm/max_key_norm"]) <= 0.05 * (1 + 1e-5)
    assert values["max_norm/average_key_norm"][-1] <= values["max_norm/max_key_norm"][-1]
    with safe_open(result.adapter, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_unet_lr"], metadata["ss_learning_rate"]) == ("0.02", "0.005")
    assert (metadata["ss_loss_type"], metadata["ss_huber_schedule"]) == ("huber", "constant")
    assert metadata["ss_scale_weight_norms"] == "0.05"
    assert json.loads(metadata["ss_network_args"])["loraplus_lr_ratio"] == "4.0"


def test_loss_and_noise_options_reach_the_loop(configure: Configure, tmp_path: Path) -> None:
    """The first loss of each is another one."""
    cases: dict[str, list[str]] = {
        "plain": [],
        "huber": ["--loss_type", "huber", "--huber_schedule", "constant"],
        "cosmap": ["--weighting_scheme", "cosmap"],
        "noise": ["--noise_offset", "0.5"],
        "input": ["--ip_noise_gamma", "0.5"],
        "range": ["--min_timestep", "900"],
        "sigma": ["--timestep_sampling", "sigma"],
    }
    flags = ["--max_train_steps", "1", "--log_with", "tensorboard"]
    first = {
        name: logged(train(configure(*flags, *case, output_dir=tmp_path / name)).log_folder)["loss"][0]
        for name, case in cases.items()
    }
    assert len(set(first.values())) == len(cases), first


def test_base_weights_are_trained_upon_and_not_saved(configure: Configure, tmp_path: Path) -> None:
    """With a conditioner's part among them: what the cache holds of captions must follow it."""
    network = ["--network_args", "train_llm_adapter=true"]
    base = train(configure("--max_train_steps", "4", *network, output_dir=tmp_path / "base"))
    flags = ["--max_train_steps", "1", "--log_with", "tensorboard", "--learning_rate", "1e-12"]
    plain = train(configure(*flags, output_dir=tmp_path / "plain"))
    upon = train(configure(*flags, "--base_weights", str(base.adapter), output_dir=tmp_path / "upon"))
    going_on = ["--network_weights", str(base.adapter), *network]
    on = train(configure(*flags, *going_on, output_dir=tmp_path / "on"))
    losses = [logged(result.log_folder)["loss"][0] for result in (plain, upon, on)]
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert upon.relative_delta < 1e-6 < 1e-3 < on.relative_delta


def test_modules_of_rate_zero_stay_as_they_start(configure: Configure, tmp_path: Path) -> None:
    first = train(configure("--max_train_steps", "2", output_dir=tmp_path / "a"))
    flags = ["--max_train_steps", "2", "--network_weights", str(first.adapter)]
    second = train(configure(*flags, "--network_args", "network_reg_lrs=.*mlp.*=0", output_dir=tmp_path / "b"))
    before, after = load_file(first.adapter), load_file(second.adapter)
    for key in before:
        if "lora_up" in key:
            assert torch.equal(before[key], after[key]) == ("mlp" in key), key
    with pytest.raises(InputError, match="nothing would be trained"):
        train(configure(*flags, "--network_args", "network_reg_lrs=.*=0", output_dir=tmp_path / "c"))


def test_gradients_are_clipped(configure: Configure, tmp_path: Path) -> None:
    flags = ["--max_train_steps", "1", "--optimizer_type", "torch.optim.SGD", "--learning_rate", "1"]
    results = [
        train(configure(*flags, "--max_grad_norm", norm, output_dir=tmp_path / norm)).relative_delta
        for norm in ("0", "1e-4", "1e-6")
    ]
    assert results[1] == pytest.approx(100 * results[2], rel=0.05)
    assert results[0] > 10 * results[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attn_mode", "flash"], 'attn_mode: "flash" cannot be had: it needs a CUDA device'),
        (["--base_weights", "none.safetensors"], r"none\.safetensors: no such adapter file"),
        (["--network_weights", "none.safetensors"], r"none\.safetensors: no such adapter file"),
    ],
)
def test_what_cannot_be_had_is_found_before_loading(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.setattr(run, "locate_sources", None)  # not reached
    with pytest.raises(InputError, match=message):
        train(configure(*flags))


def test_optimizers_for_cards_only_are_refused_without_one(configure: Configure) -> None:
    config = configure()
    object.__setattr__(config.train.optimizer, "optimizer_type", "PagedAdamW8bit")
    with pytest.raises(InputError, match="optimizer_type: PagedAdamW8bit needs a graphics card"):
        train(config)
