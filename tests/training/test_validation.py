"""Pictures that are held out: which they are, that they are not trained on, and what is measured of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from anima_peft.data.pictures import scan
from anima_peft.errors import InputError
from anima_peft.training import validation
from anima_peft.training.run import train

from .conftest import Configure
from .outcomes import scalars

SPLIT = ("--validation_split", "0.25", "--validate_every_n_steps", "2")


def test_a_share_of_the_content_is_held_out(configure: Configure) -> None:
    def held(*flags: str, split: str = "0.25") -> set[str]:
        found = scan(configure("--validation_split", split, "--validate_every_n_epochs", "1", *flags).datasets)
        assert all(not (p.flip_aug or p.color_aug or p.random_crop) and p.num_repeats == 1 for p in found if p.held_out)
        return {picture.path.name for picture in found if picture.held_out}

    assert len(held()) == 3  # of 12
    assert held() == held("--flip_aug", "--color_aug", "--num_repeats", "3")
    assert held() != held("--validation_seed", "7")
    assert len(held(split="0.001")) == 1
    assert len(held(split="0.999")) == 11


def test_they_are_measured_and_not_trained_on(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    measured = validation.batch_loss

    def count(model: Any, batch: dict[str, torch.Tensor], loss: Any) -> torch.Tensor:
        assert not model.training
        seen.append(len(batch["sigma"]))
        return measured(model, batch, loss)

    monkeypatch.setattr(validation, "batch_loss", count)
    result = train(configure(*SPLIT, "--max_train_steps", "4", "--log_with", "tensorboard", "--network_dropout", "0.3"))
    assert seen == [1] * 2 * 3 * len(validation.SIGMAS)
    means = [dict(scalars(result.log_folder, f"validation/sigma_{sigma:.1f}")) for sigma in validation.SIGMAS]
    for step, loss in scalars(result.log_folder, "validation/loss"):
        assert loss == pytest.approx(sum(mean[step] for mean in means) / len(means))
    assert [step for step, _ in scalars(result.log_folder, "validation/loss")] == [2, 4]


def test_the_number_depends_on_neither_batch_size_nor_course(configure: Configure, tmp_path: Path) -> None:
    """With a rate that changes nothing, it is the same at all times and for all batch sizes."""
    flags = [*SPLIT, "--max_train_steps", "4", "--log_with", "tensorboard", "--learning_rate", "1e-30"]
    curves = [
        scalars(train(configure(*flags, *more, output_dir=tmp_path / str(n))).log_folder, "validation/loss")
        for n, more in enumerate([[], ["--seed", "7", "--loss_type", "huber"]])
    ]
    values = [value for curve in curves for _, value in curve]
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)


def test_training_is_the_same_with_and_without_measuring(configure: Configure, tmp_path: Path) -> None:
    flags = ["--validation_split", "0.25", "--max_train_steps", "4", "--network_dropout", "0.3"]
    one = train(configure(*flags, "--validate_every_n_steps", "1", output_dir=tmp_path / "often"))
    other = train(configure(*flags, "--validate_every_n_epochs", "9", output_dir=tmp_path / "never"))
    first, second = load_file(one.adapter), load_file(other.adapter)
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--validation_split", "0.2"), "validation_split: has no effect without one of validate_every_n_steps"),
        (("--validate_every_n_steps", "2"), "no dataset has a validation_split"),
        (("--max_validation_steps", "2"), "no dataset has a validation_split"),
        (("--validation_seed", "2"), "validation_seed: has no effect"),
    ],
)
def test_halves_of_the_options_are_refused(configure: Configure, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        configure(*flags)
