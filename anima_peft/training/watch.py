"""The training loop under watch: requests from outside, numbers that are not finite, memory that runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from ..data.dataset import BucketBatchSampler, CachedDataset
from ..errors import InputError, Interrupted, TrainingError
from .health import Health
from .loop import Parts, run_loop
from .metadata import RunFacts
from .previews import Previews
from .processes import is_lost
from .requests import Action, Requests
from .saving import Saver
from .state import Progress
from .validation import Validation

if TYPE_CHECKING:
    from ..config import TrainOptions

logger = logging.getLogger(__name__)


def run_watched(
    accelerator: Accelerator,
    options: TrainOptions,
    parts: Parts,
    progress: Progress,
    facts: RunFacts,
    saver: Saver,
    requests: Requests,
    dataset: CachedDataset,
    previews: Previews | None,
    validation: Validation | None,
) -> None:
    """The training loop and the last save, with all that can come in between.

    Args:
        facts: how long the run is.
        saver: writes what the options, a request or a failure ask for.
        requests: looked at after every step.
        dataset: names the pictures of a batch.
        previews: draws `sample_prompts`; None if there are none, and in all processes but the main one.
        validation: measures the loss of the pictures that are held out; None if there are none.

    Raises:
        Interrupted: a signal or a file asked for the end; adapter and state are saved.
        TrainingError: the numbers are not finite, there was not enough memory, or a file could not be written; the
            state is saved if it is sound and if that can be done.
        InputError: the same, where a file of the cache is gone.
    """
    between = _Between(parts, progress, facts.total_steps, saver, requests, previews, validation)
    try:
        with requests.listening():
            between.before_first_step()
            run_loop(
                accelerator,
                parts,
                progress,
                total_steps=facts.total_steps,
                max_grad_norm=options.optimizer.max_grad_norm,
                health=Health(options.loop.skip_nonfinite_steps, progress, _names(dataset, parts.sampler, progress)),
                on_step=between.after_step,
                on_epoch=between.after_epoch,
            )
            saver.at_end()
            requests.agree()
    except (InputError, OSError, RuntimeError) as error:
        raise _failure(error, accelerator.device, options, parts, progress, saver, requests) from error
    if requests.signal is not None:
        raise Interrupted(f"Stopped after the last step, {progress.step}; the adapter is complete.", requests.signal)


@dataclass(frozen=True)
class _Between:
    """What happens between steps: saves, validation, previews, and what is asked for from outside."""

    parts: Parts
    progress: Progress
    total_steps: int
    saver: Saver
    requests: Requests
    previews: Previews | None
    validation: Validation | None

    def before_first_step(self) -> None:
        """Draw what is to be drawn before this session's first step."""
        with self.parts.processes.together():
            if self.previews is not None:
                self.previews.before(self.progress.step, self.parts.average)

    def after_step(self) -> None:
        """Save, measure and draw what is due after an optimizer step, then do what is asked for.

        Raises:
            Interrupted: the end was asked for; adapter and state are saved.
        """
        self.saver.after_step()
        if self.validation is not None:
            self.validation.after_step(self.progress.step, self.parts.average)
        with self.parts.processes.together():
            if self.previews is not None:
                self.previews.after_step(self.progress.step, self.parts.average)
        request = self.requests.take()
        if request is Action.PREVIEW:
            self._draw_on_request()
        elif request is Action.SAVE or (request is Action.STOP and self.progress.step < self.total_steps):
            state = self.saver.now()
            logger.warning("Saved on request: %s", state)
            if request is Action.STOP:
                raise Interrupted(
                    f"Stopped after step {self.progress.step} of {self.total_steps}; go on with --resume {state}",
                    self.requests.signal or 0,
                )

    def after_epoch(self) -> None:
        """Save, measure and draw what is due after an epoch."""
        self.saver.after_epoch()
        if self.validation is not None:
            self.validation.after_epoch(self.progress.epoch, self.progress.step, self.parts.average)
        with self.parts.processes.together():
            if self.previews is not None:
                self.previews.after_epoch(self.progress.epoch, self.progress.step, self.parts.average)

    def _draw_on_request(self) -> None:
        with self.parts.processes.together():
            if self.previews is not None:
                self.previews.draw(self.progress.step, self.parts.average)
            elif self.parts.processes.is_main:
                logger.warning("Previews were asked for, and sample_prompts names none.")


