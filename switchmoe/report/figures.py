"""Figures as SVG strings that take their colours and font from the page, so they follow light and dark."""

import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from switchmoe.report.palette import ARMS
from switchmoe.report.records import ArmRecord, RoutingRecord

AXES = ("steps", "FLOPs", "seconds")
PREFIXES = ((1e18, "exa"), (1e15, "peta"), (1e12, "tera"), (1e9, "giga"), (1e6, "mega"))
SKIPPED = 0.12  # The first losses are so high that the rest would be flat: this share of a run sets no frame.
DASHES = ("--", "-", "-.", ":")
MARKERS = ("s", "o", "^", "D")

# Matplotlib draws in colours nobody uses; in the SVG they become the page's CSS variables.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
ARM_INKS = tuple(f"#0404{i:02x}" for i in range(len(ARMS)))
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid"} | {ink: f"arm{i}" for i, ink in enumerate(ARM_INKS)}


class Curve(NamedTuple):
    """Points of one arm, in the order of its steps; `smooth` is the mean of the last `width` of `loss`."""

    train_x: np.ndarray
    loss: np.ndarray
    smooth: np.ndarray
    validation_x: np.ndarray
    validation: np.ndarray
    width: int


def arm_styles(arms: Sequence[ArmRecord]) -> list[int]:
    """Which colour, dash and marker each arm has; one arm alone gets the solid line."""
    return [(i + (len(arms) == 1)) % len(ARMS) for i in range(len(arms))]


def smoothing_width(points: int) -> int:
    """How many logged losses one smoothed value is the mean of: a 25th of the run, 1 for short runs."""
    return max(1, points // 25)


def trailing_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value and the ones before it, `width` in all (fewer at the beginning)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    upper = np.arange(1, len(values) + 1)
    lower = np.maximum(upper - width, 0)
    return (sums[upper] - sums[lower]) / (upper - lower)


def curve(arm: ArmRecord, axis: str) -> Curve:
    """An arm's losses against steps, useful training FLOPs or seconds; rows without that axis are left out.

    FLOPs missing from the rows follow from the step: tokens per step times useful FLOPs per token.
    """

    def x(row: Any) -> float | None:
        if axis == "seconds":
            return row.get("seconds")
        if axis == "steps" or row.get("flops") is not None:
            return row.get("step" if axis == "steps" else "flops")
        steps, tokens, flops = (arm.value(key) for key in ("steps", "tokens", "flops_per_token"))
        return row["step"] * tokens / steps * flops if steps and tokens and flops and "step" in row else None

    def points(key: str) -> tuple[np.ndarray, np.ndarray]:
        pairs = [(x(row), row.get(key)) for row in arm.metrics]
        found = [(a, b) for a, b in pairs if a is not None and b is not None]
        found = [pair for pair in found if all(map(math.isfinite, pair))]
        both = np.array(found, dtype=float).reshape(-1, 2)
        return both[:, 0], both[:, 1]

    (train_x, loss), (validation_x, validation) = points("loss"), points("val_loss")
    width = smoothing_width(len(loss))
    return Curve(train_x, loss, trailing_mean(loss, width), validation_x, validation, width)


def loss_frame(arms: Sequence[ArmRecord]) -> tuple[float, float] | None:
    """The range of losses that all the charts show: everything but the steep beginning of the run."""
    kept = []
    for c in (curve(arm, "steps") for arm in arms):
        last = max([*c.train_x, *c.validation_x], default=0)
        for x, y in ((c.train_x, c.smooth), (c.validation_x, c.validation)):
            late = y[x >= SKIPPED * last]
            kept.extend(late if len(late) else y)
    if not kept:
        return None
    margin = 0.06 * (max(kept) - min(kept)) or 0.1
    return min(kept) - margin, max(kept) + margin


def loss_chart(arms: Sequence[ArmRecord], axis: str) -> str | None:
    """Training loss as a line, validation loss as points, against an axis; None if an arm lacks that axis."""
    curves, frame = [curve(arm, axis) for arm in arms], loss_frame(arms)
    if frame is None or any(not len(c.train_x) and not len(c.validation_x) for c in curves):
        return None
    unit, label = 1.0, axis
    if axis == "FLOPs":
        largest = max(max([*c.train_x, *c.validation_x]) for c in curves)
        unit, prefix = next(((u, p) for u, p in PREFIXES if largest >= u), (1.0, ""))
        label = f"useful training {prefix}FLOPs"
    figure, axes = _blank()
    for i, c in zip(arm_styles(arms), curves, strict=True):
        ink, line, marker = ARM_INKS[i], DASHES[i], MARKERS[i]
        axes.plot(c.train_x / unit, c.loss, color=ink, alpha=0.25, linewidth=0.8)
        axes.plot(c.train_x / unit, c.smooth, color=ink, linewidth=1.6, linestyle=line)
        axes.plot(c.validation_x / unit, c.validation, marker, color=ink, markersize=4.5)
    axes.set_ylim(*frame)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.set_ylabel("loss, nats per token")
    names = " and ".join(arm.name for arm in arms)
    return _svg(figure, f"loss-{axis}", f"Training and validation loss of {names} against {axis}.")


def dropped_chart(record: RoutingRecord) -> str:
    """Dropped share by position in the row: one faint line a layer, their mean in bold."""
    figure, axes = _blank()
    percent_LP = 100 * record.dropped_by_position_LP
    middle = (np.arange(percent_LP.shape[1]) + 0.5) / percent_LP.shape[1] * 100
    for percent_P in percent_LP:
        axes.plot(middle, percent_P, color=ARM_INKS[1], alpha=0.35, linewidth=1)
    axes.plot(middle, percent_LP.mean(axis=0), color=ARM_INKS[1], linewidth=2, marker="o", markersize=4)
    axes.set_ylim(0, max(percent_LP.max() * 1.1, 0.5))
    axes.set_xlim(0, 100)
    axes.set_xlabel("position in the row, % of its length")
    axes.set_ylabel("choices dropped, %")
    return _svg(figure, "dropped", "Share of choices dropped, by position in the row.")


def _blank() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 3.1), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=11, length=0, pad=4)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set(color=INK, size=11)
    axes.yaxis.label.set(color=INK, size=11)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    return figure, axes


def _svg(figure: Figure, name: str, label: str) -> str:
    """Saves a figure as inline SVG: text in the page's font, the page's colours, ids shared with no other."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box is not None, "matplotlib writes a viewBox"
    head = f'<svg role="img" aria-label="{html.escape(label)}" {box.group()}>'
    svg = re.sub(r"^<svg[^>]*>", lambda _: head, svg).replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r"font-family:[^;\"]*;? ?", "", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for ink, variable in VARIABLES.items():
        svg = svg.replace(ink, f"var(--{variable})")
    return svg
