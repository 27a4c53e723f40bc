"""The plots and pictures of a comparison, as PNG: for light pages and for dark ones."""

import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from src.comparison.report import Report, order_of, shown_metrics, title_of
from src.comparison.statistics import Ranking
from src.evaluation.likelihood import SPECTRUM
from src.viz import charts, images

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = (
    *("#3b7dd8", "#e07b39", "#3a9e5c", "#c94f4f", "#8a63d2", "#9a6b4f", "#d667a8", "#7d8590", "#a9a51f", "#2aa7b8"),
    *("#8fb8f0", "#f2b98a", "#8fd0a5", "#eb9c9c", "#c3aef0", "#c9a88f", "#f0b0d6", "#b7bdc5", "#d8d67c", "#86d5df"),
)
"""Of groups, in their order: legible on white and on black."""
LINES = ("-", "--", ":")
DARK: dict[Any, Any] = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), "#171a1f"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), "#d9dde3"),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "legend.edgecolor"), "#5b626c"),
}


def pictures(report: Report) -> dict[str, tuple[bytes, bytes]]:
    """Every plot as PNG by its name, for light pages and for dark ones."""
    drawn = {}
    for ranking in shown_metrics(report):
        if len({x for group in report.groups for x in group.values(ranking.metric)}) > 1:
            height = 0.9 + 0.26 * len(report.groups)
            paint = _dots(report, ranking)
            drawn[f"metric_{file_name(ranking.metric)}"] = both(paint, 5.2, height)
    if any(np.isfinite(seen.error).any() for runs in report.seen for seen in runs):
        drawn["loss_over_log_snr"] = both(_spectra(report, relative=False), 5.2, 4.0, _legend(report))
        if len(report.groups) > 1:
            drawn["loss_over_log_snr_relative"] = both(_spectra(report, relative=True), 5.2, 4.0, _legend(report))
    for name, smooth in (("train/loss", True), ("val/loss", False)):
        if any(name in seen.curves for runs in report.seen for seen in runs):
            drawn[f"training_{file_name(name)}"] = both(_training(report, name, smooth), 5.2, 4.0, _legend(report))
    if (samples := _samples(report)) is not None:
        drawn["samples"] = (samples, samples)
    return drawn


def both(paint: "Callable[[Axes], None]", width: float, height: float, entries: int = 0) -> tuple[bytes, bytes]:
    """One plot as PNG on white and on black; `entries` of a legend stand below it."""
    import matplotlib
    from matplotlib.figure import Figure

    made = []
    columns = 2 if entries <= 4 else 3
    height += 0.2 * math.ceil(entries / columns)
    for style in ({}, DARK):
        with matplotlib.rc_context({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, **style}):
            figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
            axes = figure.subplots()
            paint(axes)
            if entries:
                handles, labels = axes.get_legend_handles_labels()
                figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", metadata={"Software": None})
        picture = Image.open(buffer).convert("RGB").quantize(192)
        small = io.BytesIO()
        picture.save(small, "PNG", optimize=True)
        made.append(small.getvalue())
    return made[0], made[1]


def _legend(report: Report) -> int:
    return len(report.groups)


