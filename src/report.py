"""A comparison as a page that needs nothing else, and as Markdown, CSV, JSON and PNG."""

import base64
import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from src import plots
from src.comparison import (
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
from src.evaluation import SPECTRUM
from src.tables import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = Path(__file__).with_suffix(".html")
COLORS = (
    *("#3b7dd8", "#e07b39", "#3a9e5c", "#c94f4f", "#8a63d2", "#9a6b4f", "#d667a8", "#7d8590", "#a9a51f", "#2aa7b8"),
    *("#8fb8f0", "#f2b98a", "#8fd0a5", "#eb9c9c", "#c3aef0", "#c9a88f", "#f0b0d6", "#b7bdc5", "#d8d67c", "#86d5df"),
)
"""Of groups, in their order: legible on white and on black."""
LINES = ("-", "--", ":")
DARK: dict[Any, Any] = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), "#171a1f"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), "#d9dde3"),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "legend.edgecolor"), "#5b626c"),
}
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


def write(folder: Path, report: Report) -> Path:
    """All files into `folder`; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = pictures(report)
    for name, (light, _) in drawn.items():
        (folder / f"{name}.png").write_bytes(light)
    rows = run_rows(report)
    write_csv(folder / "runs.csv", rows)
    write_csv(folder / "groups.csv", group_rows(report))
    (folder / "comparison.md").write_text(markdown(report))
    page = folder / "comparison.html"
    page.write_text(html(report, drawn))
    return page


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
                "not_ranked": r.why,
                "floor": report.floors.get(r.metric),
                "against_best": [pair_row(report, pair) for pair in r.against_best],
                "each_against_each": [pair_row(report, pair) for pair in r.pairs],
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
            row |= {name: each.mean, f"{name} deviation": each.deviation, f"{name} seeds": each.n}
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
    signs = {"best": "★", "not told apart by so few seeds": "≈", "one seed only: cannot be told": "?"}
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
        for p in r.against_best
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


def html(report: Report, drawn: Mapping[str, tuple[bytes, bytes]]) -> str:
    """The page, with all that it shows inside it."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "text": text,
        "chance": chance,
        "interval": interval,
        "spread": with_spread,
        "number": number,
        "title": title_of,
        "uri": lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}",
    }
    shown = shown_metrics(report)
    costs_header, costs = cost_table(report)
    strips = [_strip(report, k) for k in range(len(report.groups))]
    return environment.from_string(TEMPLATE.read_text()).render(
        report=report,
        headline=headline(report.groups, report.rankings, title_of),
        sentences=[sentence(report.groups, r, title_of) for r in shown if r.best is not None][1:],
        not_ranked=[sentence(report.groups, r, title_of) for r in shown if r.best is None],
        shown=shown,
        order=order_of(report),
        columns=columns_of(report),
        colors=[COLORS[k % len(COLORS)] for k in range(len(report.groups))],
        mark=mark,
        arrow=arrow,
        legend=LEGEND,
        drawn=drawn,
        dots=[(r, drawn[f"metric_{file_name(r.metric)}"]) for r in shown if f"metric_{file_name(r.metric)}" in drawn],
        strips=[(strip is not None and strip) or b"" for strip in strips],
        real=_strip(report, None) or b"",
        costs_header=costs_header,
        costs=costs,
        common=common_settings(report.groups),
        matrix=matrix,
    )


def matrix(report: Report, ranking: Ranking) -> list[list[dict[str, str] | None]]:
    """Each group against each, in the page's order: the row's mean minus the column's, and what it means."""
    order = order_of(report)
    cells: dict[tuple[int, int], dict[str, str]] = {}
    for pair in ranking.pairs:
        for a, b, sign in ((pair.first, pair.second, 1), (pair.second, pair.first, -1)):
            difference = sign * pair.difference
            better = (difference < 0) == (ranking.direction == "lower")
            kind = ("better" if better else "worse") if pair.verdict == "real" else "same"
            whom = f"{report.groups[a].label} minus {report.groups[b].label}"
            low, high = sorted((sign * pair.low, sign * pair.high))
            words = f"{whom}: {interval(pair._replace(difference=difference, low=low, high=high))}, "
            words += f"{chance(pair.adjusted)}, {pair.verdict}"
            cells[a, b] = {"kind": kind, "value": f"{difference:+.2g}", "words": words}
    return [[cells.get((a, b)) for b in order] for a in order]


def file_name(metric: str) -> str:
    """A metric's name as part of a file's."""
    return metric.replace("/", "_")


