"""The learning rate over time: transformers' schedules by name, or any scheduler by the path of its class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, AdafactorSchedule, get_scheduler
from transformers.trainer_utils import SchedulerType

from ..errors import InputError
from .optimizers import keywords, load_class

ADAFACTOR = "adafactor"
"""The rate is the optimizer's own; the schedule only reports it."""

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    ADAFACTOR,
)
# what `build_scheduler` fills in itself
_OURS = (
    "optimizer",
    "num_warmup_steps",
    "num_training_steps",
    "num_decay_steps",
    "num_stable_steps",
    "num_cycles",
    "power",
    "timescale",
    "min_lr_rate",
    "min_lr_ratio",
    "last_epoch",
)


def schedule_keywords(name: str) -> tuple[str, ...]:
    """What else a schedule takes by name, as `lr_scheduler_args`."""
    if name == ADAFACTOR:
        return ()
    parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]).parameters
    return tuple(parameter for parameter in parameters if parameter not in _OURS)


def scheduler_class(path: str) -> type:
    """The scheduler's class at a dotted path, or of that name in `torch.optim.lr_scheduler`.

    Raises:
        InputError: there is none, its library is missing, or its steps depend on a metric.
    """
    cls = load_class(path if "." in path else f"torch.optim.lr_scheduler.{path}")
    if not issubclass(cls, torch.optim.lr_scheduler.LRScheduler):
        raise InputError(f"{path} is no torch.optim.lr_scheduler.LRScheduler")
    if "metrics" in inspect.signature(cls.step).parameters:
        raise InputError(f"{path} follows a metric, and training measures none; use another scheduler")
    return cls


def as_steps(setting: int | float, total_steps: int) -> int:
    """Optimizer steps: a whole number is taken as it is, a float below 1 as a share of all steps."""
    return int(setting * total_steps) if isinstance(setting, float) and setting < 1 else int(setting)


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    name: str,
    total_steps: int,
    *,
    warmup: int = 0,
    decay: int = 0,
    num_cycles: float = 1.0,
    power: float = 1.0,
    timescale: int | None = None,
    min_lr_ratio: float | None = None,
    arguments: Mapping[str, object] | None = None,
) -> torch.optim.lr_scheduler.LRScheduler:
    """transformers' schedules, counted in optimizer steps, with sd-scripts' options (library/train_util.py).

    Args:
        name: of `SCHEDULES`.
        total_steps: where the schedule ends.
        warmup: steps of linear rise from zero.
        decay: steps of the fall at the end of `warmup_stable_decay`.
        num_cycles: restarts of `cosine_with_restarts`; of the other cosines, half waves: 1 falls from top to bottom.
        power: exponent of `polynomial`.
        timescale: of `inverse_sqrt`; None means `warmup`, or 10000 without one.
        min_lr_ratio: of `cosine_with_min_lr` and `warmup_stable_decay`: where they end, as a share of the rate.
        arguments: further ones by `schedule_keywords`.

    Raises:
        InputError: warmup and decay together are longer than the run or leave nothing of it, or an argument is refused.
    """
    if name == ADAFACTOR:
        return AdafactorSchedule(optimizer)
    if warmup + decay > total_steps:
        raise InputError(
            f"lr_warmup_steps ({warmup}) and lr_decay_steps ({decay}) are more than the run's {total_steps} steps."
        )
    if name == "polynomial" and warmup == total_steps:  # transformers would divide by the steps that are left
        raise InputError(f"lr_warmup_steps: all of the run's {total_steps} steps leave none for the polynomial.")
    specific: dict[str, Any] = dict(arguments or {})
    if name in ("cosine", "cosine_with_min_lr", "warmup_stable_decay"):
        specific["num_cycles"] = num_cycles / 2
    elif name == "cosine_with_restarts":
        specific["num_cycles"] = num_cycles
    if name == "polynomial":
        specific["power"] = power
    elif name == "inverse_sqrt":
        specific["timescale"] = timescale
    elif name == "cosine_with_min_lr" and "min_lr" not in specific:
        specific["min_lr_rate"] = min_lr_ratio
    elif name == "warmup_stable_decay":
        specific |= {"num_decay_steps": decay, "min_lr_ratio": min_lr_ratio or 0.0}
    try:
        return get_scheduler(name, optimizer, warmup, total_steps, specific)
    except (TypeError, ValueError) as error:
        raise InputError(f"lr_scheduler: {name} cannot be built: {error}") from error


def build_custom_scheduler(
    optimizer: torch.optim.Optimizer, path: str, arguments: Mapping[str, object]
) -> torch.optim.lr_scheduler.LRScheduler:
    """A scheduler of any class, stepped after each optimizer step.

    Raises:
        InputError: the class cannot be had, or refuses an argument.
    """
    cls = scheduler_class(path)
    try:
        return cls(optimizer, **arguments)  # type: ignore[no-any-return]
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"{path} cannot be built: {error}") from error


def custom_keywords(path: str) -> tuple[tuple[str, ...], bool]:
    """The names of the arguments that a scheduler's class takes, and whether it takes any other."""
    names, any_other = keywords(scheduler_class(path))
    return tuple(name for name in names if name not in ("optimizer", "last_epoch")), any_other
