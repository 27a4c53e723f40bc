"""What a comparison says, as Markdown, CSV and plain values."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from src.comparison.statistics import (
    Group,
    Ranking,
    Record,
    chance,
    common_settings,
    headline,
    interval,
    number,
    sentence,
    text,
    with_spread,
)
from src.viz.tables import table

TITLES = {
    "fid": "FID",
    "kid": "KID",
    "fd": "Fréchet distance",
    "kd": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "class_score": "class score",
    "class_variation": "error of class shares",
    "inception_score": "inception score",
    "nearest_ratio": "distance to training data",
    "copies": "copies",
    "sliced_wasserstein": "sliced Wasserstein distance",
    "energy_distance": "energy distance",
    "mmd": "MMD",
}
COSTS = {
    "seconds": "training, s",
    "steps": "steps",
    "parameters": "parameters",
    "calls_per_image": "network calls per sample",
    "seconds_per_image": "drawing, s per sample",
}
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Steps and values of what was logged, by its name."""


@dataclass(frozen=True)
class Seen:
    """What is shown of one run beside its figures."""

    samples: Tensor
    """The first, from the same noise in all runs: uint8 (N, C, H, W), or points (N, D)."""
    error: np.ndarray
    """Mean squared error of eps in each bin of `SPECTRUM`; NaN where none was seen."""
    curves: Series


@dataclass(frozen=True)
class Report:
    """All that a comparison says."""

    title: str
    groups: Sequence[Group]
    implied: Mapping[str, Sequence[Any]]
    """Settings that came along with those that name the groups: a value for each group."""
    rankings: Sequence[Ranking]
    floors: Mapping[str, tuple[float, float, float]]
    """What real data come to, by metrics, with its interval."""
    seen: Sequence[Sequence[Seen]]
    """Of each run of each group."""
    real: Tensor
    """Held-out data as samples are shown."""
    notes: Sequence[str]
    """What was left out, and why."""
    how: Mapping[str, str]


def title_of(metric: str) -> str:
    """A metric in words: `fd_classifier_1k` is the Fréchet distance (classifier, 1k)."""
    if metric == "bits_per_dim":
        return "bits/dim"
    for start, words in TITLES.items():
        if metric == start or metric.startswith(f"{start}_"):
            rest = metric.removeprefix(start).strip("_").replace("_", ", ")
            return f"{words} ({rest})" if rest else words
    return metric


def as_json(report: Report) -> dict[str, Any]:
    """Everything as plain values."""
    return {
        "headline": headline(report.groups, report.rankings, title_of),
        "groups": group_rows(report),
        "runs": run_rows(report),
        "metrics": {
            r.metric: {
                "better": r.direction,
                "best": None if r.best is None else report.groups[r.best].label,
                "not_ranked": r.reason,
                "floor": report.floors.get(r.metric),
                "pairs_with_best": [pair_row(report, pair) for pair in r.pairs_with_best],
                "pairs": [pair_row(report, pair) for pair in r.pairs],
            }
            for r in report.rankings
        },
        "came_along": {name: list(map(text, values)) for name, values in report.implied.items()},
        "in_common": {name: text(value) for name, value in common_settings(report.groups).items()},
        "left_out": list(report.notes),
        "how": dict(report.how),
    }


def pair_row(report: Report, pair: Any) -> dict[str, Any]:
    """A pair of groups by their labels."""
    return {
        **pair._asdict(),
        "first": report.groups[pair.first].label,
        "second": report.groups[pair.second].label,
        "verdict": pair.verdict,
    }


def run_rows(report: Report) -> list[dict[str, Any]]:
    """A row for each run: its group's settings, seed, every figure with its interval, costs."""
    return [
        {
            "run": record.name,
            **{name: text(value) for name, value in group.settings.items()},
            "seed": record.seed,
            **_with_intervals(record),
            **record.costs,
        }
        for group in report.groups
        for record in group.records
    ]


def _with_intervals(record: Record) -> dict[str, float]:
    cells: dict[str, float] = {}
    for name, value in record.values.items():
        cells[name] = value
        if name in record.intervals:
            cells[f"{name} low"], cells[f"{name} high"] = record.intervals[name]
    return cells