def pictures(report: Report) -> dict[str, tuple[bytes, bytes]]:
    """Every plot as PNG by its name, for light pages and for dark ones."""
    drawn = {}
    for ranking in shown_metrics(report):
        if len({x for group in report.groups for x in group.values(ranking.metric)}) > 1:
            height = 0.9 + 0.26 * len(report.groups)
            paint = _dots(report, ranking)
            drawn[f"metric_{file_name(ranking.metric)}"] = both(paint, 5.2, height)
    if any(np.isfinite(seen.error).any() for runs in report.seen for seen in runs):
        drawn["loss_over_log_snr"] = both(_spectra(report, relative=False), 5.2, 4.0, _legend(report))
        if len(report.groups) > 1:
            drawn["loss_over_log_snr_relative"] = both(_spectra(report, relative=True), 5.2, 4.0, _legend(report))
    for name, smooth in (("train/loss", True), ("val/loss", False)):
        if any(name in seen.curves for runs in report.seen for seen in runs):
            drawn[f"training_{file_name(name)}"] = both(_training(report, name, smooth), 5.2, 4.0, _legend(report))
    if (samples := _samples(report)) is not None:
        drawn["samples"] = (samples, samples)
    return drawn


def both(paint: "Callable[[Axes], None]", width: float, height: float, entries: int = 0) -> tuple[bytes, bytes]:
    """One plot as PNG on white and on black; `entries` of a legend stand below it."""
    import matplotlib
    from matplotlib.figure import Figure

    made = []
    columns = 2 if entries <= 4 else 3
    height += 0.2 * math.ceil(entries / columns)
    for style in ({}, DARK):
        with matplotlib.rc_context({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, **style}):
            figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
            axes = figure.subplots()
            paint(axes)
            if entries:
                handles, labels = axes.get_legend_handles_labels()
                figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", metadata={"Software": None})
        picture = Image.open(buffer).convert("RGB").quantize(192)
        small = io.BytesIO()
        picture.save(small, "PNG", optimize=True)
        made.append(small.getvalue())
    return made[0], made[1]


def _legend(report: Report) -> int:
    return len(report.groups)


