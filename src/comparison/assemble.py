"""Assemble the report of a comparison from the runs' records and measurements."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig

from src.comparison.grouping import group_by_settings
from src.comparison.measure import Measurements, baselines_of, with_metrics
from src.comparison.report import Report, RunData
from src.comparison.statistics import metrics_of, rank_groups
from src.comparison.survey import SurveyedRun
from src.distributed.processes import Processes
from src.training.provenance import code_version, device_name
from src.viz import charts


def build_report(
    runs: Sequence[SurveyedRun],
    measurements: Sequence[Measurements],
    notes: list[str],
    cfg: DictConfig,
    processes: Processes,
) -> Report:
    """Group the runs, rank the groups by each metric, and return the report."""
    records = [with_metrics(run.record, each) for run, each in zip(runs, measurements, strict=True)]
    sources = {id(record): (run, each) for record, run, each in zip(records, runs, measurements, strict=True)}
    groups, implied = group_by_settings(records)
    run_data = []
    for group in groups:
        parts = []
        for run, each in (sources[id(record)] for record in group.records):
            logs = sorted((run.folder / "logs").glob("version_*/metrics.csv"))
            curves = charts.read_logs(logs, ("train/loss", "val/loss"))
            parts.append(RunData(each["samples"], each["error"].numpy(), curves))
        run_data.append(parts)
    return Report(
        title=f"{len(records)} runs compared: {', '.join(map(str, cfg.runs))}",
        groups=groups,
        implied=implied,
        rankings=[rank_groups(groups, metric) for metric in metrics_of(groups)],
        baselines=baselines_of(measurements[0]),
        runs=run_data,
        real=measurements[0]["real"],
        notes=notes,
        setup=describe_method(cfg, processes),
    )


def describe_method(cfg: DictConfig, processes: Processes) -> dict[str, str]:
    """Return what is needed to reproduce the measurements."""
    chosen = {k: v for k, v in cfg.sampler.items() if v is not None and not str(k).startswith("_")}
    name = "each run's own" if cfg.sampler._target_ is None else str(cfg.sampler._target_).rpartition(".")[2]
    terms = "all terms" if cfg.num_terms is None else f"{cfg.num_terms} random terms and the decoder's per sample"
    return {
        "samples": f"{cfg.n} of each run, from the noise of seed {cfg.seed}",
        "sampler": ", ".join([name, *(f"{k} {v}" for k, v in chosen.items())]),
        "weights": "averaged" if cfg.ema else "raw",
        "reference": "training data" if cfg.reference == "train" else "validation data",
        "bits/dim": f"the variational bound of {cfg.num_val or 'all'} validation samples, {terms}, reverse variance "
        f"{cfg.reverse_variance}",
        "device": f"{processes.count} x {device_name(processes.device)}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "code": format_commit(code_version()),
    }


def format_commit(code: Mapping[str, Any]) -> str:
    """Return the commit as text, and whether files differ from it."""
    if code["commit"] is None:
        return "no git"
    return f"commit {code['commit'][:12]}{', with changes' if code['dirty'] else ''}"
