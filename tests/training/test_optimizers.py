"""Optimizer and learning rate, against torch's and diffusers' own."""

import pytest
import torch

from anima_peft.training.optimizers import build_adamw, build_scheduler, warmup_steps


@pytest.mark.parametrize(("setting", "steps"), [(0, 0), (50, 50), (0.1, 20), (0.999, 199), (1.0, 1), (3.0, 3)])
def test_warmup_as_steps_or_as_a_share(setting: float, steps: int) -> None:
    assert warmup_steps(setting, 200) == steps


def rates(name: str, total: int = 10, **options: float) -> list[float]:
    optimizer = build_adamw([torch.nn.Parameter(torch.zeros(1))], 1.0)
    scheduler = build_scheduler(optimizer, name, total, **options)  # type: ignore[arg-type]
    seen = []
    for _ in range(total + 1):
        seen.append(scheduler.get_last_lr()[0])
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


def test_adamw_is_torchs_with_the_given_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(5, generator=generator) for _ in range(2))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3}
    a = build_adamw([ours], 0.1, **settings)  # type: ignore[arg-type]
    b = torch.optim.AdamW([theirs], lr=0.1, foreach=False, **settings)  # type: ignore[arg-type]
    for _ in range(3):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs)
    assert a.defaults["fused"]