def _style(k: int) -> dict[str, Any]:
    return {"color": COLORS[k % len(COLORS)], "linestyle": LINES[k // len(COLORS) % len(LINES)]}


def _dots(report: Report, ranking: Ranking) -> "Callable[[Axes], None]":
    """A row for each group: a dot for each seed, a bar at their mean, whiskers where one seed has an interval."""

    def paint(axes: "Axes") -> None:
        order = order_of(report)
        for place, k in enumerate(order):
            group, color = report.groups[k], COLORS[k % len(COLORS)]
            values = group.values(ranking.metric)
            axes.plot(values, [place] * len(values), "o", color=color, markersize=5, alpha=0.75, markeredgewidth=0)
            if values:
                mean = sum(values) / len(values)
                axes.plot([mean, mean], [place - 0.32, place + 0.32], "-", color=color, linewidth=2.2)
            if len(values) == 1 and (ends := group.records[0].intervals.get(ranking.metric)):
                axes.plot(ends, [place, place], "-", color=color, linewidth=1.0)
        if floor := report.floors.get(ranking.metric):
            axes.axvline(floor[0], color="0.5", linestyle="--", linewidth=1.2)
            axes.annotate(
                "real data", (floor[0], 1.0), xycoords=("data", "axes fraction"), xytext=(3, 2),
                textcoords="offset points", color="0.5", fontsize=8, ha="left", va="bottom",
            )  # fmt: skip
        axes.set_yticks(range(len(order)), [report.groups[k].label for k in order])
        axes.set_ylim(len(order) - 0.5, -0.5)
        better = f", {ranking.direction} is better" if ranking.best is not None else ""
        axes.set_xlabel(f"{title_of(ranking.metric)}{better}")
        axes.grid(alpha=0.35, axis="x", linewidth=0.6)

    return paint


def _spectra(report: Report, relative: bool) -> "Callable[[Axes], None]":
    """The error of eps over log-SNR, a line for each group and a band from its least to its greatest seed."""
    centres = ((SPECTRUM[:-1] + SPECTRUM[1:]) / 2).numpy()
    errors = [np.stack([seen.error for seen in runs]) for runs in report.seen]

    def paint(axes: "Axes") -> None:
        with np.errstate(all="ignore"):
            means = np.stack([_nan(np.mean, each) for each in errors])
            usual = np.exp(_nan(np.mean, np.log(means))) if relative else np.ones(len(centres))
            # Where few groups have been, the mean over groups is another one.
            there = np.isfinite(means).all(0) if relative else np.ones(len(centres), bool)
            for k, each in enumerate(errors):
                line = np.where(there, means[k] / usual, np.nan)
                style = {"linewidth": 1.4, "marker": ".", "markersize": 3, **_style(k)}  # a bin may stand alone
                axes.plot(centres, line, label=report.groups[k].label, **style)
                low, high = (np.where(there, _nan(end, each) / usual, np.nan) for end in (np.min, np.max))
                axes.fill_between(centres, low, high, color=COLORS[k % len(COLORS)], alpha=0.18, linewidth=0)
        axes.set(
            xlabel="log-SNR: noise on the left, clean data on the right",
            ylabel="error over the groups' geometric mean" if relative else "mean squared error of ε",
        )
        axes.grid(alpha=0.35, linewidth=0.6)
        _scale(axes)
        if relative:
            axes.axhline(1, color="0.5", linewidth=0.8)

    return paint


def _nan(of: Callable[..., Any], values: np.ndarray) -> np.ndarray:
    """`of` over the first axis, without what is not finite; NaN where nothing is left."""
    masked = np.ma.masked_invalid(values)
    result: np.ndarray = np.ma.filled(of(masked, axis=0).astype(float), np.nan)
    return result


def _scale(axes: "Axes") -> None:
    """A logarithmic axis where the lines span it, with numbers as people write them."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) and drawn.min() > 0 and drawn.max() > 3 * drawn.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain)
        if drawn.max() < 100 * drawn.min():
            axes.yaxis.set_minor_formatter(_plain)


def _plain(value: float, _: float) -> str:
    """On a logarithmic axis: 0.1, 0.2, 0.5, 1, 2, 5, and nothing between them."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""


def _training(report: Report, name: str, smooth: bool) -> "Callable[[Axes], None]":
    """What was logged over the steps: a line for each group, the mean over its seeds where all have logged."""

    def paint(axes: "Axes") -> None:
        for k, runs in enumerate(report.seen):
            logged = [dict(zip(*seen.curves[name], strict=True)) for seen in runs if name in seen.curves]
            if not logged:
                continue
            steps = sorted(set.intersection(*(set(each) for each in logged)))
            values = np.array([[each[step] for step in steps] for each in logged])
            line = _nan(np.mean, values)
            if smooth:
                line = smoothed(line, max(1, len(steps) // 40))
            marker = "o" if len(steps) < 15 else ""
            axes.plot(
                steps, line, label=report.groups[k].label, linewidth=1.4, marker=marker, markersize=3, **_style(k)
            )
            if not smooth and len(logged) > 1:
                low, high = _nan(np.min, values), _nan(np.max, values)
                axes.fill_between(steps, low, high, color=COLORS[k % len(COLORS)], alpha=0.18, linewidth=0)
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.35, linewidth=0.6, which="both")
        _scale(axes)

    return paint


def smoothed(values: np.ndarray, reach: int) -> np.ndarray:
    """Each value's mean with those up to `reach` places before and after it."""
    return np.array([np.nanmean(values[max(0, k - reach) : k + reach + 1]) for k in range(len(values))])


def _strip(report: Report, group: int | None) -> bytes | None:
    """The samples of a group's first seed, or real data, as one picture: images in a row, points scattered."""
    samples = report.real if group is None else report.seen[group][0].samples
    if not len(samples):
        return None
    if samples.ndim == 4:
        picture = plots.grid(samples[:16], columns=len(samples[:16]), cell=32)
    else:
        picture = plots.scatter(samples, extent=_extent(report), size=2.6)
    return png(picture)


def _samples(report: Report) -> bytes | None:
    """All groups' samples with their names, as one picture."""
    rows = {group.label: runs[0].samples for group, runs in zip(report.groups, report.seen, strict=True)}
    rows["real, held out"] = report.real
    if not all(len(row) for row in rows.values()):
        return None
    if report.real.ndim == 4:
        count = min(16, *(len(row) for row in rows.values()))
        return png(plots.labelled_rows([row[:count] for row in rows.values()], list(rows)))
    extent = _extent(report)
    clouds = [plots.captioned(plots.scatter(row, extent=extent, size=2.6), name) for name, row in rows.items()]
    return png(plots.side_by_side(clouds, gap=8))


def _extent(report: Report) -> plots.Extent | None:
    """So that all clouds of points are seen at one scale; None for histograms of numbers."""
    return plots.extent_of(report.real) if report.real.ndim == 2 and report.real.shape[1] > 1 else None


def png(picture: Image.Image) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
