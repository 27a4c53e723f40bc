"""Line plots: curves over training steps, noise levels, and the cost of sampling."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from src.viz.figures import (
    COLORS,
    Interval,
    error_bars,
    evenly_spaced_indices,
    new_figure,
    render_figure,
    series_style,
    set_log_scale,
    set_log_ticks,
)
from src.viz.tables import better_direction, metric_title

LOWER_IS_BETTER = "(lower is better)"


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
    figure, panels = new_figure(7.0, 2.0 * len(series) + 1.0, rows=len(series), shared_x=True)
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
    import pandas as pd
    from matplotlib.colors import LogNorm

    last = pd.read_csv(log).drop_duplicates(["step", "log_snr"], keep="last")
    losses = last.pivot(index="log_snr", columns="step", values="loss")
    steps, log_snr = losses.columns.to_list(), losses.index.to_list()
    table = losses.where(losses > 0).to_numpy()  # the decoder's term is negative where the data have a density
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
