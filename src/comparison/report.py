"""Collect the results of a comparison, and return them as Markdown, CSV and JSON values."""

import csv
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from src.comparison.grouping import Group, common_settings, format_setting, group_by_settings
from src.comparison.measure import Measurements, baselines_of, with_metrics
from src.comparison.statistics import (
    Pair,
    Ranking,
    describe_ranking,
    format_difference,
    format_p_value,
    format_summary,
    headline,
    metrics_of,
    rank_groups,
)
from src.comparison.survey import SurveyedRun
from src.distributed.processes import Processes
from src.training.provenance import code_version, device_name
from src.viz.charts import read_logs
from src.viz.tables import direction_arrow, format_number, markdown_table, metric_title

COSTS = {
    "seconds": "training time (s)",
    "steps": "steps",
    "parameters": "parameters",
    "calls_per_image": "network calls per sample",
    "seconds_per_image": "sampling time (s per sample)",
}
LEGEND = (
    "Mean ± standard deviation over seeds; ↓ lower is better, ↑ higher. ★ best; ≈ no significant difference from the "
    "best; ? one seed only, so no test; no mark: significantly worse than the best (Welch's t-test at 5%, Holm's "
    "correction over the pairs with the best), or not ranked."
)


@dataclass(frozen=True)
class RunData:
    """Samples and curves of one run."""

    samples: Tensor  # the first samples, from the same noise in all runs: uint8 (N, C, H, W), or points (N, D)
    error: np.ndarray  # mean squared error of eps in each bin of `SPECTRUM`; NaN for a bin without data
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]  # steps and values of logged metrics by name


@dataclass(frozen=True)
class Report:
    """The contents of a comparison's files."""

    title: str
    groups: Sequence[Group]
    implied: Mapping[str, Sequence[Any]]
    """Settings that differ together with those that name the groups: one value per group."""
    rankings: Sequence[Ranking]
    baselines: Mapping[str, tuple[float, float, float]]  # each metric of real data, with its interval
    runs: Sequence[Sequence[RunData]]  # by group and seed
    real: Tensor  # validation data in the format of samples
    notes: Sequence[str]  # skipped runs and the reasons
    setup: Mapping[str, str]  # settings of the measurements


def build_report(
    runs: Sequence[SurveyedRun],
    measurements: Sequence[Measurements],
    notes: list[str],
    cfg: DictConfig,
    processes: Processes,
) -> Report:
    """Group the runs, rank the groups by each metric, and return the report."""
    records = [with_metrics(run.record, each) for run, each in zip(runs, measurements, strict=True)]
    data = {}
    for run, record, each in zip(runs, records, measurements, strict=True):
        curves = read_logs(sorted((run.folder / "logs").glob("version_*/metrics.csv")), ("train/loss", "val/loss"))
        data[record.name] = RunData(each["samples"], each["error"].numpy(), curves)
    groups, implied = group_by_settings(records)
    return Report(
        title=f"{len(records)} runs compared: {', '.join(map(str, cfg.runs))}",
        groups=groups,
        implied=implied,
        rankings=[rank_groups(groups, metric) for metric in metrics_of(groups)],
        baselines=baselines_of(measurements[0]),
        runs=[[data[record.name] for record in group.records] for group in groups],
        real=measurements[0]["real"],
        notes=notes,
        setup=describe_method(cfg, processes),
    )


def describe_method(cfg: DictConfig, processes: Processes) -> dict[str, str]:
    """Return what is needed to reproduce the measurements."""
    chosen = {k: v for k, v in cfg.sampler.items() if v is not None and not str(k).startswith("_")}
    name = "each run's own" if cfg.sampler._target_ is None else str(cfg.sampler._target_).rpartition(".")[2]
    terms = "all terms" if cfg.num_terms is None else f"{cfg.num_terms} random terms and the decoder's per sample"
    code = code_version()
    return {
        "samples": f"{cfg.n} of each run, from the noise of seed {cfg.seed}",
        "sampler": ", ".join([name, *(f"{k} {v}" for k, v in chosen.items())]),
        "weights": "averaged" if cfg.ema else "raw",
        "reference": "training data" if cfg.reference == "train" else "validation data",
        "bits/dim": f"the variational bound of {cfg.num_val or 'all'} validation samples, {terms}, reverse variance "
        f"{cfg.reverse_variance}",
        "device": f"{processes.count} x {device_name(processes.device)}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "code": f"commit {code['commit'][:12]}{', with changes' if code['dirty'] else ''}"
        if code["commit"]
        else "no git",
    }


def as_json(report: Report) -> dict[str, Any]:
    """Return all results as plain values."""
    return {
        "headline": headline(report.groups, report.rankings),
        "groups": group_rows(report),
        "runs": run_rows(report),
        "metrics": {
            r.metric: {
                "better": r.direction,
                "best": None if r.best is None else report.groups[r.best].label,
                "not_ranked": r.reason,
                "baseline": report.baselines.get(r.metric),
                "pairs_with_best": [_pair_row(report, pair) for pair in r.pairs_with_best],
                "pairs": [_pair_row(report, pair) for pair in r.pairs],
            }
            for r in report.rankings
        },
        "implied_settings": {name: list(map(format_setting, values)) for name, values in report.implied.items()},
        "common_settings": {name: format_setting(value) for name, value in common_settings(report.groups).items()},
        "left_out": list(report.notes),
        "setup": dict(report.setup),
    }