def _failure(
    error: InputError | OSError | RuntimeError,
    device: torch.device,
    options: TrainOptions,
    parts: Parts,
    progress: Progress,
    saver: Saver,
    requests: Requests,
) -> Exception:
    """What a failed run ends with in this process, after what it has is saved."""
    processes = parts.processes
    parts.optimizer.zero_grad(set_to_none=True)  # room for what saving needs
    is_own = error is not processes.failure and processes.count > 1
    if is_own:
        processes.part()
    if is_own and not processes.is_main:
        rescued = "The main process saves what it has."
    else:
        rescued = _rescue(parts, progress, saver)
    if is_own and is_lost(error):
        return TrainingError(f"Another process of this run has ended or cannot be reached.\n{rescued}")
    no_memory = isinstance(error, torch.OutOfMemoryError)
    told = _memory_advice(options, progress, device, error) if no_memory else str(error)
    if is_own and not processes.is_local_main:  # whose message nobody else has
        logger.error("process %d of %d: %s", processes.index + 1, processes.count, told)
    return _ending(error, f"{told}\n{rescued}", requests)


def _ending(error: InputError | OSError | RuntimeError, text: str, requests: Requests) -> Exception:
    """What a failed run ends with: one message, or, for a fault that nobody foresaw, its text with a traceback."""
    if isinstance(error, InputError):
        return InputError(text)
    if isinstance(error, (TrainingError, OSError, torch.OutOfMemoryError)):
        return TrainingError(text)
    if requests.own_signal is not None:  # one that has ended the loader's workers, too
        return Interrupted(text, requests.own_signal)
    return RuntimeError(text)


def _rescue(parts: Parts, progress: Progress, saver: Saver) -> str:
    """Save what a failed run has; says what became of it. Of several processes, the main one saves."""
    if not progress.step:
        return "No step was done, and nothing is saved."
    try:
        if not progress.whole or not all(parameter.isfinite().all() for parameter in parts.parameters):
            return (
                "The weights are not those of a whole step and are not saved; --resume latest takes an earlier state."
            )
        return f"The state after step {progress.step} is saved; go on with --resume {saver.now()}"
    except (OSError, RuntimeError) as error:
        return f"The state after step {progress.step} could not be saved ({error}); earlier ones are as they were."


def _names(dataset: CachedDataset, sampler: BucketBatchSampler, progress: Progress) -> Callable[[int], list[list[str]]]:
    """The names of the pictures in the batch that is at work and in those before it, so many in all."""

    def names(batches: int) -> list[list[str]]:
        last = progress.batch + 1
        return [
            [dataset.pictures[dataset.picture_of_sample[key.sample]].path.name for key in batch]
            for batch in sampler.batches(progress.epoch)[last - batches : last]
        ]

    return names


def _memory_advice(options: TrainOptions, progress: Progress, device: torch.device, error: Exception) -> str:
    """What would make this run fit on this device."""
    loop, on_card = options.loop, device.type == "cuda"
    quantized = options.memory.base_quantization != "none"
    advice = [
        'set gradient_checkpointing = true (memory = "balanced")' if not loop.gradient_checkpointing else "",
        'let blocks wait in main memory (memory = "low")' if on_card and not options.memory.blocks_to_swap else "",
        'keep the base smaller (base_quantization = "int8")' if on_card and not quantized else "",
        "lower batch_size and raise gradient_accumulation_steps" if max(progress.settings["batch sizes"]) > 1 else "",
        'use mixed_precision = "bf16"' if loop.mixed_precision == "no" else "",
        "lower the dataset's resolution",
        "lower network_dim, or train fewer layers (target_modules)",
        "close other programs that use it",
    ]
    what = next(iter(str(error).splitlines()), "no more is known")
    name = "The computer"
    if on_card:
        card = torch.cuda.get_device_properties(device)
        name = f"{card.name}, with {card.total_memory / 2**30:.1f} GiB,"
    return f"{name} ran out of memory ({what}). To fit: {'; '.join(filter(None, advice))}."
