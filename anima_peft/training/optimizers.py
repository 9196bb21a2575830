"""The optimizer and the learning rate over time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers.optimization import get_scheduler


def build_adamw(
    parameters: Iterable[torch.nn.Parameter],
    learning_rate: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    undecayed: Iterable[torch.nn.Parameter] = (),
) -> torch.optim.AdamW:
    """torch's fused AdamW (Loshchilov & Hutter 2019): one kernel for all parameters, state in their dtype.

    Args:
        parameters: float32 leaves on their final device.
        undecayed: those of them that get no weight decay.
    """
    apart = {id(parameter) for parameter in undecayed}
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if id(p) not in apart], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in apart], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, eps=eps, fused=True)


def warmup_steps(setting: int | float, total_steps: int) -> int:
    """Optimizer steps of warmup: a whole number is taken as it is, a float below 1 as a share of all steps."""
    return int(setting * total_steps) if isinstance(setting, float) and setting < 1 else int(setting)


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    name: str,
    total_steps: int,
    *,
    warmup: int = 0,
    num_cycles: float = 1.0,
    power: float = 1.0,
) -> torch.optim.lr_scheduler.LRScheduler:
    """diffusers' schedules, counted in optimizer steps.

    Args:
        name: `constant`, `constant_with_warmup`, `linear`, `cosine`, `cosine_with_restarts` or `polynomial`.
        total_steps: where the schedule ends.
        warmup: steps of linear rise from zero.
        num_cycles: restarts of `cosine_with_restarts`.
        power: exponent of `polynomial`.
    """
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total_steps,
        num_cycles=num_cycles,
        power=power,
    )
