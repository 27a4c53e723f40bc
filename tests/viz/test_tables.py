"""Number formats, metric titles and JSON."""

import json
import math

import pytest

from src.viz.tables import (
    better_direction,
    direction_arrow,
    format_number,
    markdown_table,
    metric_title,
    write_json,
)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (3.14159, 0.0123, "3.142"),
        (1234.5, 56.0, "1234"),
        (2.5, math.nan, "2.5"),
        (0.000123456, math.nan, "0.0001235"),
        (1234567.0, math.nan, "1,234,567"),
        (12345.6, 78.0, "12,346"),
        (-0.0001, 0.05, "0.000"),
        (math.nan, 0.1, "-"),
        (math.inf, math.nan, "inf"),
        (0.0, math.nan, "0"),
    ],
)
def test_numbers_have_the_digits_of_their_error(value, error, text):
    assert format_number(value, error) == text


@pytest.mark.parametrize(
    ("metric", "title", "direction"),
    [
        ("fd_classifier_1k", "Fréchet distance (classifier, 1k)", "lower"),
        ("fid_10k", "FID (10k)", "lower"),
        ("recall_pixels_1k", "recall (pixels, 1k)", "higher"),
        ("copies_pixels_1k", "copies (pixels, 1k)", None),
        ("bits_per_dim", "bits/dim", "lower"),
        ("val/loss", "val/loss", "lower"),
        ("parameters", "parameters", None),
    ],
)
def test_metrics_have_titles_and_directions(metric, title, direction):
    assert metric_title(metric) == title and better_direction(metric) == direction
    assert direction_arrow(metric) == {"lower": " ↓", "higher": " ↑", None: ""}[direction]


def test_markdown_tables_escape_pipes():
    assert markdown_table(["a", "b"], [["x|y", "1"]]).splitlines() == ["| a | b |", "| --- | --- |", "| x\\|y | 1 |"]


def test_json_has_null_for_non_finite_numbers(tmp_path):
    write_json(tmp_path / "m.json", {"a": math.nan, "b": [1.0, math.inf], "c": {"d": (2,)}})
    assert json.loads((tmp_path / "m.json").read_text()) == {"a": None, "b": [1.0, None], "c": {"d": [2]}}
