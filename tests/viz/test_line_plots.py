"""Charts: distinguishable series, readable ticks, shared axes, and captions."""

import csv
import math

import numpy as np
import pytest
import torch

from src.viz import distributions, figures, images, line_plots

INTERVAL = (0.5, 0.4, 0.6)


@pytest.fixture
def drawn(monkeypatch):
    """Collect the figures that are rendered."""
    collected = []
    render = figures.render_figure
    for module in (line_plots, distributions):
        monkeypatch.setattr(module, "render_figure", lambda figure: collected.append(figure) or render(figure))
    return collected


def test_first_21_series_differ():
    styles = {tuple(figures.series_style(k).values()) for k in range(21)}
    assert len(styles) == 21


@pytest.mark.parametrize(
    ("low", "high", "scale", "labels"),
    [
        (1.0, 4.0, "linear", None),
        (0.3, 6.0, "log", ["0.5", "1", "2", "5"]),
        (1e-5, 10.0, "log", ["1e-05", "0.0001", "0.001", "0.01", "0.1", "1", "10"]),
    ],
)
def test_log_axes_have_plain_labels(low, high, scale, labels):
    figure, ((axes,),) = figures.new_figure(4, 3)
    axes.plot([0, 1], [low, high])
    figures.set_log_scale(axes, "y")
    figures.render_figure(figure)
    assert axes.get_yscale() == scale
    bottom, top = axes.get_ylim()
    inside = [t.get_text() for t in axes.get_yticklabels() if bottom <= t.get_position()[1] <= top]
    assert labels is None or inside == labels


def test_linear_axes_have_no_offsets():
    figure, ((axes,),) = figures.new_figure(4, 3)
    axes.plot([0, 1], [1.00104, 1.00106])
    figures.render_figure(figure)
    assert not axes.yaxis.get_offset_text().get_text()


def test_training_curves_share_their_steps(tmp_path, drawn):
    log = tmp_path / "metrics.csv"
    with log.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "train/loss", "val/loss"])
        writer.writeheader()
        writer.writerows({"step": k, "train/loss": 1 / (k + 1)} for k in range(20))
        writer.writerow({"step": 19, "val/loss": 0.1})
    assert line_plots.loss_curves([log]) is not None
    first, second = drawn[0].axes
    assert first.get_xlim() == second.get_xlim() and first.get_title()
    assert line_plots.loss_curves([]) is None


def test_charts_have_titles_and_labels(drawn):
    t = torch.linspace(0.01, 0.99, 50)
    line_plots.schedule_curves({f"s{k}": (t, (1 - t).sqrt(), t.sqrt()) for k in range(14)})
    line_plots.bound_curves(torch.tensor([-0.1, math.nan, *[0.01] * 48]), t, torch.linspace(9, -9, 50))
    line_plots.sampler_errors(
        {"ddim": ([5, 50], [0.1, 0.01], [0.2, 0.02]), "ancestral": ([5, 50], [], [0.3, 0.1])}, 0.01
    )
    line_plots.alignment_against_diversity({"all": [(1.0, INTERVAL, INTERVAL)]}, 0.9)
    distributions.class_frequencies(["0", "1"], {"real data": [INTERVAL] * 2, "ddim 5": [INTERVAL] * 2})
    for figure in drawn:
        for axes in figure.axes:
            assert axes.get_title() and axes.get_xlabel() and axes.get_ylabel()
    assert len(drawn[-1].axes[0].containers) == 4  # bars and error bars of both labels


def test_quality_chart_tells_direction(drawn):
    curves = {"ddim": [(5, [INTERVAL, INTERVAL]), (50, [INTERVAL, INTERVAL])]}
    line_plots.quality_against_cost(["fd_pixels_1k", "recall_pixels_1k"], curves, [INTERVAL, INTERVAL])
    left, right = (axes.get_ylabel() for axes in drawn[0].axes)
    assert "lower is better" in left and "higher is better" in right


def test_error_bars_are_never_negative():
    assert (figures.error_bars(np.array([[1.0, 1.1, 1.2], [1.0, 0.5, 0.9]])) >= 0).all()


@pytest.mark.parametrize("frame", [torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.randn(50, 2)])
def test_trajectory_captions_add_height_only(frame):
    frames = [frame] * 3
    plain, captioned = images.draw_trajectory(frames), images.draw_trajectory(frames, ["1", "0.5", "0"])
    assert captioned.width == plain.width and captioned.height > plain.height


@pytest.mark.parametrize("num_classes", [2, 5, 10])
def test_grid_of_classes_is_nearly_square(num_classes):
    titles = [f"class {k % num_classes}" for k in range(64)]
    width, height = images.draw_samples(torch.zeros(64, 1, 8, 8, dtype=torch.uint8), titles=titles).size
    assert 0.5 < width / height < 2


def test_evenly_spaced_indices_include_both_ends():
    assert figures.evenly_spaced_indices(100, 5) == [0, 25, 50, 74, 99]
    assert figures.evenly_spaced_indices(3, 5) == [0, 1, 2]
