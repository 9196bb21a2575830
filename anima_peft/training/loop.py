"""The training loop: one batch after the other, and what happens between optimizer steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate import Accelerator

from ..data.dataset import BucketBatchSampler, lengthen_text, text_rows
from ..terminal import progress_bar
from .averages import AdapterAverage
from .flow import add_noise, velocity
from .groups import reported_rates
from .health import Health
from .losses import FlowLoss
from .processes import Processes
from .state import Progress

_AVERAGED = 50
_NOT_TEXT = frozenset({"latents", "noise", "input_noise", "sigma", "mask", "loss_weight", "share"})
_GIB = 2**30


@dataclass(frozen=True)
class Parts:
    """What the loop drives, all prepared by accelerate.

    Attributes:
        model: `AnimaTransformerModel`, perhaps wrapped for several processes.
        optimizer, scheduler: over `parameters`.
        average: what of them is saved.
        loader: accelerate's data loader over batches of `collate`; `sampler` decides their order.
        parameters: the adapter's, all that is trained.
        loss: of each sample.
        limit_norms: called after each step, for max-norm regularization; gives what to log of it.
        complete: encodes what is not kept of a batch.
        processes: that train together.
        long_texts: whether a caption can have more rows than the model pads all of them to.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loader: Any
    sampler: BucketBatchSampler
    parameters: list[torch.nn.Parameter]
    average: AdapterAverage
    loss: FlowLoss
    limit_norms: Callable[[], Mapping[str, float]]
    complete: Callable[[Mapping[str, Any]], dict[str, torch.Tensor]]
    processes: Processes
    long_texts: bool


def batch_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor], loss: FlowLoss) -> torch.Tensor:
    """Mean loss of one batch, float32; of a part of a batch, what it brings to the mean over the processes.

    Args:
        batch: latents and noise (B, 16, h, w) float32, perhaps input_noise, which the model sees instead of noise,
            sigma (B,) float32, perhaps mask (B, 1, h, w), loss_weight (B,) and share (B,), and the text under the
            names that `AnimaTransformerModel.forward` takes.
    """
    text = {key: value for key, value in batch.items() if key not in _NOT_TEXT}
    noisy = add_noise(batch["latents"], batch.get("input_noise", batch["noise"]), batch["sigma"])
    prediction = model(noisy, batch["sigma"], **text)
    losses = loss(prediction, velocity(batch["latents"], batch["noise"]), batch["sigma"], batch.get("mask"))
    if "loss_weight" in batch:
        losses = losses * batch["loss_weight"]
    return (losses * batch["share"]).sum() if "share" in batch else losses.mean()


def run_loop(
    accelerator: Accelerator,
    parts: Parts,
    progress: Progress,
    *,
    total_steps: int,
    max_grad_norm: float,
    health: Health,
    on_step: Callable[[], None],
    on_epoch: Callable[[], None],
) -> None:
    """Train until `progress.step` is `total_steps`.

    Args:
        progress: changed in place; where it does not start at zero, the batches done already are skipped, and an epoch
            whose last step is done already is ended. It stands at an optimizer step also after an exception.
        max_grad_norm: gradients are clipped to this norm; 0 leaves them.
        health: decides whether a step may be taken.
        on_step: called after every optimizer step.
        on_epoch: called after every epoch.

    Raises:
        TrainingError: the loss is not finite.
    """
    meter = _Meter(accelerator, parts, progress, total_steps)
    parts.model.train()
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # encoding is over
    with meter.bar, _Mark(progress, accelerator.device) as mark:
        _end_epoch(parts, progress, mark, on_epoch)  # of a state that was saved at an epoch's last step
        while progress.step < total_steps:
            loader = accelerator.skip_first_batches(parts.loader, progress.batch) if progress.batch else parts.loader
            # Both: accelerate's loader counts epochs of its own and hands its count to the sampler.
            loader.set_epoch(progress.epoch)
            parts.sampler.set_epoch(progress.epoch)
            for batch in _batches(parts, loader):
                with accelerator.accumulate(parts.model):
                    with parts.processes.together():
                        loss = batch_loss(parts.model, batch, parts.loss)
                    accelerator.backward(loss)
                    meter.add(loss.detach(), batch)
                    if accelerator.sync_gradients:
                        meter.gather()
                        with parts.processes.together():
                            values = _take_step(accelerator, parts, progress, meter, health, max_grad_norm)
                    parts.optimizer.zero_grad(set_to_none=True)
                progress.batch += 1
                if accelerator.sync_gradients:
                    progress.step += 1
                    mark.set()
                    meter.step(values)
                    on_step()
                    meter.go_on()
                    if progress.step >= total_steps:
                        break
            _end_epoch(parts, progress, mark, on_epoch)
            meter.go_on()


def _batches(parts: Parts, loader: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, torch.Tensor]]:
    """This process's parts of the batches, complete, with texts as long as all parts together have them."""
    for batch in parts.processes.each(map(parts.complete, loader)):
        if parts.processes.count > 1 and parts.long_texts:
            longest = max(parts.processes.gather(text_rows(batch)))
            yield lengthen_text(batch, longest)
        else:
            yield batch


