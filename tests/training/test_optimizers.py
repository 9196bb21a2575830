"""Optimizers, groups and schedules, against the libraries' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.optimization import Adafactor

from anima_peft.errors import InputError
from anima_peft.training.groups import reported_rates
from anima_peft.training.optimizers import build_optimizer, canonical_name, class_path, load_class
from anima_peft.training.schedules import ADAFACTOR, SCHEDULES, as_steps, build_scheduler


@pytest.mark.parametrize(("setting", "steps"), [(0, 0), (50, 50), (0.1, 20), (0.999, 199), (1.0, 1), (3.0, 3)])
def test_steps_as_a_number_or_as_a_share(setting: float, steps: int) -> None:
    assert as_steps(setting, 200) == steps


def groups_of(*parameters: torch.nn.Parameter) -> list[dict[str, Any]]:
    return [{"params": list(parameters), "lr": 0.1, "name": "dit"}]


def rates(name: str, total: int = 10, **options: float) -> list[float]:
    optimizer = build_optimizer("AdamW", groups_of(torch.nn.Parameter(torch.zeros(1))), 0.1, {})
    scheduler = build_scheduler(optimizer, name, total, **options)  # type: ignore[arg-type]
    seen = []
    for _ in range(total + 1):
        seen.append(scheduler.get_last_lr()[0] * 10)
        optimizer.step()
        scheduler.step()
    return seen


def test_schedules_take_their_course() -> None:
    assert rates("constant") == [1.0] * 11
    assert rates("linear")[::5] == pytest.approx([1.0, 0.5, 0.0])
    assert rates("cosine")[::5] == pytest.approx([1.0, 0.5, 0.0])
    assert rates("constant_with_warmup", warmup=4)[:6] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1])
    assert rates("cosine_with_restarts", num_cycles=2)[5] == pytest.approx(1.0)
    assert rates("polynomial", power=2.0)[5] < rates("polynomial", power=1.0)[5]


ARGUMENTS: dict[str, dict[str, Any]] = {
    "AdamW": {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3},
    "Lion": {"betas": (0.8, 0.9), "weight_decay": 0.3},
    "Adafactor": {"relative_step": False, "scale_parameter": False, "weight_decay": 0.3},
    "CAME": {"betas": (0.8, 0.9, 0.99), "weight_decay": 0.3},
    "Prodigy": {"d0": 1e-3, "weight_decay": 0.3},
    "torch.optim.SGD": {"momentum": 0.9, "weight_decay": 0.3},
}


@pytest.mark.parametrize("warmup", [0, 3, 4])
@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != ADAFACTOR])
def test_every_schedule_reaches_its_end(name: str, warmup: int) -> None:
    """Also where the run is all warmup, and a step beyond, as after a state that knows more steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)

    def build() -> torch.optim.lr_scheduler.LRScheduler:
        return build_scheduler(optimizer, name, 4, warmup=warmup, timescale=5, min_lr_ratio=0.1)

    if (name, warmup) == ("polynomial", 4):
        with pytest.raises(InputError, match="leave none for the polynomial"):
            build()
        return
    scheduler = build()
    for _ in range(5):
        optimizer.step()
        scheduler.step()
        assert 0 <= scheduler.get_last_lr()[0] <= 1


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_optimizer_is_its_librarys_with_the_given_numbers(name: str) -> None:
    pytest.importorskip(class_path(name).partition(".")[0])
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(4, 5, generator=generator) for _ in range(2))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    a = build_optimizer(name, groups_of(ours), 0.1, ARGUMENTS[name])
    b = load_class(class_path(name))([theirs], lr=0.1, **ARGUMENTS[name])
    for _ in range(3):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs)
    assert not torch.equal(ours, start)


def test_adafactor_follows_its_own_rate() -> None:
    """With relative_step learning_rate is no part of it: min(1e-2, 1 / sqrt(step)), times the weights' size."""
    ours, theirs = (torch.nn.Parameter(torch.full((4, 5), 2.0)) for _ in range(2))
    a, b = build_optimizer("Adafactor", groups_of(ours), 123.0, {}), Adafactor([theirs])
    schedule = build_scheduler(a, ADAFACTOR, 10)
    for _ in range(2):
        ours.grad, theirs.grad = torch.ones(4, 5), torch.ones(4, 5)
        a.step()
        b.step()
        schedule.step()
    assert torch.equal(ours, theirs)
    assert reported_rates(a.param_groups)["lr"] == pytest.approx(0.02, rel=0.02)


def test_prodigys_estimate_is_reported() -> None:
    pytest.importorskip("prodigyopt")
    optimizer = build_optimizer("Prodigy", groups_of(torch.nn.Parameter(torch.ones(3))), 1.0, {"d0": 1e-3})
    assert reported_rates(optimizer.param_groups) == {"lr": 0.1, "lr_times_d": pytest.approx(1e-4)}


def test_a_rate_that_prodigy_makes_nothing_of_is_said(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("prodigyopt")
    build_optimizer("Prodigy", groups_of(torch.nn.Parameter(torch.ones(3))), 1e-4, {})
    assert "learning_rate = 0.0001; 1.0 is usual" in caplog.text


def test_names_in_any_spelling() -> None:
    assert canonical_name("radam_schedulefree") == "RAdamScheduleFree"
    assert canonical_name("PAGEDADAMW8BIT") == "PagedAdamW8bit"
    with pytest.raises(InputError, match=r'expected one of AdamW, .* got "Adan"'):
        canonical_name("Adan")
