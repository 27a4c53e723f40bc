"""Draw the charts and samples of a comparison as PNG."""

import io
import math
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from src.comparison.report import Report
from src.comparison.statistics import Ranking
from src.evaluation.likelihood import SPECTRUM
from src.viz import distributions, figures, images
from src.viz.line_plots import LOWER_IS_BETTER
from src.viz.tables import metric_title

BAND = {"alpha": 0.18, "linewidth": 0}


def draw_charts(report: Report) -> dict[str, bytes]:
    drawn = {}
    for ranking in report.rankings:
        if len({x for group in report.groups for x in group.values(ranking.metric)}) > 1:
            drawn[chart_name(ranking.metric)] = _seed_chart(report, ranking)
    runs = [run for group in report.runs for run in group]
    if any(np.isfinite(run.error).any() for run in runs):
        drawn["loss_over_log_snr"] = _error_chart(report, relative=False)
        if len(report.groups) > 1:
            drawn["loss_over_log_snr_relative"] = _error_chart(report, relative=True)
    for name in ("train/loss", "val/loss"):
        if any(name in run.curves for run in runs):
            drawn[f"training_{name.replace('/', '_')}"] = _training_chart(report, name)
    if (samples := _sample_chart(report)) is not None:
        drawn["samples"] = samples
    return drawn


def chart_name(metric: str) -> str:
    return f"metric_{metric.replace('/', '_')}"


def _seed_chart(report: Report, ranking: Ranking) -> bytes:
    """Draw a row per group: a dot per seed, a bar at their mean, or the interval of a single seed."""
    width = max(5.4, 3.3 + 0.075 * max(len(group.label) for group in report.groups))
    figure, ((axes,),) = figures.new_figure(width, 1.2 + 0.26 * len(report.groups))
    for row, k in enumerate(report.order):
        group, style = report.groups[k], figures.series_style(k)
        values, color = group.values(ranking.metric), style["color"]
        axes.plot(values, [row] * len(values), style["marker"], color=color, markersize=5, alpha=0.75)
        if values:
            mean = sum(values) / len(values)
            axes.plot([mean, mean], [row - 0.32, row + 0.32], "-", color=color, linewidth=2.2)
        if len(values) == 1 and (limits := group.records[0].intervals.get(ranking.metric)):
            axes.plot(limits, [row, row], "-", color=color, linewidth=1.0)
    if baseline := report.baselines.get(ranking.metric):
        axes.axvline(baseline[0], color="0.5", linestyle="-.", linewidth=1.2)
        where = {"xycoords": ("data", "axes fraction"), "xytext": (3, 1), "textcoords": "offset points"}
        axes.annotate("real data", (baseline[0], 1.0), color="0.4", fontsize=8, **where)
    axes.set_yticks(range(len(report.groups)), [report.groups[k].label for k in report.order])
    axes.set_ylim(len(report.groups) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=6)
    direction = f"{ranking.direction} is better" if ranking.best is not None else "not ranked"
    axes.set_title(metric_title(ranking.metric), pad=16)
    axes.set_xlabel(f"value per seed ({direction})")
    return _png(figures.render_figure(figure).quantize(192))  # half the size


def _error_chart(report: Report, relative: bool) -> bytes:
    """Draw the error of eps over log-SNR: a line per group, and a band from the lowest to the highest seed."""
    centers = ((SPECTRUM[:-1] + SPECTRUM[1:]) / 2).numpy()
    errors = [_finite(np.stack([run.error for run in runs])) for runs in report.runs]
    means = pd.DataFrame([each.mean() for each in errors])
    # The mean over groups is comparable only in bins that all groups have; it is NaN in the others.
    scale = np.exp(np.log(means).mean(skipna=False)) if relative else 1.0

    figure, axes = _line_figure(report)
    for k, each in enumerate(errors):
        style = {**figures.series_style(k), "linewidth": 1.4, "markersize": 3}
        axes.plot(centers, each.mean() / scale, label=report.groups[k].label, **style)
        axes.fill_between(centers, each.min() / scale, each.max() / scale, color=style["color"], **BAND)
    if relative:
        axes.axhline(1, color="0.5", linewidth=0.8)
    title = "Relative error of the predicted noise" if relative else "Error of the predicted noise"
    label = "error / geometric mean of groups" if relative else "mean squared error"
    axes.set(title=title, xlabel="log-SNR (noise left, data right)", ylabel=f"{label} {LOWER_IS_BETTER}")
    return _finish(figure, axes)


def _training_chart(report: Report, name: str) -> bytes:
    """Draw a logged loss by step: per group the mean over seeds, at the steps that all seeds logged.

    `train/loss` is smoothed; `val/loss` has a band from the lowest to the highest seed.
    """
    figure, axes = _line_figure(report)
    for k, runs in enumerate(report.runs):
        logged = [dict(zip(*run.curves[name], strict=True)) for run in runs if name in run.curves]
        table = _finite(pd.DataFrame(logged)).dropna(axis=1).sort_index(axis=1)  # a row per run, a column per step
        line, style = table.mean(), figures.series_style(k)
        if name == "train/loss":
            line = line.rolling(2 * max(1, len(line) // 40) + 1, center=True, min_periods=1).mean()
        else:
            axes.fill_between(table.columns, table.min(), table.max(), color=style["color"], **BAND)
        style |= {} if len(line) < 15 else {"marker": ""}
        axes.plot(line, label=report.groups[k].label, linewidth=1.4, markersize=3, **style)
    title = "Training loss (smoothed)" if name == "train/loss" else "Validation loss"
    axes.set(title=title, xlabel="step", ylabel=f"{name} {LOWER_IS_BETTER}")
    return _finish(figure, axes)


def _line_figure(report: Report) -> tuple[Any, Any]:
    """Return a figure with room for the legend of the groups, and its axes."""
    figure, ((axes,),) = figures.new_figure(5.4, 3.9 + 0.17 * math.ceil(len(report.groups) / 2))
    return figure, axes


def _finish(figure: Any, axes: Any) -> bytes:
    figures.set_log_scale(axes, "y")
    legend: dict[str, Any] = {"loc": "outside lower center", "ncols": 2, "fontsize": 8, "frameon": False}
    figure.legend(*axes.get_legend_handles_labels(), **legend)
    return _png(figures.render_figure(figure).quantize(192))  # half the size


def _finite(values: np.ndarray | pd.DataFrame) -> pd.DataFrame:
    """Return values as a table, whose means, minima and maxima exclude non-finite numbers."""
    return pd.DataFrame(values).where(np.isfinite(values))


def _sample_chart(report: Report) -> bytes | None:
    """Draw samples of each group's first seed, and validation data, with their labels."""
    rows = {report.groups[k].label: report.runs[k][0].samples for k in report.order}
    rows["validation data"] = report.real
    if not all(len(row) for row in rows.values()):
        return None
    if report.real.ndim > 2:
        count = min(map(len, rows.values()))
        return _png(images.labeled_rows([row[:count] for row in rows.values()], list(rows), cell=32))
    limits = distributions.axis_limits(report.real) if report.real.shape[1] > 1 else None
    plots = [images.add_title(distributions.scatter(row, limits=limits, size=2.6), name) for name, row in rows.items()]
    return _png(images.tile(plots, columns=4))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
