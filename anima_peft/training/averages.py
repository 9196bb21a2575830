"""The weights that a run is for, where they are not those that its steps are taken at: averages over its course."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from ..files import save_tensors

EMA_FILE = "ema.safetensors"


class AdapterAverage:
    """An adapter's weights for use: an exponential moving average, a schedule-free optimizer's, or just as they are.

    Args:
        parameters: of the adapter, all that is trained.
        optimizer: perhaps schedule-free; it is in train mode from here on, except inside of `in_place`.
        ema_decay: of diffusers' `EMAModel`, which reaches it by way of (1 + step) / (10 + step); None averages nothing.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], optimizer: Any, ema_decay: float | None = None):
        self._parameters, self._optimizer = list(parameters), optimizer
        self._switches = callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
        self._ema = None if ema_decay is None else EMAModel(self._parameters, decay=ema_decay, foreach=True)
        if self._switches:
            optimizer.train()

    def after_step(self) -> None:
        """Take in the weights after an optimizer step."""
        if self._ema is not None:
            self._ema.step(self._parameters)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside of this the model has the weights for use; afterwards it is what it was, to the last bit."""
        if self._ema is None and not self._switches:
            yield
            return
        # A schedule-free optimizer's way there and back would round.
        kept = [parameter.detach().clone() for parameter in self._parameters]
        if self._switches:
            self._optimizer.eval()
        if self._ema is not None:
            self._ema.copy_to(self._parameters)
        try:
            yield
        finally:
            if self._switches:
                self._optimizer.train()
            with torch.no_grad():
                for parameter, value in zip(self._parameters, kept, strict=True):
                    parameter.copy_(value)

    def save(self, folder: Path) -> None:
        """Write the moving average into a state; what the optimizer averages is in its own state."""
        if self._ema is not None:
            shadows = {str(number): tensor for number, tensor in enumerate(self._ema.shadow_params)}
            save_tensors(folder / EMA_FILE, shadows, {})

    def load(self, folder: Path, step: int) -> None:
        """Take the moving average from a state.

        Args:
            step: optimizer steps done.

        Raises:
            KeyError, OSError, RuntimeError: the file is missing or of other weights.
        """
        if self._ema is None:
            return
        stored = load_file(folder / EMA_FILE)
        for number, shadow in enumerate(self._ema.shadow_params):
            shadow.copy_(stored[str(number)])
        self._ema.optimization_step = step
