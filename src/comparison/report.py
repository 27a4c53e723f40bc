"""Collect the results of a comparison, and return them as Markdown, tables and JSON values."""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from src.comparison import statistics
from src.comparison.grouping import Group, common_settings, format_setting, group_by_settings
from src.comparison.measure import Measurements, baselines_of, with_metrics
from src.comparison.statistics import Pair, Ranking
from src.comparison.survey import SurveyedRun
from src.distributed.processes import Processes
from src.training.provenance import code_version, device_name
from src.viz.line_plots import read_logs
from src.viz.tables import direction_arrow, format_number, markdown_table, metric_title

COSTS = {
    "seconds": "training time (s)",
    "steps": "steps",
    "parameters": "parameters",
    "calls_per_image": "network calls per sample",
    "seconds_per_image": "sampling time (s per sample)",
}
MARKS = {"best": " ★", "not significant": " ≈", "single seed": " ?", "significant": "", None: ""}
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
    """The results of a comparison."""

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

    @property
    def headline(self) -> str:
        return statistics.headline(self.groups, self.rankings)

    @cached_property
    def ranked(self) -> list[Ranking]:
        return [ranking for ranking in self.rankings if ranking.best is not None]

    @cached_property
    def unranked(self) -> list[Ranking]:
        return [ranking for ranking in self.rankings if ranking.best is None]

    @cached_property
    def order(self) -> list[int]:
        """The groups from best to worst by the main metric, or in their given order if nothing is ranked."""
        indices = range(len(self.groups))
        if not self.ranked:
            return list(indices)
        sign = 1 if self.ranked[0].direction == "lower" else -1
        summaries = self.ranked[0].summaries
        return sorted(indices, key=lambda k: math.inf if (s := summaries[k]) is None else sign * s.mean)

    def as_json(self) -> dict[str, Any]:
        """Return all results as plain values."""
        return {
            "headline": self.headline,
            "groups": self.group_rows(),
            "runs": self.run_rows(),
            "metrics": {
                r.metric: {
                    "better": r.direction,
                    "best": None if r.best is None else self.groups[r.best].label,
                    "not_ranked": r.reason,
                    "baseline": self.baselines.get(r.metric),
                    "pairs_with_best": list(map(self._pair_row, r.pairs_with_best)),
                    "pairs": list(map(self._pair_row, r.pairs)),
                }
                for r in self.rankings
            },
            "implied_settings": {name: list(map(format_setting, values)) for name, values in self.implied.items()},
            "common_settings": {name: format_setting(value) for name, value in common_settings(self.groups).items()},
            "left_out": list(self.notes),
            "setup": dict(self.setup),
        }

    def _pair_row(self, pair: Pair) -> dict[str, Any]:
        first, second = self.groups[pair.first].label, self.groups[pair.second].label
        return {**pair._asdict(), "first": first, "second": second, "verdict": pair.verdict}

    def run_rows(self) -> list[dict[str, Any]]:
        """Return a row per run: settings of its group, seed, metrics with intervals, and costs."""
        rows = []
        for group in self.groups:
            for record in group.records:
                row: dict[str, Any] = {"run": record.name, **group.formatted_settings, "seed": record.seed}
                for name, value in record.values.items():
                    row[name] = value
                    if name in record.intervals:
                        row[f"{name} low"], row[f"{name} high"] = record.intervals[name]
                rows.append({**row, **record.costs})
        return rows

    def group_rows(self) -> list[dict[str, Any]]:
        """Return a row per group: mean, standard deviation, number of seeds and verdict of every metric."""
        rows = []
        for k, group in enumerate(self.groups):
            row: dict[str, Any] = {"group": group.label, **group.formatted_settings}
            for ranking in self.rankings:
                name, summary = ranking.metric, ranking.summaries[k]
                if summary is None:
                    continue
                row |= {name: summary.mean, f"{name} std": summary.std, f"{name} seeds": summary.n}
                if verdict := ranking.verdict(k):
                    row[f"{name} verdict"] = verdict
            rows.append(row)
        return rows

    def group_table(self, rankings: Sequence[Ranking]) -> tuple[list[str], list[list[str]]]:
        """Return header and rows: settings, number of seeds and metrics of each group, and the metrics of real data."""
        columns = list(self.groups[0].settings) or ["runs"]
        rows = []
        for k in self.order:
            group = self.groups[k]
            settings = list(group.formatted_settings.values()) or [group.label]
            metrics = [statistics.format_summary(r.summaries[k]) + MARKS[r.verdict(k)] for r in rankings]
            rows.append([*settings, str(len(group.records)), *metrics])
        if any(r.metric in self.baselines for r in rankings):
            real = [format_number(self.baselines[r.metric][0]) if r.metric in self.baselines else "" for r in rankings]
            rows.append(["real data", *[""] * len(columns), *real])
        return [*columns, "seeds", *map(column_title, rankings)], rows

    def cost_table(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows: the mean costs of each group."""
        means = pd.DataFrame([pd.DataFrame([r.costs for r in group.records]).mean() for group in self.groups])
        known = [name for name in COSTS if name in means]
        rows = [[self.groups[k].label, *map(format_number, means.loc[k, known])] for k in self.order]
        return ["", *(COSTS[name] for name in known)], rows

    def markdown(self) -> str:
        """Return the headline and all tables."""
        rankings = [*self.ranked, *self.unranked]
        pairs = []
        for r in rankings:
            for p in r.pairs_with_best:
                names = metric_title(r.metric), self.groups[p.first].label, self.groups[p.second].label
                p_value = statistics.format_p_value(p.adjusted)
                pairs.append([*names, statistics.format_difference(p), p_value, p.verdict])
        header = ["metric", "best", "other", "difference [95%]", "p (Holm)", "verdict"]
        sentences = [f"- {statistics.describe_ranking(self.groups, r)}" for r in rankings]
        lines = [f"# {self.title}", "", f"**{self.headline}**", ""]
        lines += [markdown_table(*self.group_table(rankings)), "", LEGEND, "", "## By metric", "", *sentences]
        lines += ["", "## Compared with the best", "", markdown_table(header, pairs)]
        lines += ["", "## Cost", "", markdown_table(*self.cost_table()), ""]
        if self.notes:
            lines += ["## Left out", "", *(f"- {note}" for note in self.notes), ""]
        lines += ["## Setup", "", *(f"- {name}: {value}" for name, value in self.setup.items()), ""]
        return "\n".join(lines)


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
        rankings=[statistics.rank_groups(groups, metric) for metric in statistics.metrics_of(groups)],
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


def column_title(ranking: Ranking) -> str:
    """Return the title of a metric with an arrow if it is ranked."""
    return metric_title(ranking.metric) + (direction_arrow(ranking.metric) if ranking.best is not None else "")
