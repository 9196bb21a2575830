"""Paired timing, and the memory that a forward pass keeps for its backward pass."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Step = Callable[[], torch.Tensor]


def machine(device: torch.device) -> str:
    """One line on what the figures were measured on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def paired_times(steps: Mapping[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step in each round; within a round all steps run one after the other.

    Ratios are taken within a round: the machine's speed, which drifts over rounds, is then in both numbers. The first
    round warms up and is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for counted in [False] + [True] * rounds:
        for name, step in steps.items():
            _synchronize(device)
            start = time.perf_counter()
            step()
            _synchronize(device)
            if counted:
                times[name].append(time.perf_counter() - start)
    return times


def median_ratio(times: Mapping[str, list[float]], name: str, reference: str) -> float:
    """Median over the rounds of one step's time over another's."""
    return statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True))


def saved_bytes(forward: Step, parameters: set[int]) -> int:
    """Bytes of distinct storages that a forward pass keeps for its backward pass, besides the parameters' own.

    Args:
        parameters: addresses (`data_ptr`) of the storages that exist anyway.
    """
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    assert result.requires_grad
    return sum(kept.values())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
