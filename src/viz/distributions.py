"""Plots of distributions: scatter plots, histograms, bars and heat maps of samples and real data."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from src.viz.figures import COLORS, Interval, error_bars, histogram_bins, new_figure, render_figure

AxisLimits = tuple[tuple[float, float], tuple[float, float]]  # (left, right) and (bottom, top) of a plot
MAX_COLUMNS = 40  # most columns in a picture
MAX_BARS = 12  # most categories of a column that are shown


def scatter(
    points: Tensor,
    real: Tensor | None = None,
    limits: AxisLimits | None = None,
    size: float = 5.0,
    columns: Sequence[str] | None = None,
) -> Image.Image:
    """Draw the first two features of points (N, D) over `real` data (M, D), or histograms if D = 1.

    Without `limits`, `axis_limits` of `real` or of the points apply. A square plot about 0 has no ticks, since its
    scale is arbitrary; all other plots have them.
    """
    figure, ((axes,),) = new_figure(size, size, grid=False)
    clouds = [(real, "0.75", "real data")] if real is not None else []
    for cloud, color, label in [*clouds, (points, COLORS[0], "samples")]:
        xy = cloud.cpu().double().numpy()  # float32 would round values far from 0 to one number
        if points.shape[1] == 1:
            _histogram(axes, xy[:, 0], histogram_bins(xy[:, 0], 60), color, label)
        else:
            axes.scatter(xy[:, 0], xy[:, 1], s=4, color=color, alpha=0.6, linewidths=0, label=label)
    xlabel, ylabel, *_ = [*(columns or ()), "", ""]
    if points.shape[1] == 1:
        axes.set(xlabel=xlabel, ylabel="density")
    else:
        across, up = limits or axis_limits(points if real is None else real)
        axes.set(xlim=across, ylim=up, xlabel=xlabel, ylabel=ylabel)
        if across == up:
            axes.set(aspect="equal", xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(visible=True, color="0.7")
    if real is not None:
        axes.legend(loc="upper right", markerscale=4)
    return render_figure(figure)


def pair_plot(
    points: Tensor, real: Tensor | None = None, max_features: int = 4, columns: Sequence[str] | None = None
) -> Image.Image:
    """Draw each pair of the first `max_features` of points (N, D > 1) as a scatter plot, each one as a histogram."""
    count = min(points.shape[1], max_features)
    names = columns or [f"column {k + 1}" for k in range(count)]
    size = 2.2 * count
    figure, panels = new_figure(size, size, count, count, grid=False)
    reference = [(real, "0.75")] if real is not None else []
    clouds = [(cloud.cpu().double(), color) for cloud, color in [*reference, (points, COLORS[0])]]
    for row in range(count):
        for column in range(count):
            axes = panels[row][column]
            if column > row:
                axes.set_axis_off()
                continue
            across, up = axis_limits(clouds[0][0][:, [column, row]], symmetric=False)
            for cloud, color in clouds:
                if row == column:
                    axes.hist(cloud[:, row].numpy(), bins=40, range=across, density=True, color=color, alpha=0.7)
                else:
                    xy = cloud[:, [column, row]].numpy()
                    axes.scatter(xy[:, 0], xy[:, 1], s=3, color=color, alpha=0.6, linewidths=0)
                    axes.set_ylim(up)
            axes.set_xlim(across)
            axes.locator_params(nbins=4)
            axes.tick_params(labelsize=7)
            if row == count - 1:
                axes.set_xlabel(names[column], fontsize=8)
            if column == 0:
                axes.set_ylabel(names[row] if row else "density", fontsize=8)
    return render_figure(figure)


def axis_limits(points: Tensor, symmetric: bool = True) -> AxisLimits:
    """Return axis limits that hold nearly all points (N, D >= 2) in their first two features.

    If `symmetric`, and the points spread about equally around 0, the limits are a square about 0.
    """
    finite = points[points.isfinite().all(1), :2].cpu().double()
    if not len(finite):
        return (-1.0, 1.0), (-1.0, 1.0)
    bound = 1.15 * float(finite.abs().quantile(0.999))
    low, high = finite.quantile(torch.tensor([0.001, 0.999], dtype=torch.float64), dim=0)
    if symmetric and float((high - low).min()) > bound / 2:
        return (-bound, bound), (-bound, bound)
    size = torch.maximum(low.abs(), high.abs())
    margin = torch.where(high - low > 1e-12 * size, 0.08 * (high - low), (1e-3 * size).clamp(min=1))
    (left, bottom), (right, top) = (low - margin).tolist(), (high + margin).tolist()
    return (left, right), (bottom, top)


def value_histogram(values: np.ndarray, limits: tuple[float, float]) -> Image.Image:
    """Draw the distribution of the values (C, M) of the first channels over the range `limits`."""
    figure, ((axes,),) = new_figure(7.0, 4.0)
    colors = ("#c33", "#393", "#36c") if len(values) == 3 else COLORS
    names = ("red", "green", "blue") if len(values) == 3 else [f"channel {k}" for k in range(len(values))]
    low, high = limits
    for k, channel in enumerate(values[:6]):
        axes.hist(channel, bins=64, range=limits, histtype="step", color=colors[k], label=names[k], density=True)
    axes.set(xlim=(low, high), xlabel="pixel value", ylabel="density")
    if len(values) > 1:
        axes.legend()
    return render_figure(figure)


def marginals(
    samples: Tensor,
    real: Tensor,
    names: Sequence[str],
    categories: Sequence[Sequence[str]],
    labels: tuple[str, str] = ("samples", "real data"),
) -> Image.Image:
    """Draw the distribution of each column of samples (N, K) and real data (M, K): histograms, bars for categories.

    `categories` holds the categories of a column of indices, and nothing for numbers. `labels` name both data.
    """
    count = min(len(names), MAX_COLUMNS)
    columns = min(4, count)
    rows = math.ceil(count / columns)
    figure, panels = new_figure(3.2 * columns, 2.4 * rows, rows, columns, grid=False)
    for k, axes in enumerate(panels.flat):
        if k >= count:
            axes.set_axis_off()
            continue
        x, y = (each[:, k].cpu().double().numpy() for each in (samples, real))
        if categories[k]:
            _bars(axes, x, y, categories[k], labels)
        else:
            bins = histogram_bins(np.concatenate([x, y]), max(10, min(40, round(len(y) ** 0.5))))
            for values, color, label in ((y, "0.7", labels[1]), (x, COLORS[0], labels[0])):
                _histogram(axes, values, bins, color, label)
        axes.set_title(names[k][:40], fontsize=9)
        axes.tick_params(labelsize=7)
    panels.flat[0].legend(fontsize=7)
    return render_figure(figure)


def _histogram(axes: Any, values: np.ndarray, bins: np.ndarray, color: str, label: str) -> None:
    finite = values[np.isfinite(values)]
    axes.hist(finite, bins=bins, density=len(finite) > 0, color=color, alpha=0.7, label=label)


def _bars(axes: Any, x: np.ndarray, y: np.ndarray, categories: Sequence[str], names: tuple[str, str]) -> None:
    """Draw the shares of the most frequent categories of real data y, and of samples x."""
    real, samples = (
        np.bincount(each[np.isfinite(each)].astype(int), minlength=len(categories)) / max(1, len(each))
        for each in (y, x)
    )
    order = np.argsort(-real, kind="stable")[:MAX_BARS]
    places = np.arange(len(order))
    axes.bar(places - 0.2, real[order], 0.4, color="0.7", label=names[1])
    axes.bar(places + 0.2, samples[order], 0.4, color=COLORS[0], label=names[0])
    labels = [categories[k][:10] for k in order]
    axes.set_xticks(places, labels, rotation=90 if len(order) > 4 else 0, fontsize=7)


def association_matrices(samples: Tensor, real: Tensor, names: Sequence[str]) -> Image.Image:
    """Draw the associations (K, K) of real data, of samples, and their difference as heat maps."""
    count = min(len(names), MAX_COLUMNS)
    size = max(3.4, min(0.45 * count, 7.0))
    figure, (panels,) = new_figure(3 * size + 0.8, size + 0.4, columns=3, grid=False)
    matrices = {"real data": real, "samples": samples, "difference": samples - real}
    labels = [name[:18] for name in names[:count]]
    for axes, (title, matrix) in zip(panels, matrices.items(), strict=True):
        shown = axes.imshow(matrix[:count, :count].cpu().numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(count), labels, rotation=90, fontsize=7)
        axes.set_yticks(range(count), labels, fontsize=7)
    figure.colorbar(shown, ax=list(panels), shrink=0.7).ax.tick_params(labelsize=7)
    return render_figure(figure)


def class_frequencies(names: Sequence[str], shares: Mapping[str, Sequence[Interval]]) -> Image.Image:
    """Draw how often each class occurs: one bar per class for each label, with confidence intervals, as fractions."""
    vertical = max(map(len, names)) > 3
    width = max(6.0, 0.16 * len(names) * (len(shares) + 1))
    height = 3.8 + (0.08 * max(map(len, names)) if vertical else 0)
    figure, ((axes,),) = new_figure(width, height, grid=False)
    bar = 0.8 / len(shares)
    for k, (label, intervals) in enumerate(shares.items()):
        values = 100 * np.array(intervals)
        place = np.arange(len(names)) + (k - (len(shares) - 1) / 2) * bar
        color = "0.7" if k == 0 else COLORS[(k - 1) % len(COLORS)]
        bars = {"ecolor": "0.25", "elinewidth": 0.8, "capsize": 1.5}
        axes.bar(place, values[:, 0], bar, yerr=error_bars(values), label=label, color=color, error_kw=bars)
    axes.set(title="Class frequencies (bars: 95% intervals)", xlabel="class", ylabel="% of samples", ylim=(0, None))
    axes.set_xticks(np.arange(len(names)), names, rotation=90 if vertical else 0)
    axes.margins(x=0.01)
    axes.legend(fontsize=8)
    return render_figure(figure)
