"""Compare runs: `python -m src.compare outputs/sweeps/...`, or any list of run folders; a page, tables and plots."""

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from src.comparison.measure import held_out_count, measure_all, opened_run, sampler_of
from src.comparison.statistics import grouped, metrics_of, ranked
from src.comparison.survey import SurveyedRun, check_data, run_folders, survey, wandb_of
from src.config.arguments import check_counts, check_names, check_seeds
from src.config.cli import launch
from src.config.output import begin
from src.config.overrides import key_of, split_arguments
from src.config.resolvers import wandb_offline
from src.distributed.ranks import rank
from src.errors import UsageError, data_errors, memory_errors, usage_errors
from src.quoting import quoted

if TYPE_CHECKING:
    from src.comparison.measure import Measurements
    from src.distributed.processes import Processes
    from src.runs.open import OpenedRun
    from src.training.module import Sampler


def compare(cfg: DictConfig) -> dict[str, Any]:
    """Measure every run, and write the page, tables and plots into the output folder. Returns all figures."""
    with usage_errors():
        check_counts(
            cfg, "n", "batch_size", "max_features", "num_memorization", "num_val", "num_terms", "sampler.steps"
        )
        check_seeds(cfg)
        check_names(cfg, "features")
        folders = run_folders(list(cfg.runs or []))
        from src.evaluation.likelihood import check_halves, check_reverse_variance

        check_reverse_variance(cfg.reverse_variance, "reverse_variance")
        found, notes = survey(folders)
        if rank() == 0:
            for note in notes:
                print(f"left out: {note}")
        if len(found) < 2:
            raise ValueError(
                f"a comparison needs two finished runs, got {len(found)} of {len(folders)}: give more folders, or "
                "finish what was left out"
            )
        check_data(found, cfg.data.root is None)
        if cfg.wandb:
            wandb_of(found)
        from src.distributed.processes import start_processes
        from src.runs import out_of_memory
        from src.runs.open import pick_device

        first = opened_run(found[0], cfg)
        samplers = [sampler_of(each, cfg) for each in found]
        first.module.check_sampler(samplers[0])
        if rank() == 0:
            first.data.prepare_data()
        processes = start_processes(pick_device(cfg.device), cfg.devices, cfg.num_nodes)
        first.data.setup()
        check_halves(cfg.reverse_variance, held_out_count(first, cfg), "reverse_variance")
    with memory_errors(lambda: out_of_memory.at_batch_size(first, cfg.batch_size, processes.device)), data_errors():
        measured = measure_all(found, samplers, first, cfg, processes, print_summary)
    if processes.rank > 0:
        return {}
    return write_report(found, measured, notes, cfg, processes)


def write_report(
    found: Sequence[SurveyedRun],
    measured: Sequence["Measurements"],
    notes: list[str],
    cfg: DictConfig,
    processes: "Processes",
) -> dict[str, Any]:
    """Put together what is known of the runs, write it into the output folder and say where. Returns all figures."""
    from src.comparison import report
    from src.comparison.measure import baselines_of, with_metrics
    from src.comparison.page import write_files
    from src.viz import charts, tables

    records = [with_metrics(run.record, each) for run, each in zip(found, measured, strict=True)]
    of_record = {id(record): (run, each) for record, run, each in zip(records, found, measured, strict=True)}
    groups, implied = grouped(records)
    seen = []
    for group in groups:
        of_group = [of_record[id(record)] for record in group.records]
        logs = [sorted((run.folder / "logs").glob("version_*/metrics.csv")) for run, _ in of_group]
        seen.append(
            [
                report.RunData(
                    each["samples"], each["error"].numpy(), charts.read_logs(log, ("train/loss", "val/loss"))
                )
                for (_, each), log in zip(of_group, logs, strict=True)
            ]
        )
    page = report.Report(
        title=f"{len(records)} runs compared: {', '.join(map(str, cfg.runs))}",
        groups=groups,
        implied=implied,
        rankings=[ranked(groups, metric) for metric in metrics_of(groups)],
        baselines=baselines_of(measured[0]),
        runs=seen,
        real=measured[0]["real"],
        notes=notes,
        setup=how_measured(cfg, processes),
    )
    folder = begin(Path(cfg.run_dir))
    path = write_files(folder, page)
    results = report.as_json(page)
    tables.write_json(folder / "comparison.json", results)
    print(f"\n{results['headline']}\nLook at:")
    for name in (path.name, "comparison.md", "runs.csv", "groups.csv", "comparison.json"):
        print(f"  {folder / name}")
    if cfg.wandb:
        from src.training.loggers import log_comparison

        where = wandb_of(found)
        in_group = where.get("group") or folder.resolve().parent.name
        log_comparison(results["runs"], where["project"], in_group, folder, where.get("entity"), wandb_offline())
        print(f"The runs are a table in the W&B project {where['project']}, group {in_group}")
    return results


