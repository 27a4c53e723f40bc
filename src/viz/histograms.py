"""Histograms of pixel values."""

import numpy as np
import numpy.typing as npt
from PIL import Image

from src.viz.figures import COLORS, new_figure, render_figure

MAX_CHANNELS = 6


def value_histogram(values: npt.NDArray[np.floating], limits: tuple[float, float]) -> Image.Image:
    """Draw the distribution of the values (C, M) of the first channels over the range `limits`."""
    figure, ((axes,),) = new_figure(7.0, 4.0)
    colors = ("#c33", "#393", "#36c") if len(values) == 3 else COLORS
    names = ("red", "green", "blue") if len(values) == 3 else [f"channel {k}" for k in range(len(values))]
    low, high = limits
    for k, channel in enumerate(values[:MAX_CHANNELS]):
        axes.hist(channel, bins=64, range=limits, histtype="step", color=colors[k], label=names[k], density=True)
    axes.set(xlim=(low, high), xlabel="pixel value", ylabel="density")
    if len(values) > 1:
        axes.legend()
    return render_figure(figure)
