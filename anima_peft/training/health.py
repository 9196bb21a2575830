"""Numbers that a training must not go on with, or that are worth a word."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence

from ..errors import TrainingError

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
        pictures: names of those in the present batch.
    """

    def __init__(self, skip_limit: int, pictures: Callable[[], Sequence[str]]):
        self.skip_limit, self._pictures = skip_limit, pictures
        self._skipped = self._reports = 0
        self._norms: deque[float] = deque(maxlen=_REMEMBERED)

    def may_step(
        self, step: int, losses: Sequence[float], sigmas: Sequence[float], norm: float, *, scaled: bool
    ) -> bool:
        """Whether the optimizer may take a step with these gradients; one that it may not take is counted.

        Args:
            step: its number, from 1.
            losses: of the batches that make it up.
            sigmas: of the last of them.
            norm: of the gradient.
            scaled: whether a gradient scaler looks after gradients that are not finite, as float16 needs it.

        Raises:
            TrainingError: the loss or the gradient is not finite, and the limit is reached.
        """
        if all(map(math.isfinite, losses)) and (scaled or math.isfinite(norm)):
            self._look_for_spike(step, norm, sigmas)
            return True
        loss = ", ".join(f"{value:g}" for value in losses)
        what = (
            f"the loss is {loss} in step {step}, and the gradient's norm {norm:g}, at sigma {_numbers(sigmas)}, with "
            f"{self._named_pictures()}"
        )
        if self._skipped < self.skip_limit:
            self._skipped += 1
            logger.warning("%s: left out (%d of at most %d).", what, self._skipped, self.skip_limit)
            return False
        raise TrainingError(
            f"{what}. Lower learning_rate, look at these pictures and their captions, or use mixed_precision "
            '"bf16" (or "no") instead of "fp16"; skip_nonfinite_steps leaves out single steps.'
        )

    def _look_for_spike(self, step: int, norm: float, sigmas: Sequence[float]) -> None:
        if len(self._norms) >= _FEWEST and self._reports < _MOST_REPORTS:
            usual = statistics.median(self._norms)
            if norm > _SPIKE * usual > 0:
                self._reports += 1
                more = " (further ones are not reported)" if self._reports == _MOST_REPORTS else ""
                logger.warning(
                    "step %d: the gradient's norm is %.3g, usual is %.3g; sigma %s, %s%s.",
                    step, norm, usual, _numbers(sigmas), self._named_pictures(), more,
                )  # fmt: skip
        if math.isfinite(norm):
            self._norms.append(norm)

    def _named_pictures(self) -> str:
        names = self._pictures()
        return ", ".join(names[:_SHOWN_PICTURES]) + (" …" if len(names) > _SHOWN_PICTURES else "")


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values[:_SHOWN_PICTURES])
