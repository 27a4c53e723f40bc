"""Evaluate a run, `python -m src.evaluate run=outputs/train/...`, or samplers, `... analytic=mixture`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from src.config.cli import launch
from src.config.output import relative, start_output
from src.distributed.ranks import rank
from src.errors import UsageError, data_errors, format_override, memory_errors, usage_errors
from src.evaluation.settings import QualitySettings, check_num_val
from src.runs.checkpoints import find_checkpoint
from src.runs.evaluation import (
    announce_samples,
    build_alignment,
    build_analytic,
    build_samplers,
    check_lengths,
    evaluation_settings,
    measure_alignment,
)
from src.viz.tables import format_bits, lengths_table, markdown, write_json

if TYPE_CHECKING:
    from src.distributed.processes import Processes
    from src.evaluation.quality import SampleEvaluator
    from src.runs.open import OpenedRun

OF_LATENTS = ". This is a density of scaled latents per dimension, which compares models with the same autoencoder only"


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Write `metrics.json`, tables and pictures into the output folder, and return the metrics."""
    folder = Path(cfg.run_dir)
    for name in ("run", "ckpt", "init_from.path"):
        if cfg.analytic and OmegaConf.select(cfg, name) is not None:
            override = format_override(name, str(OmegaConf.select(cfg, name)))
            raise UsageError(
                f"{override} has no effect with an analytic distribution, which needs no run; leave one out"
            )
    if cfg.analytic and rank() > 0:
        return {}
    several = isinstance(cfg.ema, ListConfig)
    metrics = (evaluate_analytic if cfg.analytic else evaluate_lengths if several else evaluate_run)(cfg, folder)
    if rank() == 0:
        write_json(folder / "metrics.json", metrics)
        print(f"All metrics: {relative(folder / 'metrics.json')}")
    return metrics


