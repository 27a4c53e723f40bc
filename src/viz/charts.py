"""Charts drawn with matplotlib."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from src.viz.figures import (
    COLORS,
    error_bars,
    histogram_bins,
    new_figure,
    render_figure,
    series_style,
    set_log_scale,
    set_log_ticks,
)
from src.viz.tables import better_direction, metric_title

Interval = tuple[float, float, float]
"""A value and its confidence limits (value, low, high), such as a `metrics.confidence.Metric`."""

AxisLimits = tuple[tuple[float, float], tuple[float, float]]  # (left, right) and (bottom, top) of a plot
LOWER_IS_BETTER = "(lower is better)"
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


def read_logs(logs: Sequence[Path], names: Sequence[str]) -> dict[str, tuple[list[float], list[float]]]:
    """Return steps and values logged under each of `names`, from the CSV logs of a run and its resumptions."""
    series: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    for log in logs:
        with log.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, (steps, values) in series.items():
                    if row.get(name):
                        steps.append(float(row["step"]))
                        values.append(float(row[name]))
    return {name: xy for name, xy in series.items() if xy[0]}


def loss_curves(logs: Sequence[Path]) -> Image.Image | None:
    """Draw losses and gradient norm by step from the CSV logs of a run; return None if nothing was logged."""
    labels = {"train/loss": LOWER_IS_BETTER, "val/loss": LOWER_IS_BETTER, "train/grad_norm": "(L2)"}
    series = read_logs(logs, [*labels])
    if not series:
        return None
    height = 2.0 * len(series) + 1.0
    figure, panels = new_figure(7.0, height, rows=len(series), shared_x=True)
    panels[0, 0].set_title("Training curves")
    for axes, (name, (steps, values)) in zip(panels[:, 0], series.items(), strict=True):
        axes.plot(steps, values, color=COLORS[0], linewidth=1.0, marker="o" if len(steps) < 30 else "", markersize=3)
        set_log_scale(axes, "y")
        scale = ", log scale" if axes.get_yscale() == "log" else ""
        axes.set_ylabel(f"{name}{scale}\n{labels[name]}")
    panels[-1, 0].set_xlabel("step")
    figure.align_ylabels()
    return render_figure(figure)


def loss_by_noise(log: Path) -> Image.Image:
    """Draw the table of `LossByNoise`: loss over steps and log-SNR as a heat map, and profiles at three steps."""
    from matplotlib.colors import LogNorm

    with log.open(newline="") as file:
        rows = [[float(row[name] or "nan") for name in ("step", "log_snr", "loss")] for row in csv.DictReader(file)]
    steps, log_snr = (sorted({row[k] for row in rows}) for k in (0, 1))
    table = np.full((len(log_snr), len(steps)), np.nan)
    for step, level, loss in rows:
        # The decoder's term is negative where the data have a density.
        table[log_snr.index(level), steps.index(step)] = loss if loss > 0 else np.nan
    half = (log_snr[1] - log_snr[0]) / 2 if len(log_snr) > 1 else 0.5
    edges = [log_snr[0] - half, *(level + half for level in log_snr)]
    finite = table[np.isfinite(table)] if np.isfinite(table).any() else np.array([0.1, 1.0])
    # Some weightings push the loss toward 0 at pure noise; show only the top four decades.
    low, high = max(finite.min(), 1e-4 * finite.max()), finite.max()
    figure, ((left, right),) = new_figure(11.0, 4.4, columns=2, grid=False)
    left.set_facecolor("0.85")
    norm = LogNorm(0.999 * low, 1.001 * high, clip=True)
    mesh = left.pcolormesh([0.0, *steps], edges, table, norm=norm, cmap="cividis")
    bar = figure.colorbar(mesh, ax=left, pad=0.02)
    set_log_ticks(bar.ax.yaxis, low, high)
    bar.ax.tick_params(labelsize=8)
    left.set(title="Training loss by noise level (gray: no samples)", xlabel="step")
    profiles = evenly_spaced_indices(len(steps), 3)
    for k, shade in zip(profiles, ("0.7", COLORS[4], COLORS[0])[-len(profiles) :], strict=True):
        label = f"steps {int(steps[k - 1]) if k else 0:,} to {int(steps[k]):,}"
        right.plot(table[:, k], log_snr, color=shade, marker=".", linewidth=1.3, label=label)
    set_log_scale(right, "x")
    label = f"training loss {LOWER_IS_BETTER}"
    right.set(title="Loss profile during training", xlabel=label, xlim=(0.7 * low, 1.4 * high))
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.set(ylim=(edges[0], edges[-1]), ylabel="log-SNR (noise below, data above)")
    return render_figure(figure)


def schedule_curves(schedules: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> Image.Image:
    """Draw beta, alpha_bar and log-SNR over t / T of each named schedule: (betas, alpha, sigma), each (T,)."""
    figure, (panels,) = new_figure(12.5, 4.2, columns=3)
    for k, (name, (betas, alpha, sigma)) in enumerate(schedules.items()):
        u = (np.arange(len(betas)) + 1) / len(betas)
        style = {"label": name, "linewidth": 1.3, **series_style(k), "markersize": 3, "markevery": (k * 0.02, 0.15)}
        log_snr = 2 * (alpha.log() - sigma.log())
        for axes, values in zip(panels, (betas, alpha.square(), log_snr), strict=True):
            axes.plot(u, values.cpu().numpy(), **style)
    titles = {"beta": "Step variance", "alpha_bar": "Signal power", "log-SNR": "Signal-to-noise ratio"}
    for axes, (label, title) in zip(panels, titles.items(), strict=True):
        axes.set(title=title, xlabel="t / T (0: data, 1: noise)", ylabel=label)
    set_log_scale(panels[0], "y")
    panels[2].set_ylim(-15, 15)
    if len(schedules) > 1:
        figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return render_figure(figure)


def bound_curves(terms: Tensor, mse: Tensor, log_snr: Tensor) -> Image.Image:
    """Draw the terms (T,) of the variational bound over t, and the error of eps (T,) over log-SNR (T,).

    NaN marks terms that were not estimated.

    Source: Nichol and Dhariwal 2021 (arXiv 2102.09672), fig. 2.
    """
    figure, ((left, right),) = new_figure(10.5, 4.2, columns=2)
    known = ~terms.isnan()
    t = (torch.arange(len(terms))[known] + 1).numpy()
    style = {"color": COLORS[0], "linewidth": 1.2, "marker": "" if known.all() else "."}
    values = terms[known].cpu().numpy()
    positive = values > 0
    left.plot(t, np.where(positive, values, np.nan), **style)
    if (values < 0).any():  # the decoder's term where the data have a density
        style_below = {"color": COLORS[1], "marker": "v", "markersize": 5, "linestyle": "", "label": "minus the term"}
        left.plot(t[values < 0], -values[values < 0], **style_below)
        left.legend(fontsize=8)
    set_log_scale(left, "xy")
    left.set_ylim(bottom=max(left.get_ylim()[0], 1e-7 * float(np.abs(values).max(initial=1e-5))))
    left.set(title="Terms of the variational bound", xlabel="t (1: decoder)", ylabel=f"bits/dim {LOWER_IS_BETTER}")
    right.plot(log_snr[known].cpu().numpy(), mse[known].cpu().numpy(), **style)
    set_log_scale(right, "y")
    label = f"mean squared error {LOWER_IS_BETTER}"
    right.set(title="Error of the predicted noise", xlabel="log-SNR (noise left, data right)", ylabel=label)
    return render_figure(figure)


def sampler_errors(results: Mapping[str, tuple[list[int], list[float], list[float]]], chance: float) -> Image.Image:
    """Draw errors over network evaluations by sampler: (evaluations, flow errors or empty, moment errors).

    `chance` is the moment error of exact samples.
    """
    figure, ((left, right),) = new_figure(12.0, 4.6, columns=2)
    for k, (name, (evaluations, flow, moments)) in enumerate(results.items()):
        style = {"label": name, "markersize": 4, "linewidth": 1.3, **series_style(k)}
        if flow:
            left.plot(evaluations, flow, **style)
        right.plot(evaluations, moments, **style)
    right.axhline(chance, color="0.6", linestyle="-.", linewidth=1, label="exact samples")
    left.set(title="Error of the probability flow", ylabel=f"RMS distance to exact solution {LOWER_IS_BETTER}")
    right.set(title="Error of the distribution", ylabel=f"distance of mean and covariance {LOWER_IS_BETTER}")
    for axes in (left, right):
        axes.set_xlabel("network evaluations")
        set_log_scale(axes, "xy")
    figure.legend(*right.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return render_figure(figure)


def quality_against_cost(
    metrics: Sequence[str], curves: Mapping[str, Sequence[tuple[int, Sequence[Interval]]]], baseline: Sequence[Interval]
) -> Image.Image:
    """Draw one panel per metric: its value over network calls per sample, one line per sampler.

    `curves` maps a sampler to (calls, value of each metric); `baseline` holds each metric of real data.
    """
    figure, (panels,) = new_figure(5.0 * len(metrics), 4.2, columns=len(metrics))
    for m, (axes, metric) in enumerate(zip(panels, metrics, strict=True)):
        for k, (name, points) in enumerate(curves.items()):
            calls, intervals = zip(*sorted((calls, tuple(values[m])) for calls, values in points), strict=True)
            values = np.array(intervals)
            style = {"label": name, "markersize": 4, "linewidth": 1.3, "capsize": 2, **series_style(k)}
            axes.errorbar(calls, values[:, 0], error_bars(values), **style)
        value, low, high = baseline[m]
        axes.axhline(value, color="0.5", linestyle="-.", linewidth=1, label="real data")
        axes.axhspan(low, high, color="0.5", alpha=0.12, linewidth=0)
        label = f"{metric_title(metric)}\n({better_direction(metric)} is better)"
        axes.set(ylabel=label, xlabel="network calls per sample")
        set_log_scale(axes, "x")
    panels[0].set_title("Quality against cost (bars: 95% intervals)", loc="left")
    panels[-1].legend(fontsize=8)
    return render_figure(figure)


def alignment_against_diversity(
    curves: Mapping[str, Sequence[tuple[float, Interval, Interval]]], detector: float
) -> Image.Image:
    """Draw the fraction of samples that match their prompt over their diversity, one line per group of prompts.

    `curves` maps a group to (guidance scale, diversity, fraction); `detector` is that of real images.
    """
    figure, ((axes,),) = new_figure(6.8, 4.8)
    for k, (name, points) in enumerate(curves.items()):
        scales, *intervals = zip(*points, strict=True)
        x, y = (np.array(values) for values in intervals)
        style = {"markersize": 4, "linewidth": 1.3, "capsize": 2, "elinewidth": 0.8, **series_style(k)}
        axes.errorbar(x[:, 0], y[:, 0], error_bars(y), error_bars(x), label=name, **style)
        for scale, *point in zip(scales, x[:, 0], y[:, 0], strict=True):
            axes.annotate(f"{scale:g}", point, (5, 5), textcoords="offset points", fontsize=8, color=style["color"])
    axes.axhline(detector, color="0.5", linestyle="-.", linewidth=1, label="real images")
    axes.axvline(1, color="0.8", linewidth=1, zorder=0)
    axes.set(
        title="Alignment against diversity, by guidance scale",
        xlabel="diversity of the samples of one prompt (real images: 1)",
        ylabel="fraction that matches the prompt (higher is better)",
        ylim=(-0.03, 1.05),
    )
    axes.legend(fontsize=8)
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


def evenly_spaced_indices(length: int, count: int) -> list[int]:
    """Return up to `count` indices spread over 0..length - 1, including both ends."""
    return sorted({round(i) for i in np.linspace(0, length - 1, min(count, length))})
