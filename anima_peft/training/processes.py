"""The processes of one run, and what they tell each other beside the gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator

from ..errors import InputError, TrainingError

Value = TypeVar("Value")

_PATIENCE = timedelta(days=7)  # one encodes, draws or downloads while the others wait
_END = object()


class Processes:
    """The processes that train one adapter; often there is only this one.

    They talk over gloo, whatever carries the gradients: that waits for no graphics card, and has a patience of its own.
    All of them have to make the same calls in the same order.

    Attributes:
        index, count: which of how many this is.
        local_index, local_count: the same among those of this machine.
        failure: the error that all of them know of, if there was one.
    """

    def __init__(self, accelerator: Accelerator):
        self.index, self.count = accelerator.process_index, accelerator.num_processes
        self.failure: Exception | None = None
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.count > 1 else None
        places = self.gather(accelerator.local_process_index)
        machines = [sum(place == 0 for place in places[: number + 1]) for number in range(len(places))]
        self.local_index, self.local_count = places[self.index], machines.count(machines[self.index])

    @property
    def is_main(self) -> bool:
        """Whether this one writes, draws and logs for all."""
        return self.index == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this one reads, fetches and speaks for its machine."""
        return self.local_index == 0

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, in their order."""
        if self._group is None:
            return [value]
        found: list[Value] = [value] * self.count
        dist.all_gather_object(found, value, group=self._group)
        return found

    def from_main(self, value: Value) -> Value:
        """The main process's value."""
        return self.gather(value)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Go on only when all have got through this block; an error of one is raised by all.

        No other call of this class belongs inside of it.

        Raises:
            InputError, TrainingError, OSError, RuntimeError: this process's own error, or the first of the others',
                whose text begins with the process.
        """
        try:
            yield
        except (InputError, OSError, RuntimeError) as error:
            self._agree(error)
            raise
        self._agree(None)

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """`together`, where the others of a machine wait for its first: they find done what it leaves on the disk."""
        if not self.is_local_main:
            self._agree(None)
        with self.together():
            yield
        if self.is_local_main:
            self._agree(None)

    def each(self, items: Iterable[Value]) -> Iterator[Value]:
        """The items, each as soon as all processes have theirs; an error of one in getting it is raised by all."""
        iterator = iter(items)
        while True:
            with self.together():
                item = next(iterator, _END)
            if item is _END:
                return
            yield item  # type: ignore[misc]  # no sentinel here

    def part(self) -> None:
        """Go on without the others: they have ended, or wait for what this process will not do any more."""
        self._group = None

    def _agree(self, error: Exception | None) -> None:
        if self._group is None:
            return
        told = None if error is None else _sendable(error)
        errors = self.gather(told)
        number = next((number for number, other in enumerate(errors) if other is not None), None)
        if error is not None:
            self.failure = error
        elif number is not None:
            kind, text = errors[number]  # type: ignore[misc]  # not None
            self.failure = kind(f"process {number + 1} of {self.count}: {text}")
            raise self.failure


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process cannot be reached any more."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _sendable(error: Exception) -> tuple[type[Exception], str]:
    """What is told of an error: its text, and of its kind as much as makes a difference."""
    kinds: tuple[type[Exception], ...] = (InputError, TrainingError, torch.OutOfMemoryError, OSError)
    return next((kind for kind in kinds if isinstance(error, kind)), RuntimeError), str(error)
