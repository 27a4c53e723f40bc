"""Matplotlib figures: panels, line styles, and readable axes."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from src.viz.fonts import default_font, font_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Palette of Okabe and Ito 2008 for color-blind readers, without yellow, which is too light for lines."""
LINE_STYLES, MARKERS = ("-", "--", ":"), ("o", "s", "^")
Interval = tuple[float, float, float]
"""A value and its confidence limits (value, low, high), such as a `metrics.confidence.Metric`."""


def series_style(k: int) -> dict[str, Any]:
    """Return color, line style and marker for series k; the first 21 differ from each other."""
    cycle = k // len(COLORS) % len(LINE_STYLES)
    return {"color": COLORS[k % len(COLORS)], "linestyle": LINE_STYLES[cycle], "marker": MARKERS[cycle]}


def evenly_spaced_indices(length: int, count: int) -> list[int]:
    """Return up to `count` indices spread over 0..length - 1, including both ends."""
    return sorted({round(i) for i in np.linspace(0, length - 1, min(count, length))})


def error_bars(intervals: np.ndarray) -> np.ndarray:
    """Return lengths (2, N) of error bars for (value, low, high) rows; a bootstrap interval may exclude its value."""
    value, low, high = intervals.T
    return np.maximum(0, [value - low, high - value])


def histogram_bins(values: np.ndarray, count: int = 40) -> np.ndarray:
    """Return edges of bins that hold all finite values, wide enough to be different numbers."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    if high - low < 4 * count * np.spacing(max(abs(low), abs(high))):
        margin = max(0.5, 4 * count * float(np.spacing(max(abs(low), abs(high)))))
        low, high = low - margin, high + margin
    return np.linspace(low, high, count + 1)


def set_log_scale(axes: "Axes", names: str) -> None:
    """Make each of the axes `names` (x, y or xy) logarithmic if its positive data span a factor of 5 or more."""
    for name in names:
        axis = axes.xaxis if name == "x" else axes.yaxis
        low, high = axis.get_data_interval()
        low = max(low, axis.get_minpos())
        if 0 < low < math.inf and high >= 5 * low:
            axes.set(**{f"{name}scale": "log"})
            set_log_ticks(axis, low, high)


def set_log_ticks(axis: Any, low: float, high: float) -> None:
    """Label powers of ten in plain numbers; over less than two decades, label 2 and 5 times these powers too."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    decades = math.log10(high / low)
    # Below 0.7 decades a single tick might remain.
    subs = range(1, 10) if decades < 0.7 else (1, 2, 5) if decades < 2 else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, shared_x: bool = False, grid: bool = True
) -> tuple["Figure", Any]:
    """Return a figure of this size in inches, and its panels, an array (rows, columns) of axes."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"axes.formatter.useoffset": False, "axes.formatter.limits": (-4, 7)}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": grid, "grid.alpha": 0.3}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, sharex=shared_x)


def render_figure(figure: "Figure") -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    _set_fonts(figure)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _set_fonts(figure: "Figure") -> None:
    """Draw every text by a font that has its characters (`font_for`), and dollar signs not as mathematics."""
    from matplotlib.text import Text

    def drawable(text: str) -> str:
        return "\n".join(font_for(line)[1] for line in text.split("\n"))

    for axis in [each for axes in figure.axes for each in (axes.xaxis, axes.yaxis)]:
        texts = [label.get_text() for label in axis.get_ticklabels()]
        if (drawn := [*map(drawable, texts)]) != texts:
            axis.set_ticks(axis.get_ticklocs(), drawn)
    for label in figure.findobj(Text):
        assert isinstance(label, Text)
        text = drawable(label.get_text())
        path, _ = font_for(text.replace("\n", " "))
        label.set_parse_math(False)
        if path != default_font() or text != label.get_text():
            font = label.get_fontproperties().copy()
            font.set_file(path)
            label.set(text=text, fontproperties=font)
