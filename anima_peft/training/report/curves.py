"""Curves for a page: smoothed, thinned out, with an axis of round numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MOST_POINTS = 400  # about one for every two pixels of a chart
_TICKS = 4
_SHOWN_SHARE = 0.995  # of the values decide where an axis ends; single spikes do not


@dataclass(frozen=True)
class Line:
    """One curve of a chart, thinned out.

    Attributes:
        name: under which it was logged.
        steps: of its points, ascending.
        values: the mean at each, over the steps that it stands for.
        low, high: the least and the greatest of them.
    """

    name: str
    steps: list[int]
    values: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Axis:
    """Where an axis begins and ends, and the round numbers on it."""

    low: float
    high: float
    ticks: list[float]

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the beginning and 1 at the end."""
        return (value - self.low) / (self.high - self.low)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Exponential moving average over about `window` values, without a bias towards zero at the beginning.

    Kingma & Ba 2015, section 3: the average from zero, divided by the weight that it has gathered.
    """
    decay = 1 - 1 / max(window, 1)
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smoothed.append(mean / weight)
    return smoothed


def smoothing_window(count: int) -> int:
    """Over how many of so many steps a loss is averaged: a twentieth, from 5 to 500."""
    return min(max(count // 20, 5), 500)


def finite(curve: Mapping[int, float | None]) -> tuple[list[int], list[float]]:
    """Steps, ascending, and values of a curve without those that were not finite."""
    points = [(step, value) for step, value in sorted(curve.items()) if value is not None]
    return [step for step, _ in points], [float(value) for _, value in points]


def thin(name: str, steps: Sequence[int], values: Sequence[float], *, most: int = MOST_POINTS) -> Line:
    """At most `most` points: the mean of as many neighbours each, with their least and greatest."""
    groups = np.array_split(np.arange(len(steps)), min(len(steps), most)) if len(steps) else []
    array = np.asarray(values, dtype=np.float64)
    return Line(
        name,
        [steps[group[-1]] for group in groups],
        [float(array[group].mean()) for group in groups],
        [float(array[group].min()) for group in groups],
        [float(array[group].max()) for group in groups],
    )


def axis(low: float, high: float, most_ticks: int = _TICKS, *, whole: bool = False) -> Axis:
    """An axis over a range, with ticks at multiples of 1, 2 or 5 times a power of ten.

    Args:
        whole: whether ticks are whole numbers, as steps are.
    """
    if high <= low:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    rough = (high - low) / most_ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.7 * rough)
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, [number * step for number in range(first, last + 1)])


def value_axis(lines: Sequence[Line]) -> Axis:
    """For values that are not negative: from near zero, or nearer where they vary little, to above all but spikes."""
    values = np.concatenate([np.asarray(line.high) for line in lines])
    least = min(min(line.low) for line in lines)
    high = float(np.quantile(values, _SHOWN_SHARE))
    high = max(high, max(max(line.values) for line in lines[1:]) if len(lines) > 1 else high)
    low = 0.0 if least >= 0 and least < 0.7 * high else least
    margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    return axis(low if low == 0 else low - margin, high + margin)
