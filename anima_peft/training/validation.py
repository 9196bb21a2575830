"""The loss on pictures that are not trained on, always at the same noise levels and with the same noise."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from ..data.dataset import CachedDataset, SampleKey, collate
from ..transformer import AnimaTransformerModel
from .averages import AdapterAverage
from .compiling import uncompiled
from .loop import batch_loss
from .losses import FlowLoss
from .processes import Processes

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels that are measured at: evenly over the course from picture to noise."""


class Validation:
    """Measures and logs `validation/loss`, the mean over pictures and noise levels, and the mean at each level.

    The loss is the plain squared error, whatever is trained with, and each picture passes alone: the number does not
    depend on options of the training or on batch sizes. Dropout is off, averages of the adapter are in place, and
    nothing random of the training is touched.

    Args:
        model: the bare model.
        dataset: of the pictures that are held out.
        every_steps, every_epochs: None for never.
        limit: pictures that are measured each time; None for all.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        processes: Processes,
        model: AnimaTransformerModel,
        dataset: CachedDataset,
        *,
        every_steps: int | None,
        every_epochs: int | None,
        limit: int | None,
    ):
        self._accelerator, self._processes, self._model, self._dataset = accelerator, processes, model, dataset
        self._every_steps, self._every_epochs = every_steps, every_epochs
        self._count = len(dataset) if limit is None else min(limit, len(dataset))
        self._measured: int | None = None

    def after_step(self, step: int, average: AdapterAverage) -> None:
        """Measure if `every_steps` divides the steps done."""
        if self._every_steps and step % self._every_steps == 0:
            self.measure(step, average)

    def after_epoch(self, epoch: int, step: int, average: AdapterAverage) -> None:
        """Measure if `every_epochs` divides the epochs done."""
        if self._every_epochs and epoch % self._every_epochs == 0:
            self.measure(step, average)

    def measure(self, step: int, average: AdapterAverage) -> dict[str, float]:
        """Measure now and log it; once at a step. Returns what was logged."""
        if step == self._measured:
            return {}
        self._measured = step
        device = self._accelerator.device
        was_training = self._model.training
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad(), average.in_place(), uncompiled():
            self._model.eval()
            losses = torch.stack(self._of_all_pictures())
        self._model.train(was_training)
        means = losses.mean(0).tolist()
        values = {f"validation/sigma_{sigma:.1f}": mean for sigma, mean in zip(SIGMAS, means, strict=True)}
        values["validation/loss"] = float(losses.mean())
        self._accelerator.log(values, step=step)
        return values

    def _of_all_pictures(self) -> list[torch.Tensor]:
        """Each picture's losses, on the CPU; every process measures its part of the pictures."""
        count = self._processes.count
        with self._processes.together():
            numbers = range(self._processes.index, self._count, count)
            own = [torch.stack(list(self._losses(number))).cpu() for number in numbers]
        parts = self._processes.gather(own)
        return [parts[number % count][number // count] for number in range(self._count)]

    def _losses(self, index: int) -> Iterator[torch.Tensor]:
        """One picture's loss at each noise level."""
        batch = send_to_device(collate([self._dataset[SampleKey(0, index, 0)]]), self._accelerator.device)
        for sigma in SIGMAS:
            batch["sigma"] = torch.full_like(batch["sigma"], sigma)
            with self._accelerator.autocast():
                yield batch_loss(self._model, batch, FlowLoss())
