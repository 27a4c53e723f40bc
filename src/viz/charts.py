"""Charts drawn with matplotlib."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


GAP = 2

Interval = tuple[float, float, float]
"""A value and the interval about it, such as a `metrics.confidence.Metric`."""

Extent = tuple[tuple[float, float], tuple[float, float]]
"""The ends of a plot's two axes."""


MOST_ROWS = 16
"""Of samples that were asked to be different things: beyond so many they are not told apart."""


def scatter(
    points: Tensor,
    real: Tensor | None = None,
    extent: Extent | None = None,
    size: float = 5.0,
    columns: Sequence[str] | None = None,
) -> Image.Image:
    """Points (N, D): the first two features, over `real` data if given; with D = 1, histograms.

    Without an `extent` the axes are those of `extent_of` the data, or the points. Only where they differ do they have
    numbers.
    """
    figure, axes = _figure(size, size)
    layers = [(real, "0.75", "data")] if real is not None else []
    for cloud, color, label in [*layers, (points, "tab:blue", "samples")]:
        xy = cloud.float().cpu().numpy()
        if xy.shape[1] == 1:
            axes.hist(xy[:, 0], bins=60, density=True, color=color, alpha=0.7, label=label)
        else:
            axes.scatter(xy[:, 0], xy[:, 1], s=4, color=color, alpha=0.6, linewidths=0, label=label)
    if columns:
        axes.set_xlabel(columns[0])
    if columns and points.shape[1] > 1:
        axes.set_ylabel(columns[1])
    if points.shape[1] > 1:
        across, up = extent or extent_of(points if real is None else real)
        axes.set(xlim=across, ylim=up)
        if across == up:
            axes.set(aspect="equal", xticks=[], yticks=[])
    if real is not None:
        axes.legend(loc="upper right", markerscale=4)
    return _render(figure)


def pairs(
    points: Tensor, real: Tensor | None = None, most: int = 4, columns: Sequence[str] | None = None
) -> Image.Image:
    """Points (N, D), D > 1: each two of the first `most` features as a scatter plot, each by itself as a histogram."""
    count = min(points.shape[1], most)
    names = columns or [f"column {k + 1}" for k in range(count)]
    figure, panels = _figure(2.4 * count, 2.4 * count, rows=count, columns=count)
    layers = [(real, "0.75")] if real is not None else []
    clouds = [(cloud.float().cpu(), color) for cloud, color in [*layers, (points, "tab:blue")]]
    shown = clouds[0][0]
    for row in range(count):
        for column in range(count):
            axes = panels[row][column]
            if column > row:
                axes.set_axis_off()
                continue
            across, up = extent_of(shown[:, [column, row]], alike=False)
            for cloud, color in clouds:
                if row == column:
                    axes.hist(cloud[:, row], bins=40, range=across, density=True, color=color, alpha=0.7)
                else:
                    axes.scatter(cloud[:, column], cloud[:, row], s=3, color=color, alpha=0.6, linewidths=0)
                    axes.set_ylim(up)
            axes.set_xlim(across)
            axes.tick_params(labelsize=7)
            if row == count - 1:
                axes.set_xlabel(names[column], fontsize=8)
            if column == 0 and row:
                axes.set_ylabel(names[row], fontsize=8)
    return _render(figure)