def _take_step(
    accelerator: Accelerator, parts: Parts, progress: Progress, meter: _Meter, health: Health, max_grad_norm: float
) -> dict[str, float]:
    """One optimizer step with the gathered gradients, unless they are not finite; gives what to log of it.

    Everything up to the clipping is queued on the device, whatever number of batches it is; then the host waits for it,
    once in a step. It has to: whether a step is taken at all must be known before weights, optimizer state, averages
    and schedule change, and optimizers that could leave out a step on the device by themselves are few.
    """
    norm = meter.read(accelerator.clip_grad_norm_(parts.parameters, max_grad_norm or math.inf))
    scaled = accelerator.scaler is not None
    may_step = health.may_step(progress.step + 1, meter.losses, meter.sigmas, norm, scaled=scaled)
    progress.whole = False
    if may_step:
        parts.optimizer.step()
    elif accelerator.scaler is not None:
        accelerator.scaler.update()  # it has looked at these gradients, and would not look at others before this
    values = {"gradient_norm": norm, **parts.limit_norms()}
    parts.average.after_step()
    values |= reported_rates(parts.optimizer.param_groups)
    parts.scheduler.step()  # before gradients go: Adafactor's own schedule asks for them
    return values


def _end_epoch(parts: Parts, progress: Progress, mark: _Mark, on_epoch: Callable[[], None]) -> None:
    if progress.batch >= len(parts.loader):
        progress.epoch += 1
        progress.batch = 0
        mark.set()
        on_epoch()


class _Mark:
    """The last optimizer step. An exception goes back to it: batches whose gradients were only gathered are not done.

    What is saved then goes on exactly, torch's random generators included, which dropout draws from.
    """

    def __init__(self, progress: Progress, device: torch.device):
        self._progress, self._cuda = progress, device if device.type == "cuda" else None
        self.set()

    def set(self) -> None:
        """Note that here all batches done are in an optimizer step."""
        self._progress.whole = True
        self._place = self._progress.epoch, self._progress.batch
        self._random = torch.get_rng_state()
        self._random_of_card = None if self._cuda is None else torch.cuda.get_rng_state(self._cuda)

    def __enter__(self) -> _Mark:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        self._progress.epoch, self._progress.batch = self._place
        torch.set_rng_state(self._random)
        if self._cuda is not None and self._random_of_card is not None:
            torch.cuda.set_rng_state(self._random_of_card, self._cuda)


class _Meter:
    """Loss, rate and speed, on the progress bar and in the tracker."""

    def __init__(self, accelerator: Accelerator, parts: Parts, progress: Progress, total_steps: int):
        self._accelerator, self._parts, self._progress = accelerator, parts, progress
        self._on_device: list[torch.Tensor] = []
        self._losses: list[float] = []
        self._recent = progress.recent_losses
        self._sigmas: list[torch.Tensor] = []
        self._shares: list[torch.Tensor | None] = []
        self._process, self._resident = psutil.Process(), 0
        self._clock = time.perf_counter()
        self.bar = progress_bar(
            total=total_steps,
            initial=progress.step,
            desc="training",
            unit="step",
            disable=not accelerator.is_main_process,
        )

    @property
    def losses(self) -> list[float]:
        """Of the batches of this step, once they are read."""
        return self._losses

    @property
    def sigmas(self) -> list[torch.Tensor]:
        """Of the samples of each of them, (B,)."""
        return self._sigmas

    def add(self, loss: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> None:
        """Count one batch; nothing is read off the device."""
        self._on_device.append(loss)
        self._sigmas.append(batch["sigma"])
        self._shares.append(batch.get("share"))

    def gather(self) -> None:
        """Make losses and noise levels those of all processes, which have done their parts of the batches."""
        if self._parts.processes.count > 1:
            own = [
                sigma.tolist() if share is None else sigma[share > 0].tolist()
                for sigma, share in zip(self._sigmas, self._shares, strict=True)
            ]
            parts = self._parts.processes.gather((torch.stack(self._on_device).tolist(), own))
            losses, sigmas = (list(zip(*part, strict=True)) for part in zip(*parts, strict=True))
            self._on_device = [torch.tensor(sum(batch) / len(batch), dtype=torch.float64) for batch in losses]
            self._sigmas = [torch.tensor([sigma for part in batch for sigma in part]) for batch in sigmas]
        self._shares = []

    def read(self, norm: torch.Tensor) -> float:
        """Wait for the losses of the batches since the last step and the gradient's norm; gives the norm."""
        numbers = torch.stack([*self._on_device, norm.to(self._on_device[0])]).tolist()
        self._on_device, self._losses = [], numbers[:-1]
        return numbers[-1]

    def step(self, further: Mapping[str, float]) -> None:
        """Report one optimizer step: the mean over its accumulated batches, and `further` values, `lr` among them."""
        loss = sum(self._losses) / len(self._losses)
        if math.isfinite(loss):  # one that is left out must not hide the others
            self._recent.append(loss)
        del self._recent[:-_AVERAGED]
        values = {
            "loss": loss,
            **further,
            "samples_per_second": sum(map(len, self._sigmas)) / (time.perf_counter() - self._clock),
            "peak_memory_gib": self._peak_memory() / _GIB,
        }
        self._accelerator.log(values, step=self._progress.step)
        self._sigmas = []
        mean = sum(self._recent) / max(len(self._recent), 1)
        self.bar.set_postfix(loss=f"{mean:.4f}", lr=f"{further['lr']:.2e}", refresh=False)
        self.bar.update()

    def go_on(self) -> None:
        """Start the clock anew: what was saved, drawn or measured between two steps is not part of their speed."""
        self._clock = time.perf_counter()

    def _peak_memory(self) -> int:
        """Bytes: the graphics card's, or, without one, the process's as far as it was seen at steps."""
        if self._accelerator.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        self._resident = max(self._resident, self._process.memory_info().rss)
        return self._resident