def evaluate_lengths(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Evaluate the averages of each length in `ema`, in a folder each, and write a table of all."""
    with usage_errors():
        evaluation_settings(cfg)
        check_lengths(find_checkpoint(cfg.run, cfg.ckpt, cfg.init_from.path), cfg.ema)
    results = {}
    for length in cfg.ema:
        settings = OmegaConf.merge(cfg, {"ema": length})
        assert isinstance(settings, DictConfig)
        results[f"{length:g}"] = evaluate_run(settings, folder, f"ema_{length:g}")
    if rank() == 0:
        text = lengths_table(results)
        (folder / "table.md").write_text(text)
        print(f"\n{text}")
    return {"ema": results}


def evaluate_run(cfg: DictConfig, folder: Path, part: str = "") -> dict[str, Any]:
    """Evaluate likelihood, sample quality and prompt alignment of a run: metrics, a table and pictures in `part`."""
    with usage_errors():
        quality, alignment = evaluation_settings(cfg)
        from src.distributed.processes import start_processes
        from src.runs import out_of_memory
        from src.runs.open import configure_inference, open_run, pick_device

        device = pick_device(cfg.device)
        places = cfg.data.root, cfg.encoder, cfg.init_from, cfg.autoencoder, str(device)
        opened = open_run(cfg.run, cfg.ckpt, cfg.ema, cfg.trust, *places)
        configure_inference(opened, cfg.precision, cfg.compile)
        if opened.length is not None and rank() == 0:
            print(f"\nAverage of length {opened.length:g}:", flush=True)
        samplers = build_samplers(cfg, opened)
        if rank() == 0:  # prepares the data for the other processes
            opened.data.prepare_data()
            opened.data.setup()
        processes = start_processes(device, cfg.devices, cfg.num_nodes)
        opened.data.setup()
        count = len(opened.data.val_indices)
        num_val = min(cfg.num_val or count, count)
        if cfg.likelihood:
            check_num_val(cfg.reverse_variance, num_val, "reverse_variance")
    from src.evaluation.reports import evaluate_quality

    module = opened.module
    with memory_errors(lambda: out_of_memory.sampling_oom_message(cfg.batch_size, processes.device)), data_errors():
        opened.to(processes.device)
        metrics: dict[str, Any] = {"checkpoint": str(opened.checkpoint)}
        # Build evaluators first: they reject invalid settings and an inaccurate detector.
        evaluator = build_evaluator(quality, opened, processes) if cfg.quality else None
        benchmark = build_alignment(alignment, opened, processes) if cfg.alignment.enabled else None
        if evaluator is None and benchmark is None and not cfg.likelihood:
            raise UsageError(
                "likelihood=false quality=false leaves nothing to evaluate: alignment is not available for this run"
            )
        start_output(folder)
        start_output(folder := folder / part)
        if cfg.likelihood:
            metrics |= measure_likelihood(cfg, opened, processes, folder, num_val)
        if evaluator is not None:
            calls = {name: module.network_calls(sampler) for name, sampler in samplers.items()}
            what = ", ".join(f"{name} ({n} network calls)" for name, n in calls.items())
            announce_samples(module, cfg.n, calls, min(cfg.batch_size, cfg.n), what, processes)
            result = evaluate_quality(module, samplers, evaluator, folder)
            metrics |= result and {"sampling_precision": cfg.precision, "sampling_compiled": cfg.compile, **result}
        if benchmark is not None:
            result = measure_alignment(cfg, opened, samplers, benchmark, alignment, processes, folder)
            metrics |= result and {"alignment": result}
    if processes.rank == 0:
        text = markdown(metrics)
        (folder / "table.md").write_text(text)
        print(f"\n{text}\nOutput:")
        for path in sorted([*folder.glob("*.png"), folder / "table.md"]):
            print(f"  {relative(path)}")
    return metrics


def build_evaluator(settings: QualitySettings, opened: "OpenedRun", processes: "Processes") -> "SampleEvaluator":
    """Return the evaluator of sample quality, after a printed line if there are few validation samples."""
    from src.evaluation.quality import FEW_VAL, SampleEvaluator

    with usage_errors():
        evaluator = SampleEvaluator(opened.data, settings, processes)
    if processes.rank == 0 and (count := len(opened.data.val_indices)) < FEW_VAL:
        print(
            f"Only {count} validation samples: metrics depend on the split, which their intervals do not cover; raise "
            "data.val_fraction in training"
        )
    return evaluator


def measure_likelihood(
    cfg: DictConfig, opened: "OpenedRun", processes: "Processes", folder: Path, num_val: int
) -> dict[str, Any]:
    """Measure and print the likelihood of the first `num_val` validation samples."""
    from src.evaluation.reports import evaluate_likelihood

    metrics = evaluate_likelihood(
        opened.module,
        opened.data,
        processes,
        folder,
        num_val=num_val,
        num_terms=cfg.num_terms,
        reverse_variance=cfg.reverse_variance,
        ode_tolerance=cfg.ode_tolerance if cfg.ode else None,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
    )
    if processes.rank == 0:
        of_latents = "" if opened.data.displayed is opened.data else OF_LATENTS
        print(f"{num_val} validation samples: {format_bits(metrics, cfg.num_terms)}{of_latents}")
    return metrics


def evaluate_analytic(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Compare every sampler, with the exact denoiser of a known distribution, with the exact solution."""
    with usage_errors():
        data, schedule, samplers, grid = build_analytic(cfg)
    steps = list(cfg.analytic_steps)
    from src.evaluation.reports import format_sampler_errors
    from src.evaluation.sampler_accuracy import compare_samplers
    from src.viz import line_plots

    results, sampling_error = compare_samplers(data, schedule, samplers, steps, cfg.analytic_samples, cfg.seed)
    text = format_sampler_errors(results, steps, sampling_error, grid)
    start_output(folder)
    (folder / "samplers.txt").write_text(f"{text}\n")
    errors = {name: (r.evaluations, r.flow, r.moments) for name, r in results.items()}
    line_plots.sampler_errors(errors, sampling_error).save(folder / "samplers.png")
    print(f"{text}\nPlot: {relative(folder / 'samplers.png')}")
    return {
        "steps": steps,
        "sampling_error": sampling_error,
        "samplers": {name: r._asdict() for name, r in results.items()},
    }


if __name__ == "__main__":
    launch("evaluate", evaluate, together="sampler")