def with_runs(arguments: Sequence[str]) -> list[str]:
    """Folders among the arguments, which are neither overrides nor flags, as `runs=[...]`."""
    overrides, flags = split_arguments(arguments)
    folders = [
        word
        for word in overrides
        if os.path.isdir(word) or ("=" not in word.split("/")[0] and not word.startswith(("~", "+")))
    ]
    if not folders:
        return [*flags, *overrides]
    others = [word for word in overrides if word not in folders]
    if "runs" in map(key_of, others):
        raise UsageError(f"{folders[0]} and runs=... both name runs: put all folders into one of them")
    return [*flags, *others, f"runs=[{','.join(map(quoted, folders))}]"]


def print_summary(
    runs: int, missing: int, sampler: "Sampler", bound: int, first: "OpenedRun", cfg: DictConfig, processes: "Processes"
) -> None:
    """One line on what is about to be measured, and how long it will take."""
    from src.evaluation.quality import seconds_of_call
    from src.viz.tables import duration

    if processes.rank > 0:
        return
    module = first.module.to(processes.device)
    size = min(cfg.batch_size, cfg.n)
    calls = module.network_calls(sampler)
    seconds = seconds_of_call(module, size) / size * (cfg.n * calls + bound) * -(-missing // processes.count)
    before = f" ({runs - missing} others were measured before)" if missing < runs else ""
    print(
        f"Measuring {missing} runs{before}: {cfg.n} samples of {calls} network calls each, and the bound of held-out "
        f"data; about {duration(seconds)} on {processes.count} x {processes.device.type}",
        flush=True,
    )


def how_measured(cfg: DictConfig, processes: "Processes") -> dict[str, str]:
    """What someone else would need to measure it again."""
    import torch

    from src.training.provenance import code_version, device_name

    chosen = {k: v for k, v in cfg.sampler.items() if v is not None and not str(k).startswith("_")}
    name = "each run's own" if cfg.sampler._target_ is None else str(cfg.sampler._target_).rpartition(".")[2]
    links = "all links" if cfg.num_terms is None else f"{cfg.num_terms} links and the decoder's, drawn for each sample"
    return {
        "samples": f"{cfg.n} of each run, from the noise of seed {cfg.seed}",
        "sampler": ", ".join([name, *(f"{k} {v}" for k, v in chosen.items())]),
        "weights": "averaged" if cfg.ema else "raw",
        "reference": "training data" if cfg.reference == "train" else "held-out data, which no run has seen",
        "bits/dim": f"the variational bound of {cfg.num_val or 'all'} held-out samples by {links}, "
        f"reverse variance {cfg.reverse_variance}",
        "device": f"{processes.count} x {device_name(processes.device)}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "code": commit_of(code_version()),
    }


def commit_of(code: Mapping[str, Any]) -> str:
    """Which commit it is, and whether files have changed since."""
    if code["commit"] is None:
        return "no git"
    return f"commit {code['commit'][:12]}{', with changes' if code['dirty'] else ''}"


if __name__ == "__main__":
    try:
        sys.argv[1:] = with_runs(sys.argv[1:])
    except UsageError as error:
        sys.exit(f"error: {error}")
    launch("compare", compare)