def _style(k: int) -> dict[str, Any]:
    return {"color": COLORS[k % len(COLORS)], "linestyle": LINES[k // len(COLORS) % len(LINES)]}


def _dots(report: Report, ranking: Ranking) -> "Callable[[Axes], None]":
    """A row for each group: a dot for each seed, a bar at their mean, whiskers where one seed has an interval."""

    def paint(axes: "Axes") -> None:
        order = order_of(report)
        for place, k in enumerate(order):
            group, color = report.groups[k], COLORS[k % len(COLORS)]
            values = group.values(ranking.metric)
            axes.plot(values, [place] * len(values), "o", color=color, markersize=5, alpha=0.75, markeredgewidth=0)
            if values:
                mean = sum(values) / len(values)
                axes.plot([mean, mean], [place - 0.32, place + 0.32], "-", color=color, linewidth=2.2)
            if len(values) == 1 and (ends := group.records[0].intervals.get(ranking.metric)):
                axes.plot(ends, [place, place], "-", color=color, linewidth=1.0)
        if floor := report.floors.get(ranking.metric):
            axes.axvline(floor[0], color="0.5", linestyle="--", linewidth=1.2)
            axes.annotate(
                "real data", (floor[0], 1.0), xycoords=("data", "axes fraction"), xytext=(3, 2),
                textcoords="offset points", color="0.5", fontsize=8, ha="left", va="bottom",
            )  # fmt: skip
        axes.set_yticks(range(len(order)), [report.groups[k].label for k in order])
        axes.set_ylim(len(order) - 0.5, -0.5)
        better = f", {ranking.direction} is better" if ranking.best is not None else ""
        axes.set_xlabel(f"{title_of(ranking.metric)}{better}")
        axes.grid(alpha=0.35, axis="x", linewidth=0.6)

    return paint


def _spectra(report: Report, relative: bool) -> "Callable[[Axes], None]":
    """The error of eps over log-SNR, a line for each group and a band from its least to its greatest seed."""
    centers = ((SPECTRUM[:-1] + SPECTRUM[1:]) / 2).numpy()
    errors = [np.stack([seen.error for seen in runs]) for runs in report.seen]

    def paint(axes: "Axes") -> None:
        with np.errstate(all="ignore"):
            means = np.stack([_nan(np.mean, each) for each in errors])
            usual = np.exp(_nan(np.mean, np.log(means))) if relative else np.ones(len(centers))
            # Where few groups have been, the mean over groups is another one.
            there = np.isfinite(means).all(0) if relative else np.ones(len(centers), bool)
            for k, each in enumerate(errors):
                line = np.where(there, means[k] / usual, np.nan)
                style = {"linewidth": 1.4, "marker": ".", "markersize": 3, **_style(k)}  # a bin may stand alone
                axes.plot(centers, line, label=report.groups[k].label, **style)
                low, high = (np.where(there, _nan(end, each) / usual, np.nan) for end in (np.min, np.max))
                axes.fill_between(centers, low, high, color=COLORS[k % len(COLORS)], alpha=0.18, linewidth=0)
        axes.set(
            xlabel="log-SNR: noise on the left, clean data on the right",
            ylabel="error over the groups' geometric mean" if relative else "mean squared error of ε",
        )
        axes.grid(alpha=0.35, linewidth=0.6)
        _scale(axes)
        if relative:
            axes.axhline(1, color="0.5", linewidth=0.8)

    return paint


def _nan(of: Callable[..., Any], values: np.ndarray) -> np.ndarray:
    """`of` over the first axis, without what is not finite; NaN where nothing is left."""
    masked = np.ma.masked_invalid(values)
    result: np.ndarray = np.ma.filled(of(masked, axis=0).astype(float), np.nan)
    return result


def _scale(axes: "Axes") -> None:
    """A logarithmic axis where the lines span it, with numbers as people write them."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) and drawn.min() > 0 and drawn.max() > 3 * drawn.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain)
        if drawn.max() < 100 * drawn.min():
            axes.yaxis.set_minor_formatter(_plain)


def _plain(value: float, _: float) -> str:
    """On a logarithmic axis: 0.1, 0.2, 0.5, 1, 2, 5, and nothing between them."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""


def _training(report: Report, name: str, smooth: bool) -> "Callable[[Axes], None]":
    """What was logged over the steps: a line for each group, the mean over its seeds where all have logged."""

    def paint(axes: "Axes") -> None:
        for k, runs in enumerate(report.seen):
            logged = [dict(zip(*seen.curves[name], strict=True)) for seen in runs if name in seen.curves]
            if not logged:
                continue
            steps = sorted(set.intersection(*(set(each) for each in logged)))
            values = np.array([[each[step] for step in steps] for each in logged])
            line = _nan(np.mean, values)
            if smooth:
                line = smoothed(line, max(1, len(steps) // 40))
            marker = "o" if len(steps) < 15 else ""
            axes.plot(
                steps, line, label=report.groups[k].label, linewidth=1.4, marker=marker, markersize=3, **_style(k)
            )
            if not smooth and len(logged) > 1:
                low, high = _nan(np.min, values), _nan(np.max, values)
                axes.fill_between(steps, low, high, color=COLORS[k % len(COLORS)], alpha=0.18, linewidth=0)
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.35, linewidth=0.6, which="both")
        _scale(axes)

    return paint


def smoothed(values: np.ndarray, reach: int) -> np.ndarray:
    """Each value's mean with those up to `reach` places before and after it."""
    return np.array([np.nanmean(values[max(0, k - reach) : k + reach + 1]) for k in range(len(values))])


def strip(report: Report, group: int | None) -> bytes | None:
    """The samples of a group's first seed, or real data, as one picture: images in a row, points scattered."""
    samples = report.real if group is None else report.seen[group][0].samples
    if not len(samples):
        return None
    if samples.ndim == 4:
        picture = images.image_grid(samples[:16], columns=len(samples[:16]), cell=32)
    else:
        picture = charts.scatter(samples, limits=_extent(report), size=2.6)
    return png(picture)


def _samples(report: Report) -> bytes | None:
    """All groups' samples with their names, as one picture."""
    rows = {group.label: runs[0].samples for group, runs in zip(report.groups, report.seen, strict=True)}
    rows["real, held out"] = report.real
    if not all(len(row) for row in rows.values()):
        return None
    if report.real.ndim == 4:
        count = min(16, *(len(row) for row in rows.values()))
        return png(images.labeled_rows([row[:count] for row in rows.values()], list(rows)))
    limits = _extent(report)
    clouds = [images.add_title(charts.scatter(row, limits=limits, size=2.6), name) for name, row in rows.items()]
    return png(images.side_by_side(clouds, gap=8))


def _extent(report: Report) -> charts.AxisLimits | None:
    """So that all clouds of points are seen at one scale; None for histograms of numbers."""
    return charts.axis_limits(report.real) if report.real.ndim == 2 and report.real.shape[1] > 1 else None


def png(picture: Image.Image) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def file_name(metric: str) -> str:
    """A metric's name as part of a file's."""
    return metric.replace("/", "_")
