"""Plots of tables: the distribution of each column, and the associations between columns."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from src.viz.figures import COLORS, histogram_bins, new_figure, render_figure

MAX_COLUMNS = 40
"""Most columns in a picture."""
MAX_BARS = 12
"""Most categories of a column that are shown."""


def marginals(
    samples: Tensor, real: Tensor, names: Sequence[str], categories: Sequence[Sequence[str]], per_row: int = 4
) -> Image.Image:
    """Draw the distribution of each column of samples (N, K) and real data (M, K): histograms, bars for categories.

    `categories` holds the categories of a column of indices, and nothing for numbers.
    """
    count = min(len(names), MAX_COLUMNS)
    columns = min(per_row, count)
    rows = math.ceil(count / columns)
    figure, panels = new_figure(3.2 * columns, 2.4 * rows, rows, columns, grid=False)
    for k, axes in enumerate(panels.flat):
        if k >= count:
            axes.set_axis_off()
            continue
        x, y = (each[:, k].cpu().double().numpy() for each in (samples, real))
        if categories[k]:
            _bars(axes, x, y, categories[k])
        else:
            bins = histogram_bins(np.concatenate([x, y]), max(10, min(40, round(len(y) ** 0.5))))
            for values, color, label in ((y, "0.7", "real data"), (x, COLORS[0], "samples")):
                finite = values[np.isfinite(values)]
                axes.hist(finite, bins=bins, density=len(finite) > 0, color=color, alpha=0.7, label=label)
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
    for axes, (title, matrix) in zip(panels, matrices.items(), strict=True):
        shown = axes.imshow(matrix[:count, :count].cpu().numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        axes.set_title(title, fontsize=9)
        labels = [name[:18] for name in names[:count]]
        axes.set_xticks(range(count), labels, rotation=90, fontsize=7)
        axes.set_yticks(range(count), labels, fontsize=7)
    figure.colorbar(shown, ax=list(panels), shrink=0.7).ax.tick_params(labelsize=7)
    return render_figure(figure)


def _bars(axes: object, x: np.ndarray, y: np.ndarray, categories: Sequence[str]) -> None:
    """Draw the shares of the most frequent categories of real data y, and of samples x."""
    shares = [
        np.bincount(each[np.isfinite(each)].astype(int), minlength=len(categories)) / max(1, len(each))
        for each in (y, x)
    ]
    order = np.argsort(-shares[0], kind="stable")[:MAX_BARS]
    places = np.arange(len(order))
    for shift, share, color, label in ((-0.2, shares[0], "0.7", "real data"), (0.2, shares[1], COLORS[0], "samples")):
        axes.bar(places + shift, share[order], 0.4, color=color, label=label)  # type: ignore[attr-defined]
    labels = [categories[k][:10] for k in order]
    axes.set_xticks(places, labels, rotation=90 if len(order) > 4 else 0, fontsize=7)  # type: ignore[attr-defined]