def read_logs(logs: Sequence[Path], names: Sequence[str]) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of what was logged by these names, from the CSV logs of a run and its resumptions."""
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
    """Loss and gradient norm over the steps, from the CSV logs of a run and its resumptions; None if there are none."""
    shown = read_logs(logs, ("train/loss", "val/loss", "train/grad_norm"))
    if not shown:
        return None
    figure, panels = _figure(7.0, 2.4 * len(shown), rows=len(shown))
    for panel, (name, (steps, values)) in zip(np.atleast_1d(panels), shown.items(), strict=True):
        panel.plot(steps, values, linewidth=1.0, marker="o" if len(steps) < 30 else "", markersize=3)
        panel.set(ylabel=name, yscale="log")
        panel.grid(alpha=0.3)
    panel.set_xlabel("step")
    return _render(figure)


def loss_by_noise(log: Path) -> Image.Image:
    """From the table of `LossByNoise`: the loss over steps and log-SNR as a heat-map, and its profile at some steps."""
    from matplotlib.colors import LogNorm

    with log.open(newline="") as file:
        rows = [[float(row[name] or "nan") for name in ("step", "log_snr", "loss")] for row in csv.DictReader(file)]
    steps, levels = (sorted({row[k] for row in rows}) for k in (0, 1))
    table = np.full((len(levels), len(steps)), np.nan)
    for step, level, loss in rows:
        table[levels.index(level), steps.index(step)] = loss if loss > 0 else np.nan  # the decoder's term may be less
    half = (levels[1] - levels[0]) / 2 if len(levels) > 1 else 0.5
    edges = [levels[0] - half, *(level + half for level in levels)]
    seen = table[np.isfinite(table)]
    high = float(seen.max()) if len(seen) else 1.0
    # Weightings take the loss of pure noise towards 0: of many decades those that matter.
    low = max(float(seen.min()) if len(seen) else 0.1, 1e-4 * high)
    figure, (left, right) = _figure(10.0, 4.2, columns=2)
    colors = LogNorm(0.999 * low, 1.001 * high, clip=True)
    left.set_facecolor("0.85")
    mesh = left.pcolormesh([0.0, *steps], edges, table, norm=colors, cmap="viridis")
    figure.colorbar(mesh, ax=left)
    left.set(
        title="training loss by level of noise (gray: no samples)", xlabel="step", ylabel="log-SNR (0: half noise)"
    )
    chosen = evenly(len(steps), 3)
    for k, shade in zip(chosen, ("0.75", "0.45", "black")[-len(chosen) :], strict=True):
        label = f"steps {int(steps[k - 1]) if k else 0} to {int(steps[k])}"
        right.semilogx(table[:, k], levels, color=shade, marker=".", linewidth=1.3, label=label)
    right.set(title="its profile over training", xlabel="training loss", xlim=(0.5 * low, 2 * high))
    right.set(ylim=(edges[0], edges[-1]), ylabel="log-SNR")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    return _render(figure)


def schedule_curves(schedules: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> Image.Image:
    """beta, alpha_bar and log-SNR over t / T for each name: (betas, alpha, sigma), all (T,)."""
    figure, (left, middle, right) = _figure(13.0, 4.2, columns=3)
    for k, (name, (betas, alpha, sigma)) in enumerate(schedules.items()):
        u = (np.arange(len(betas)) + 1) / len(betas)
        style = {"label": name, "color": f"C{k % 10}", "linestyle": "-" if k < 10 else "--", "linewidth": 1.3}
        left.semilogy(u, betas, **style)
        middle.plot(u, alpha.square(), **style)
        right.plot(u, 2 * (alpha.log() - sigma.log()), **style)
    for axes, title in ((left, "beta"), (middle, "alpha_bar"), (right, "log-SNR")):
        axes.set(title=title, xlabel="t / T")
        axes.grid(alpha=0.3)
    right.set_ylim(-15, 15)
    figure.legend(*middle.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return _render(figure)


def bound_curves(links: Tensor, mse: Tensor, log_snr: Tensor) -> Image.Image:
    """The bound's terms (T,) over t, as in Nichol & Dhariwal 2021, fig. 2, and the error of eps over log-SNR (T,)."""
    figure, (left, right) = _figure(10.0, 4.0, columns=2)
    seen = ~links.isnan()
    t = torch.arange(len(links))[seen] + 1
    marker = "" if seen.all() else "."
    terms = links[seen]
    left.loglog(t, torch.where(terms > 0, terms, math.nan), linewidth=1.2, marker=marker)
    if (terms < 0).any():  # the decoder's where the data have a density
        left.loglog(t[terms < 0], -terms[terms < 0], "v", color="C3", markersize=4, label="less than 0: its size")
        left.legend(fontsize=8)
    left.set(title="terms of the bound", xlabel="t", ylabel="bits/dim")
    left.set_ylim(bottom=1e-7 * float(terms.abs().max().clamp(min=1e-5)))
    right.semilogy(log_snr[seen], mse[seen], linewidth=1.2, marker=marker)
    right.set(title="squared error of eps", xlabel="log-SNR")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return _render(figure)


def sampler_errors(results: Mapping[str, tuple[list[int], list[float], list[float]]], chance: float) -> Image.Image:
    """Errors over network evaluations: (evaluations, distance to the flow if any, distance of the moments) by name."""
    figure, (left, right) = _figure(11.0, 4.4, columns=2)
    for k, (name, (evaluations, flow, moments)) in enumerate(results.items()):
        style = {"label": name, "color": f"C{k}", "marker": "o", "markersize": 3, "linewidth": 1.3}
        if flow:
            left.loglog(evaluations, flow, **style)
        right.loglog(evaluations, moments, **style)
    right.axhline(chance, color="0.6", linestyle="--", linewidth=1, label="chance")
    left.set(title="distance to the exact flow", xlabel="network evaluations")
    right.set(title="distance of mean and covariance", xlabel="network evaluations")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    return _render(figure)


