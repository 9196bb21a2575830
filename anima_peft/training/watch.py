"""The training loop under watch: requests from outside, numbers that are not finite, memory that runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from ..data.dataset import BucketBatchSampler, CachedDataset
from ..errors import Interrupted, TrainingError
from .health import Health
from .loop import Parts, run_loop
from .metadata import RunFacts
from .outputs import Outputs
from .previews import Previews
from .requests import Action, Requests
from .saving import Saver
from .state import Progress

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
    outputs: Outputs,
    dataset: CachedDataset,
    previews: Previews | None,
) -> None:
    """The training loop, with all that can come in between.

    Args:
        facts: how long the run is.
        saver: writes what the options, a request or a failure ask for.
        outputs: names in the run's folder, where requests are looked for.
        dataset: names the pictures of a batch.
        previews: draws `sample_prompts`; None if there are none.

    Raises:
        Interrupted: a signal or a file asked for the end; adapter and state are saved.
        TrainingError: the numbers are not finite, or there was not enough memory; the state is saved if it is sound.
    """

    requests = Requests(outputs)

    def after_step() -> None:
        saver.after_step()
        if previews is not None:
            previews.after_step(progress.step, parts.average)
        request = requests.take()
        if request is Action.PREVIEW:
            if previews is None:
                logger.warning("Previews were asked for, and sample_prompts names none.")
            else:
                previews.draw(progress.step, parts.average)
        if request in (None, Action.PREVIEW):
            return
        state = saver.now()
        logger.warning("Saved on request: %s", state)
        if request is Action.STOP and progress.step < facts.total_steps:
            raise Interrupted(
                f"Stopped after step {progress.step} of {facts.total_steps}; go on with --resume {state}",
                requests.signal or 0,
            )

    def after_epoch() -> None:
        saver.after_epoch()
        if previews is not None:
            previews.after_epoch(progress.epoch, progress.step, parts.average)

    try:
        with requests.listening():
            if previews is not None:
                previews.before(progress.step, parts.average)
            run_loop(
                accelerator,
                parts,
                progress,
                total_steps=facts.total_steps,
                max_grad_norm=options.optimizer.max_grad_norm,
                health=Health(options.loop.skip_nonfinite_steps, _names(dataset, parts.sampler, progress)),
                on_step=after_step,
                on_epoch=after_epoch,
            )
    except (TrainingError, torch.OutOfMemoryError) as error:
        text = str(error) if isinstance(error, TrainingError) else _memory_advice(options, error)
        parts.optimizer.zero_grad(set_to_none=True)  # room for what saving needs
        if progress.step and all(parameter.isfinite().all() for parameter in parts.parameters):
            text += f"\nThe state after step {progress.step} is saved; go on with --resume {saver.now()}"
        raise TrainingError(text) from error


def _names(dataset: CachedDataset, sampler: BucketBatchSampler, progress: Progress) -> Callable[[], list[str]]:
    """The names of the pictures in the batch that is at work."""

    def names() -> list[str]:
        batch = sampler.batches(progress.epoch)[progress.batch]
        return [dataset.pictures[dataset.picture_of_sample[key.sample]].path.name for key in batch]

    return names


def _memory_advice(options: TrainOptions, error: Exception) -> str:
    """What would make this run fit."""
    loop = options.loop
    advice = [
        "set gradient_checkpointing = true" if not loop.gradient_checkpointing else "",
        "lower batch_size and raise gradient_accumulation_steps",
        'use mixed_precision = "bf16"' if loop.mixed_precision == "no" else "",
        "lower the dataset's resolution",
        "lower network_dim, or train fewer layers (target_modules)",
    ]
    return f"The device ran out of memory ({str(error).splitlines()[0]}). To fit: {'; '.join(filter(None, advice))}."