def group_rows(report: Report) -> list[dict[str, Any]]:
    """A row for each group: mean, deviation and number of seeds of every metric, and the verdict against the best."""
    rows = []
    for k, group in enumerate(report.groups):
        row: dict[str, Any] = {"group": group.label, **{n: text(v) for n, v in group.settings.items()}}
        for ranking in report.rankings:
            name, each = ranking.metric, ranking.summaries[k]
            if each is None:
                continue
            row |= {name: each.mean, f"{name} deviation": each.std, f"{name} seeds": each.n}
            if verdict := ranking.verdict(k):
                row[f"{name} verdict"] = verdict
        rows.append(row)
    return rows


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows that may lack some columns; what is not known is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})


def mark(ranking: Ranking, group: int) -> str:
    """The verdict on a group as one sign: ★ the best, ≈ not told apart from it, ? one seed only."""
    signs = {"best": "★", "not significant": "≈", "single seed": "?"}
    return signs.get(ranking.verdict(group) or "", "")


LEGEND = (
    "Mean ± standard deviation over seeds. ★ best; ≈ not told apart from the best by so few seeds; ? one seed only, so "
    "it cannot be told; without a mark, really worse than the best (Welch's t-test, Holm's correction over the pairs "
    "with the best, 5%), or not ranked."
)


def shown_metrics(report: Report) -> list[Ranking]:
    """Those that are ranked first."""
    return sorted(report.rankings, key=lambda ranking: ranking.best is None)


def columns_of(report: Report) -> list[str]:
    """The settings that name the groups."""
    return list(report.groups[0].settings)


def arrow(ranking: Ranking) -> str:
    """Which side is better."""
    return {"lower": " ↓", "higher": " ↑"}.get(ranking.direction or "", "") if ranking.best is not None else ""


def order_of(report: Report) -> list[int]:
    """Groups from the best to the worst by the main metric; as they came if none is ranked."""
    main = next((r for r in report.rankings if r.best is not None), None)
    places = list(range(len(report.groups)))
    if main is None:
        return places
    sign = 1 if main.direction == "lower" else -1
    summaries = main.summaries
    return sorted(places, key=lambda k: math.inf if (s := summaries[k]) is None else sign * s.mean)


def markdown(report: Report) -> str:
    """The headline and the tables."""
    lines = [f"# {report.title}", "", f"**{headline(report.groups, report.rankings, title_of)}**", ""]
    shown = shown_metrics(report)
    header = [*columns_of(report), "seeds", *(title_of(r.metric) + arrow(r) for r in shown)]
    rows = []
    for k in order_of(report):
        group = report.groups[k]
        figures = [f"{with_spread(r.summaries[k])} {mark(r, k)}".rstrip() for r in shown]
        rows.append([*map(text, group.settings.values()), str(len(group.records)), *figures])
    if report.floors:
        floors = [number(report.floors[r.metric][0]) if r.metric in report.floors else "" for r in shown]
        rows.append(["*real data (floor)*", *[""] * (len(header) - 1 - len(shown)), *floors])
    lines += [table(header, rows), "", LEGEND, ""]
    lines += ["## By each metric", ""]
    lines += [f"- {sentence(report.groups, r, title_of)}" for r in shown]
    lines += ["", "## Against the best", ""]
    labels = [group.label for group in report.groups]
    rows = [
        [title_of(r.metric), labels[p.first], labels[p.second], interval(p), chance(p.adjusted), p.verdict]
        for r in shown
        for p in r.pairs_with_best
    ]
    lines += [table(["metric", "best", "other", "difference [95%]", "p (Holm)", "verdict"], rows)]
    lines += ["", "## Cost", "", table(*cost_table(report)), ""]
    if report.notes:
        lines += ["## Left out", "", *(f"- {note}" for note in report.notes), ""]
    lines += ["## How it was measured", "", *(f"- {name}: {value}" for name, value in report.how.items()), ""]
    return "\n".join(lines)


def cost_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what each group cost, means over its runs."""
    known = [name for name in COSTS if any(name in r.costs for g in report.groups for r in g.records)]
    rows = []
    for k in order_of(report):
        group = report.groups[k]
        cells = []
        for name in known:
            values = [r.costs[name] for r in group.records if name in r.costs]
            mean = sum(values) / len(values) if values else math.nan
            cells.append(f"{mean:,.0f}" if mean >= 1000 else number(mean))
        rows.append([group.label, *cells])
    return ["", *(COSTS[name] for name in known)], rows