def quality_against_cost(
    titles: Sequence[str], curves: Mapping[str, Sequence[tuple[int, Sequence[Interval]]]], floor: Sequence[Interval]
) -> Image.Image:
    """A panel for each of the titled metrics: its figures over network calls for a sample, a line for each sampler.

    `curves` has for each name the calls, and the figure of each metric; so has `floor`, what real data come to.
    """
    figure, panels = _figure(5.4 * len(titles), 4.2, columns=len(titles))
    for place, (axes, title) in enumerate(zip(np.atleast_1d(panels), titles, strict=True)):
        for name, points in curves.items():
            calls, found = zip(*sorted((calls, tuple(figures[place])) for calls, figures in points), strict=True)
            value, low, high = np.array(found).T
            # A bootstrap interval may leave the value out.
            error = np.maximum(0, [value - low, high - value])
            axes.errorbar(calls, value, error, label=name, marker="o", markersize=4, linewidth=1.3, capsize=2)
        value, low, high = floor[place]
        axes.axhline(value, color="0.5", linestyle="--", linewidth=1, label="real data (floor)")
        axes.axhspan(low, high, color="0.5", alpha=0.12, linewidth=0)
        ticks = sorted({calls for points in curves.values() for calls, _ in points})
        axes.set(title=title, xlabel="network calls for a sample", xscale="log")
        axes.set_xticks(ticks, map(str, ticks))
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    np.atleast_1d(panels)[-1].legend(fontsize=8)
    return _render(figure)


def alignment_against_diversity(
    curves: Mapping[str, Sequence[tuple[float, Interval, Interval]]], detector: float
) -> Image.Image:
    """The share of samples that show all that they were asked to, over how much they vary, a line for each group.

    `curves` has for each name the scales of guidance with the figures of diversity and of the share; `detector` is the
    share of real images that are seen as what they are.
    """
    figure, axes = _figure(6.4, 4.6)
    for k, (name, points) in enumerate(curves.items()):
        scales, *found = zip(*points, strict=True)
        x, y = (np.array(figures).T for figures in found)
        # A bootstrap interval may leave the value out.
        errors = [np.maximum(0, [value - low, high - value]) for value, low, high in (x, y)]
        style = {"marker": "o", "markersize": 4, "linewidth": 1.3, "capsize": 2, "elinewidth": 0.8}
        axes.errorbar(x[0], y[0], errors[1], errors[0], label=name, color=f"C{k}", **style)
        for scale, *place in zip(scales, x[0], y[0], strict=True):
            axes.annotate(f"{scale:g}", place, (5, 5), textcoords="offset points", fontsize=8, color=f"C{k}")
    axes.axhline(detector, color="0.5", linestyle="--", linewidth=1, label="real images, as they are judged")
    axes.axvline(1, color="0.8", linewidth=1, zorder=0)
    axes.set(xlabel="diversity of one prompt's samples (real images: 1)", ylabel="share that shows all it was asked to")
    axes.set(title="alignment against diversity, by scale of guidance", ylim=(-0.03, 1.05))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _render(figure)


def class_shares(names: Sequence[str], shares: Mapping[str, Tensor]) -> Image.Image:
    """How often each class is seen: for each label the shares (K,) of the named classes, as bars side by side."""
    figure, axes = _figure(max(6.0, 0.16 * len(names) * (len(shares) + 1)), 3.6)
    width = 0.8 / len(shares)
    for k, (label, share) in enumerate(shares.items()):
        place = np.arange(len(names)) + (k - (len(shares) - 1) / 2) * width
        axes.bar(place, 100 * share, width, label=label, color="0.7" if k == 0 else f"C{k - 1}")
    axes.set(ylabel="% of samples", xticks=np.arange(len(names)))
    axes.set_xticklabels(names, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.legend(fontsize=8)
    return _render(figure)


def extent_of(points: Tensor, alike: bool = True) -> Extent:
    """Where nearly all points (N, D >= 2) lie in the first two features.

    For points about 0 that are about as far spread to either side, a square about 0, if the axes are to be `alike`.
    """
    seen = points[points.isfinite().all(1), :2].float()
    if not len(seen):
        return (-1.0, 1.0), (-1.0, 1.0)
    bound = 1.15 * float(seen.abs().quantile(0.999))
    low, high = seen.quantile(torch.tensor([0.001, 0.999], device=seen.device), dim=0)
    if alike and float((high - low).min()) > bound / 2:
        return (-bound, bound), (-bound, bound)
    room = torch.where(high > low, 0.08 * (high - low), 1)
    (left, bottom), (right, top) = (low - room).tolist(), (high + room).tolist()
    return (left, right), (bottom, top)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, figure.subplots(rows, columns)


def _render(figure: "Figure") -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def evenly(length: int, count: int) -> list[int]:
    """Up to `count` indices spread over 0..length - 1, both ends among them."""
    return sorted({round(i) for i in np.linspace(0, length - 1, min(count, length))})
