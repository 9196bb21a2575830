"""The loop waits for the device once in a step, and its numbers are those of the plainest loop there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode

from anima_peft.data.dataset import CachedDataset
from anima_peft.training import watch
from anima_peft.training.loop import batch_loss, run_loop
from anima_peft.training.run import train

from .conftest import Configure, Logged
from .outcomes import same_tensors

ACCUMULATED = 2
# Three batches an epoch: a step of two and a step of one.
FLAGS = ["--max_train_epochs", "2", "--gradient_accumulation_steps", str(ACCUMULATED), "--lr_scheduler", "cosine"]
EPOCHS, STEPS, BATCHES = 2, 4, 3
READS = {"item", "tolist", "cpu", "numpy", "nonzero", "is_nonzero", "__bool__", "__float__", "__int__", "__index__"}


class Reads(TorchFunctionMode):
    """Counts what would make the host wait for a graphics card."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_the_device_once(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, real = Reads(), CachedDataset.__getitem__

    def sample(self: CachedDataset, item: tuple[int, ...]) -> Any:
        with torch._C.DisableTorchFunction():  # data are on the host
            return real(self, item)

    def loop(*args: Any, **options: Any) -> None:
        with reads:
            run_loop(*args, **options)

    monkeypatch.setattr(CachedDataset, "__getitem__", sample)
    monkeypatch.setattr(watch, "run_loop", loop)
    assert train(configure(*FLAGS)).steps == STEPS
    # At an epoch's start torch's DataLoader draws a number, on the host.
    assert Counter(reads.seen) == {"tolist": STEPS, "item": EPOCHS}
    with reads:
        float(torch.ones(()).sum())
        torch.ones(()).item()
    assert reads.seen[-2:] == ["__float__", "item"]


def plain_loop(
    accelerator: Accelerator,
    parts: Any,
    progress: Any,
    *,
    max_grad_norm: float,
    on_step: Callable[[], None],
    on_epoch: Callable[[], None],
    **_: Any,
) -> None:
    parts.model.train()
    optimizer, scheduler = parts.optimizer.optimizer, parts.scheduler.scheduler
    for progress.epoch in range(EPOCHS):
        parts.loader.set_epoch(progress.epoch)
        parts.sampler.set_epoch(progress.epoch)
        losses: list[float] = []
        for number, batch in enumerate(parts.loader, start=1):
            loss = batch_loss(parts.model, batch, parts.loss)
            (loss / ACCUMULATED).backward()
            losses.append(loss.item())
            if number % ACCUMULATED == 0 or number == BATCHES:
                norm = torch.nn.utils.clip_grad_norm_(parts.parameters, max_grad_norm).item()
                optimizer.step()
                optimizer.zero_grad()
                progress.step += 1
                rate = optimizer.param_groups[0]["lr"]
                mean = sum(losses) / len(losses)
                accelerator.log({"loss": mean, "gradient_norm": norm, "lr": rate}, step=progress.step)
                scheduler.step()
                on_step()
                losses = []
    progress.epoch = EPOCHS
    on_epoch()


def test_the_numbers_are_those_of_a_plain_loop(
    configure: Configure,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    logged: Logged,
) -> None:
    flags = [*FLAGS, "--network_args", "rank_dropout=0.3"]
    ours = train(configure(*flags, output_dir=tmp_path / "ours"))
    numbers = list(logged)
    logged.clear()
    monkeypatch.setattr(watch, "run_loop", plain_loop)
    plain = train(configure(*flags, output_dir=tmp_path / "plain"))
    assert len(numbers) == STEPS
    assert logged == numbers
    assert same_tensors(plain.adapter, ours.adapter)
