"""accelerate's engine, for one run at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from accelerate.utils import DataLoaderConfiguration, DistributedType, DynamoBackend

from ..errors import InputError

if TYPE_CHECKING:
    from ..config import TrainOptions


@contextmanager
def engine(options: TrainOptions, trackers: Sequence[GeneralTracker] = ()) -> Iterator[Accelerator]:
    """accelerate's engine for one run that logs to `trackers`; afterwards the process is free for other settings."""
    try:
        accelerator = _accelerator(options, trackers)
        try:
            yield accelerator
        finally:
            accelerator.end_training()  # closes the log, which Windows would otherwise keep locked
    finally:
        # accelerate keeps precision and device for the process's life and refuses other ones; it offers no other way.
        AcceleratorState._reset_state(reset_partial_state=True)


def _accelerator(options: TrainOptions, trackers: Sequence[GeneralTracker]) -> Accelerator:
    """Accelerate's engine for this run.

    Raises:
        InputError: float16 without a graphics card, several processes, or accelerate's own compiling.
    """
    precision = options.loop.mixed_precision
    accelerator = Accelerator(
        # accelerate would run float32 for fp16 on a CPU without a word; it is refused below.
        mixed_precision=precision,
        gradient_accumulation_steps=options.loop.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),  # out of pinned memory, while the card computes
        log_with=list(trackers) or None,
    )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError(
            'mixed_precision: "fp16" needs a graphics card, and none is in use here. On the CPU, float16 has neither '
            'the kernels nor the gradient scaling that training needs; use "bf16" or "no".'
        )
    if accelerator.distributed_type is not DistributedType.NO:
        raise InputError(
            f"accelerate was set up for {accelerator.distributed_type.value} with {accelerator.num_processes} "
            "process(es), but this version trains in one, without such an engine; "
            "start it with `accelerate launch --num_processes 1 …`, or run `accelerate config` anew."
        )
    if accelerator.state.dynamo_plugin.backend is not DynamoBackend.NO:
        raise InputError(
            "accelerate was set up to compile the whole model; leave that out (`--dynamo_backend no`, or run "
            "`accelerate config` anew) and set torch_compile = true, which compiles its blocks."
        )
    return accelerator