def _pair_row(report: Report, pair: Pair) -> dict[str, Any]:
    first, second = report.groups[pair.first].label, report.groups[pair.second].label
    return {**pair._asdict(), "first": first, "second": second, "verdict": pair.verdict}


def run_rows(report: Report) -> list[dict[str, Any]]:
    """Return a row per run: settings of its group, seed, metrics with intervals, and costs."""
    rows = []
    for group in report.groups:
        for record in group.records:
            row: dict[str, Any] = {"run": record.name, **{n: format_setting(v) for n, v in group.settings.items()}}
            row["seed"] = record.seed
            for name, value in record.values.items():
                row[name] = value
                if name in record.intervals:
                    row[f"{name} low"], row[f"{name} high"] = record.intervals[name]
            rows.append({**row, **record.costs})
    return rows


def group_rows(report: Report) -> list[dict[str, Any]]:
    """Return a row per group: mean, standard deviation, number of seeds and verdict of every metric."""
    rows = []
    for k, group in enumerate(report.groups):
        row: dict[str, Any] = {"group": group.label, **{n: format_setting(v) for n, v in group.settings.items()}}
        for ranking in report.rankings:
            name, summary = ranking.metric, ranking.summaries[k]
            if summary is None:
                continue
            row |= {name: summary.mean, f"{name} std": summary.std, f"{name} seeds": summary.n}
            if verdict := ranking.verdict(k):
                row[f"{name} verdict"] = verdict
        rows.append(row)
    return rows


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV; missing and NaN cells are empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})


def mark(ranking: Ranking, group: int) -> str:
    """Return the marker that `LEGEND` explains."""
    verdict = ranking.verdict(group)
    return {"best": "★", "not significant": "≈", "single seed": "?"}.get(verdict or "", "")


def sorted_rankings(report: Report) -> list[Ranking]:
    """Return all rankings, with rankings without a best group last."""
    return sorted(report.rankings, key=lambda ranking: ranking.best is None)


def column_title(ranking: Ranking) -> str:
    """Return the title of a metric with an arrow if it is ranked."""
    return metric_title(ranking.metric) + (direction_arrow(ranking.metric) if ranking.best is not None else "")


def group_order(report: Report) -> list[int]:
    """Return groups from best to worst by the main metric, or in their given order if nothing is ranked."""
    main = next((r for r in report.rankings if r.best is not None), None)
    indices = list(range(len(report.groups)))
    if main is None:
        return indices
    sign = 1 if main.direction == "lower" else -1
    summaries = main.summaries
    return sorted(indices, key=lambda k: math.inf if (s := summaries[k]) is None else sign * s.mean)


def group_table(report: Report, rankings: Sequence[Ranking]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: settings, number of seeds and metrics of each group, and the metrics of real data."""
    columns = list(report.groups[0].settings) or ["runs"]
    header = [*columns, "seeds", *map(column_title, rankings)]
    rows = []
    for k in group_order(report):
        group = report.groups[k]
        settings = [format_setting(value) for value in group.settings.values()] or [group.label]
        metrics = [f"{format_summary(r.summaries[k])} {mark(r, k)}".rstrip() for r in rankings]
        rows.append([*settings, str(len(group.records)), *metrics])
    if any(r.metric in report.baselines for r in rankings):
        real = [format_number(report.baselines[r.metric][0]) if r.metric in report.baselines else "" for r in rankings]
        rows.append(["real data", *[""] * len(columns), *real])
    return header, rows


def cost_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: the mean costs of each group."""
    known = [name for name in COSTS if any(name in r.costs for g in report.groups for r in g.records)]
    rows = []
    for k in group_order(report):
        group = report.groups[k]
        values = [[r.costs[name] for r in group.records if name in r.costs] for name in known]
        rows.append([group.label, *(format_number(sum(v) / len(v) if v else math.nan) for v in values)])
    return ["", *(COSTS[name] for name in known)], rows


def report_markdown(report: Report) -> str:
    """Return the headline and all tables."""
    rankings = sorted_rankings(report)
    labels = [group.label for group in report.groups]
    pairs = [
        [
            metric_title(r.metric),
            labels[p.first],
            labels[p.second],
            format_difference(p),
            format_p_value(p.adjusted),
            p.verdict,
        ]
        for r in rankings
        for p in r.pairs_with_best
    ]
    lines = [f"# {report.title}", "", f"**{headline(report.groups, report.rankings)}**", ""]
    lines += [markdown_table(*group_table(report, rankings)), "", LEGEND, "", "## By metric", ""]
    lines += [f"- {describe_ranking(report.groups, r)}" for r in rankings]
    header = ["metric", "best", "other", "difference [95%]", "p (Holm)", "verdict"]
    lines += ["", "## Compared with the best", "", markdown_table(header, pairs)]
    lines += ["", "## Cost", "", markdown_table(*cost_table(report)), ""]
    if report.notes:
        lines += ["## Left out", "", *(f"- {note}" for note in report.notes), ""]
    lines += ["## Setup", "", *(f"- {name}: {value}" for name, value in report.setup.items()), ""]
    return "\n".join(lines)
