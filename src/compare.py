"""Compare runs: `python -m src.compare outputs/sweeps/...`, or any run folders. Writes a page, tables and plots."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from src.comparison.survey import SurveyedRun, check_autoencoder, check_same_data, find_wandb, run_folders, survey
from src.config.cli import launch
from src.config.output import start_output
from src.config.resolvers import wandb_offline
from src.config.rules import check_values
from src.config.words import key_of, split_arguments
from src.distributed.ranks import rank
from src.errors import UsageError, data_errors, format_override, memory_errors, quoted, usage_errors
from src.evaluation.settings import check_num_val
from src.runs.evaluation import check_lengths, quality_settings
from src.viz.tables import write_json


def compare(cfg: DictConfig) -> dict[str, Any]:
    """Measure every run, write the page, tables and plots into the output folder, and return all metrics."""
    with usage_errors():
        check_values(cfg)
        settings = quality_settings(cfg)
        settings.check()
        paths = [] if cfg.runs is None else list(cfg.runs) if isinstance(cfg.runs, ListConfig) else [cfg.runs]
        folders = run_folders(paths)
        runs, notes = survey(folders)
        if rank() == 0:
            for note in notes:
                print(f"skipping {note}")
        if len(runs) < 2:
            raise ValueError(
                f"{format_override('runs', paths)} must have at least 2 finished runs, got {len(runs)} of "
                f"{len(folders)}: add folders, or finish the skipped runs"
            )
        check_same_data(runs, cfg.data.root is None)
        check_autoencoder(runs, cfg.autoencoder)
        if cfg.ema is None:
            cfg.ema = common_weights(runs)
        for run in [] if isinstance(cfg.ema, bool) else runs:
            check_lengths(run.checkpoint, cfg.ema)
        if cfg.wandb:
            find_wandb(runs)
        from src.comparison.measure import build_compared_sampler, count_val, measure_all, open_surveyed
        from src.distributed.processes import start_processes
        from src.runs import out_of_memory
        from src.runs.open import pick_device

        device = pick_device(cfg.device)
        first = open_surveyed(runs[0], cfg)
        samplers = [build_compared_sampler(run, cfg) for run in runs]
        first.module.check_sampler(samplers[0])
        if rank() == 0:
            first.data.prepare_data()
        processes = start_processes(device, cfg.devices, cfg.num_nodes)
        first.data.setup()
        check_num_val(cfg.reverse_variance, count_val(first.data, cfg), "reverse_variance")
    with memory_errors(lambda: out_of_memory.sampling_oom_message(cfg.batch_size, processes.device)), data_errors():
        measurements = measure_all(runs, samplers, first, cfg, settings, processes)
    if processes.rank > 0:
        return {}
    from src.comparison.page import write_files
    from src.comparison.report import build_report

    report = build_report(runs, measurements, notes, cfg, processes)
    folder = start_output(Path(cfg.run_dir))
    path = write_files(folder, report)
    results = report.as_json()
    write_json(folder / "comparison.json", results)
    print(f"\n{results['headline']}\nOutput:")
    for name in (path.name, "comparison.md", "runs.csv", "groups.csv", "comparison.json"):
        print(f"  {folder / name}")
    if cfg.wandb:
        log_to_wandb(runs, results["runs"], folder)
    return results


def log_to_wandb(runs: Sequence[SurveyedRun], table: Any, folder: Path) -> None:
    """Log the table of runs to the W&B project of the runs."""
    from src.training.loggers import log_comparison

    where = find_wandb(runs)
    group = where.get("group") or folder.resolve().parent.name
    log_comparison(table, where["project"], group, folder, where.get("entity"), wandb_offline())
    print(f"Logged the table of runs to the W&B project {where['project']}, group {group}")


def common_weights(runs: Sequence[SurveyedRun]) -> bool:
    """Return whether all runs have averaged weights. Raises ValueError if only some have them."""
    without = [run.record.name for run in runs if not run.averaged]
    if without and len(without) < len(runs):
        raise ValueError(
            f"ema=null needs averaged weights in all runs or none, and {without[0]} has only raw ones; type ema=false"
        )
    if without and rank() == 0:
        print("The runs have no averaged weights; using the raw ones, as ema=false does")
    return not without


def with_runs(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with all folders, which are neither overrides nor flags, as `runs=[...]`."""
    overrides, flags = split_arguments(arguments)
    folders = [
        word
        for word in overrides
        if os.path.isdir(word) or ("=" not in word.split("/")[0] and not word.startswith(("~", "+", "hydra/")))
    ]
    if not folders:
        return [*flags, *overrides]
    others = [word for word in overrides if word not in folders]
    if typed := next((word for word in others if key_of(word) == "runs"), None):
        raise UsageError(f"{typed} cannot be combined with the folder {folders[0]}: put all folders into one of them")
    return [*flags, *others, f"runs=[{','.join(map(quoted, folders))}]"]


if __name__ == "__main__":
    try:
        sys.argv[1:] = with_runs(sys.argv[1:])
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    launch("compare", compare)
