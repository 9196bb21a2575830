"""Paired timing, memory in use and kept, and the rate of products that the machine reaches at best."""

from __future__ import annotations

import gc
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

Step = Callable[[], torch.Tensor]


def machine(device: torch.device) -> str:
    """One line on what the figures were measured on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


class PeakMemory:
    """Most memory in use between the start and the end of `with`.

    On a CUDA device what torch has allocated there; on a CPU the process's resident memory, looked at a
    hundred times a second.

    Attributes:
        before: bytes in use at the start.
        peak: bytes in use at most.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.before = self.peak = 0

    @property
    def above(self) -> int:
        """Bytes that came on top of what was in use before."""
        return self.peak - self.before

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self.before = torch.cuda.memory_allocated(self._device)
        else:
            self._process, self._done = psutil.Process(), threading.Event()
            self.before = self.peak = self._process.memory_info().rss
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self._done.set()
            self._watcher.join()
            self._look()

    def _watch(self) -> None:
        while not self._done.wait(1e-2):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, self._process.memory_info().rss)


def product_rate(device: torch.device, dtype: torch.dtype, size: int = 8192, rounds: int = 10) -> float:
    """FLOP/s of a product of two square matrices, the best of some rounds: the peak that shares are taken of."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(a)
    step = {"product": lambda: torch.mm(a, b, out=result)}
    times = paired_times(step, rounds, device)["product"]  # type: ignore[arg-type]  # what it returns is not used
    return 2 * size**3 / min(times)


def paired_times(steps: Mapping[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step in each round; within a round all steps run one after the other.

    Ratios are taken within a round: the machine's speed, which drifts over rounds, is then in both numbers. The first
    round warms up and is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for counted in [False] + [True] * rounds:
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if counted:
                times[name].append(time.perf_counter() - start)
    return times


def median_ratio(times: Mapping[str, list[float]], name: str, reference: str) -> float:
    """Median over the rounds of one step's time over another's."""
    return statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True))


def flops_of(step: Callable[[], None]) -> int:
    """Floating-point operations of a step's products, attention's among them, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
    flops: int = counter.get_total_flops()
    return flops


def let_go() -> None:
    """Free models that hooks and graphs tie into circles, and what the card keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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


def _processor() -> str:
    """The processor's name where the system tells it, else its kind."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {psutil.cpu_count()} cores"


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has done what it was asked; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
