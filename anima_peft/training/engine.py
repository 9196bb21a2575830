"""accelerate's engine, for one run at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    InitProcessGroupKwargs,
    KwargsHandler,
)

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
        InputError: float16 without a graphics card, an engine other than DistributedDataParallel, accelerate's own
            compiling, or a launcher that has started fewer processes than it was asked for.
    """
    _require_engine()
    precision = options.loop.mixed_precision
    # accelerate takes several processes for single ones where it finds no card, unless it is told to use the CPU.
    on_cpu = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    accelerator = Accelerator(
        # accelerate would run float32 for fp16 on a CPU without a word; it is refused below.
        mixed_precision=precision,
        cpu=on_cpu,
        gradient_accumulation_steps=options.loop.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,
        log_with=list(trackers) or None,
        kwargs_handlers=_handlers(),
    )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError(
            'mixed_precision: "fp16" needs a graphics card, and none is in use here. On the CPU, float16 has neither '
            'the kernels nor the gradient scaling that training needs; use "bf16" or "no".'
        )
    if accelerator.distributed_type not in _ENGINES:
        raise _refused(accelerator.distributed_type.value)
    if accelerator.state.dynamo_plugin.backend is not DynamoBackend.NO:
        raise InputError(
            "accelerate was set up to compile the whole model; leave that out (`--dynamo_backend no`, or run "
            "`accelerate config` anew) and set torch_compile = true, which compiles its blocks."
        )
    return accelerator


_ENGINES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_OTHER_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}


def _require_engine() -> None:
    """Refuse, before anything of them is loaded, what `accelerate launch` sets up and this package does not use."""
    for variable, name in _OTHER_ENGINES.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise _refused(name)
    # The launcher sets an address for several processes, also where it starts only one: without cards, and without
    # --multi_gpu.
    launched, address = "ACCELERATE_MIXED_PRECISION" in os.environ, "MASTER_PORT" in os.environ
    started = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    if launched and address and not any(name in os.environ for name in started):
        raise InputError(
            "accelerate launch was asked for several processes and started one, as it does without --multi_gpu; add "
            "--multi_gpu (on a CPU too), or ask for --num_processes 1. (If MASTER_PORT is set for something else, "
            "unset it.)"
        )


def _refused(name: str) -> InputError:
    return InputError(
        f"accelerate was set up for {name}; this package trains with one process, or with several by "
        "DistributedDataParallel. Start it with `accelerate launch --multi_gpu --num_processes N …`, or run "
        "`accelerate config` anew; docs/several-cards.md says what other engines would need."
    )


def _handlers() -> list[KwargsHandler]:
    # Gradients are not kept twice: a full LoKr has many.
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if torch.cuda.is_available() and not torch.distributed.is_nccl_available():  # Windows
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    return handlers
