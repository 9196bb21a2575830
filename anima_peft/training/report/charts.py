"""Charts of a run: what belongs together, drawn as SVG that stretches with the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .curves import Axis, Line, axis, finite, smooth, smoothing_window, thin, value_axis

WIDTH, HEIGHT = 1000, 300  # of the SVG's own units; it is stretched to the page
_DIGITS = 4

Curves = Mapping[str, Mapping[int, float | None]]
_VALIDATION = "validation/"


@dataclass(frozen=True)
class Curve:
    """One line of a chart, ready to draw.

    Attributes:
        label: in English and Chinese.
        look: its class in the style sheet.
        path: SVG path of the line; `band` that of what lies between least and greatest, or empty.
    """

    label: tuple[str, str]
    look: str
    path: str
    band: str = ""


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: in English and Chinese.
        described: the same in one sentence of each, for those who cannot see it.
        x_ticks, y_ticks: place in percent, from the left and from the top, and text.
        cut: how many points lie above the axis.
        data: what the page's script shows of the point under the pointer, as JSON.
    """

    title: tuple[str, str]
    described: tuple[str, str]
    curves: list[Curve]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    cut: int
    data: str


def charts_of(curves: Curves) -> list[Chart]:
    """All charts that the curves are enough for, those of the loss first."""
    charts = [_loss(curves), _validation(curves)]
    rates = [name for name in curves if name == "lr" or name.startswith("lr/") or name == "lr_times_d"]
    charts.append(_chart(("Learning rate", "学习率"), curves, rates))
    charts.append(_chart(("Gradient norm", "梯度范数"), curves, ["gradient_norm"], banded=True))
    charts.append(_chart(("Samples per second", "每秒样本数"), curves, ["samples_per_second"], banded=True))
    charts.append(_chart(("Peak memory in GiB", "内存峰值（GiB）"), curves, ["peak_memory_gib"]))
    known = {"loss", *rates, "gradient_norm", "samples_per_second", "peak_memory_gib"}
    further = [name for name in curves if name not in known and not name.startswith(_VALIDATION)]
    charts += [_chart((name, name), curves, [name]) for name in further]
    return [chart for chart in charts if chart is not None]


def _loss(curves: Curves) -> Chart | None:
    steps, values = finite(curves.get("loss", {}))
    if not steps:
        return None
    window = smoothing_window(len(steps))
    raw, smoothed = thin("loss", steps, values), thin("smoothed", steps, smooth(values, window))
    labels = [("each step", "每一步"), (f"mean over about {window}", f"约 {window} 步平均")]
    return _draw(("Loss", "损失"), [raw, smoothed], labels, ["faint", "main"], banded=True)


def _validation(curves: Curves) -> Chart | None:
    names = sorted(name for name in curves if name.startswith(_VALIDATION + "sigma_"))
    lines = [thin(name, *finite(curves[name])) for name in names]
    labels = [(f"sigma {name.rpartition('_')[2]}",) * 2 for name in names]
    looks = [f"sigma{number % 5}" for number in range(len(names))]
    mean = _VALIDATION + "loss"
    if mean in curves:
        lines.append(thin(mean, *finite(curves[mean])))
        labels.append(("mean", "平均"))
        looks.append("mean")
    if not any(line.steps for line in lines):
        return None
    return _draw(("Validation loss by noise level", "各噪声水平的验证损失"), lines, labels, looks)


def _chart(title: tuple[str, str], curves: Curves, names: Sequence[str], *, banded: bool = False) -> Chart | None:
    lines = [thin(name, *finite(curves[name])) for name in names if name in curves]
    lines = [line for line in lines if line.steps]
    if not lines:
        return None
    looks = ["main", *(f"sigma{number % 5}" for number in range(len(lines) - 1))]
    labels = [title] if len(lines) == 1 else [(line.name, line.name) for line in lines]
    return _draw(title, lines, labels, looks, banded=banded)


def _draw(
    title: tuple[str, str],
    lines: Sequence[Line],
    labels: Sequence[tuple[str, str]],
    looks: Sequence[str],
    *,
    banded: bool = False,
) -> Chart:
    drawn = [each for each in zip(lines, labels, looks, strict=True) if each[0].steps]
    lines = [line for line, _, _ in drawn]
    first, last = min(line.steps[0] for line in lines), max(line.steps[-1] for line in lines)
    x, y = axis(0 if 2 * first <= last else first, last, 5, whole=True), value_axis(lines)
    curves = [
        Curve(label, look, _path(line, x, y), _band(line, x, y) if banded and number == 0 else "")
        for number, (line, label, look) in enumerate(drawn)
    ]
    main = next((line for line, _, look in drawn if look in ("main", "mean")), lines[0])
    begin, end = f"{main.values[0]:.{_DIGITS}g}", f"{main.values[-1]:.{_DIGITS}g}"
    data = {
        "axis": [x.low, x.high],
        "lines": [
            {"label": label, "steps": line.steps, "values": [float(f"{value:.{_DIGITS}g}") for value in line.values]}
            for line, label, _ in drawn
        ],
    }
    return Chart(
        title,
        (
            f"{title[0]}: from {begin} at step {main.steps[0]} to {end} at step {main.steps[-1]}.",
            f"{title[1]}：从第 {main.steps[0]} 步的 {begin} 到第 {main.steps[-1]} 步的 {end}。",
        ),
        curves,
        [(100 * x.share(tick), f"{tick:,.0f}") for tick in x.ticks],
        [(100 - 100 * y.share(tick), f"{tick:.{_DIGITS}g}") for tick in y.ticks],
        sum(value > y.high for value in lines[0].high),
        json.dumps(data, ensure_ascii=False, separators=(",", ":")),
    )


def _points(steps: Sequence[int], values: Sequence[float], x: Axis, y: Axis) -> list[str]:
    # Far outside is as good as at any distance, and keeps numbers short.
    places = [(x.share(step), min(max(1 - y.share(value), -1), 2)) for step, value in zip(steps, values, strict=True)]
    return [f"{WIDTH * across:.1f} {HEIGHT * down:.1f}" for across, down in places]


def _path(line: Line, x: Axis, y: Axis) -> str:
    points = _points(line.steps, line.values, x, y)
    if len(points) == 1:
        points.append(points[0])  # with round ends, a dot
    return f"M{'L'.join(points)}"


def _band(line: Line, x: Axis, y: Axis) -> str:
    if line.low == line.high:
        return ""
    there, back = _points(line.steps, line.high, x, y), _points(line.steps, line.low, x, y)
    return f"M{'L'.join([*there, *reversed(back)])}Z"
