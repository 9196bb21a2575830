"""Numbers that a training must not go on with, or that are worth a word."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence

import torch

from ..errors import TrainingError
from .state import Progress

logger = logging.getLogger(__name__)

_REMEMBERED = 100
_FEWEST = 20
_SPIKE = 10.0
_MOST_REPORTS = 5
_SHOWN_PICTURES = 8


class Health:
    """Watches losses and gradient norms.

    Args:
        skip_limit: how many steps whose loss or gradient is not finite are left out before the run stops.
        progress: where those are counted, so that a resumed run goes on counting.
        pictures: names of those in each of the last so many batches.
    """

    def __init__(self, skip_limit: int, progress: Progress, pictures: Callable[[int], Sequence[Sequence[str]]]):
        self.skip_limit, self._progress, self._pictures = skip_limit, progress, pictures
        self._reports = 0
        self._norms: deque[float] = deque(maxlen=_REMEMBERED)

    def may_step(
        self, step: int, losses: Sequence[float], sigmas: Sequence[torch.Tensor], norm: float, *, scaled: bool
    ) -> bool:
        """Whether the optimizer may take a step with these gradients; one that it may not take is counted.

        Args:
            step: its number, from 1.
            losses: of the batches that make it up.
            sigmas: of each of them, its samples' (B,). They stay on the device unless there is something to tell.
            norm: of the gradient.
            scaled: whether a gradient scaler looks after gradients that are not finite, as float16 needs it.

        Raises:
            TrainingError: the loss or the gradient is not finite, and the limit is reached.
        """
        if all(map(math.isfinite, losses)) and (scaled or math.isfinite(norm)):
            self._look_for_spike(step, norm, sigmas)
            return True
        # A loss says which batch it was; a gradient alone does not.
        to_blame = [i for i, loss in enumerate(losses) if not math.isfinite(loss)] or range(len(losses))
        loss = ", ".join(f"{losses[i]:g}" for i in to_blame)
        what = (
            f"the loss is {loss} in step {step}, and the gradient's norm {norm:g}, with "
            f"{self._samples([(i, sigmas[i]) for i in to_blame], len(losses))}"
        )
        if self._progress.skipped_steps < self.skip_limit:
            self._progress.skipped_steps += 1
            logger.warning("%s: left out (%d of at most %d).", what, self._progress.skipped_steps, self.skip_limit)
            return False
        raise TrainingError(
            f"{what}. Lower learning_rate, look at these pictures and their captions, or use mixed_precision "
            '"bf16" (or "no") instead of "fp16"; skip_nonfinite_steps leaves out single steps.'
        )

    def _look_for_spike(self, step: int, norm: float, sigmas: Sequence[torch.Tensor]) -> None:
        if len(self._norms) >= _FEWEST and self._reports < _MOST_REPORTS:
            usual = statistics.median(self._norms)
            if norm > _SPIKE * usual > 0:
                self._reports += 1
                more = " (further ones are not reported)" if self._reports == _MOST_REPORTS else ""
                samples = self._samples(list(enumerate(sigmas)), len(sigmas))
                logger.warning(
                    "step %d: the gradient's norm is %.3g, usual is %.3g; %s%s.", step, norm, usual, samples, more
                )
        if math.isfinite(norm):
            self._norms.append(norm)

    def _samples(self, sigmas: Sequence[tuple[int, torch.Tensor]], batches: int) -> str:
        """Pictures and noise levels of those batches of a step."""
        names = self._pictures(batches)
        samples = [
            f"{name} (sigma {sigma:.3f})"
            for i, values in sigmas
            for name, sigma in zip(names[i], values.tolist(), strict=True)
        ]
        return ", ".join(samples[:_SHOWN_PICTURES]) + (" …" if len(samples) > _SHOWN_PICTURES else "")
