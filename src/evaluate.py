"""Evaluate a run, `python -m src.evaluate run=outputs/train/...`, or samplers, `... analytic=mixture`."""

import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from src.checkpoints import find_checkpoint
from src.cli import CONF, UsageError, config_groups, launch, memory_errors, nearest, usage_errors

if TYPE_CHECKING:
    import torch

    from src.evaluation import Bound
    from src.runs import OpenedRun


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Write `metrics.json` and plots into the output folder; returns the metrics."""
    folder = Path(cfg.run_dir)
    metrics = compare(cfg, folder) if cfg.analytic else likelihood(cfg, folder)
    from src.runs import write_json

    write_json(folder / "metrics.json", metrics)
    print(f"All figures: {folder / 'metrics.json'}")
    return metrics


def likelihood(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """The variational bound of held-out data in bits/dim, its terms, and the flow's likelihood if asked for."""
    from src import runs

    with usage_errors():
        find_checkpoint(cfg.run, cfg.ckpt)  # before anything heavy is imported
        for name in ("n", "links", "batch_size"):
            if cfg[name] is not None and cfg[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {cfg[name]}: null takes all that there are")
        opened = runs.open_run(cfg.run, cfg.ckpt, cfg.ema, cfg.trust, cfg.data.root)
        device = runs.pick_device(cfg.device)
        opened.data.prepare_data()
        opened.data.setup()

    import torch

    from src import plots
    from src.evaluation import flow_bits

    count = min(cfg.n or len(opened.data.val_indices), len(opened.data.val_indices))
    room = functools.partial(memory_errors, lambda: runs.out_of_memory_at(opened, min(cfg.batch_size, count), device))
    with room():
        module = opened.module.to(device)
        result = bound_of(opened, count, cfg)
    metrics: dict[str, Any] = {
        "checkpoint": str(opened.checkpoint),
        "samples": count,
        "links": cfg.links or module.schedule.num_steps,
        "bits_per_dim": result.total.mean().item(),
        "standard_error": standard_error(result.total),
        "prior": result.prior.mean().item(),
    }
    metrics["decoder"] = result.links[0].item()
    metrics["divergences"] = metrics["bits_per_dim"] - metrics["prior"] - metrics["decoder"]
    if cfg.ode:
        parts = []
        for start in progress(range(0, count, cfg.batch_size), "Flow"):
            with room():
                x = held_out(opened, start, min(start + cfg.batch_size, count)).to(device)
                parts.append(flow_bits(module, x, cfg.seed, cfg.ode_tolerance, start))
        flow = torch.cat(parts)
        metrics |= {"flow_bits_per_dim": flow.mean().item(), "flow_standard_error": standard_error(flow)}
    folder.mkdir(parents=True, exist_ok=True)
    rows = [module.schedule.row(t) for t in range(module.schedule.num_steps)]
    log_snr = torch.stack([row.snr.log() for row in rows])
    plots.bound_curves(result.links, result.mse, log_snr).save(folder / "bound.png")
    steps = module.schedule.num_steps
    how = "at most" if cfg.links is None else f"by an estimate from {cfg.links} of {steps} links"
    print(
        f"{count} held-out samples of {opened.checkpoint}: {how} {with_error(result.total)} bits/dim "
        f"(prior {metrics['prior']:.4f}, decoder {metrics['decoder']:.4f})"
    )
    if cfg.ode:
        print(f"by the flow {with_error(flow)} bits/dim")
    print(f"Look at {folder / 'bound.png'}")
    return metrics


def bound_of(opened: "OpenedRun", count: int, cfg: DictConfig) -> "Bound":
    """The bound of the first `count` held-out samples, batch by batch."""
    import torch

    from src.evaluation import Bound, bound

    parts = []
    starts = range(0, count, cfg.batch_size)
    for k, start in enumerate(starts):
        x = held_out(opened, start, min(start + cfg.batch_size, count)).to(opened.module.device)
        show = functools.partial(progress, label=f"Bound, batch {k + 1} of {len(starts)}")
        parts.append(bound(opened.module, x, cfg.seed, cfg.links, show, start))
    prior, total, *sums = zip(*parts, strict=True)
    return Bound(torch.cat(prior), torch.cat(total), *(torch.stack(part).sum(0) for part in sums))


def held_out(opened: "OpenedRun", start: int, stop: int) -> "torch.Tensor":
    """Held-out samples start..stop - 1 as the network sees them."""
    data = opened.data
    assert data.source is not None
    return data.to_model(data.source.fetch(data.val_indices[start:stop]))


def compare(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Every sampler, with the exact denoiser of a distribution that is known, against the exact answer."""
    names = [name for name in config_groups()["schedule"] if name != "custom"]  # which needs betas
    if cfg.analytic_schedule not in names:
        hint = nearest(cfg.analytic_schedule, names) or f": choose from {', '.join(names)}"
        raise UsageError(f"unknown analytic_schedule '{cfg.analytic_schedule}'{hint}")

    from src import plots, runs
    from src.arguments import check_arguments

    with usage_errors():
        if not cfg.analytic_steps or min(cfg.analytic_steps) < 2 or cfg.analytic_samples < 10:
            raise ValueError(
                f"needs analytic_steps of at least 2 and 10 analytic_samples, got {list(cfg.analytic_steps)} and "
                f"{cfg.analytic_samples}"
            )
        check_arguments(cfg.analytic, "analytic")
        data = runs.make(cfg.analytic)
        node = OmegaConf.load(CONF / "schedule" / f"{cfg.analytic_schedule}.yaml")
        assert isinstance(node, DictConfig)
        schedule = runs.build_schedule(node.get("schedule", node), 1.0, False)
        samplers = {}
        for name in config_groups()["sampler"]:
            if name == "diffusers":
                continue
            settings = OmegaConf.load(CONF / "sampler" / f"{name}.yaml")
            assert isinstance(settings, DictConfig)
            samplers[name] = runs.build_sampler(settings)._replace(spacing="log_snr")

    from src.evaluation import compare_samplers

    steps = list(cfg.analytic_steps)
    results, chance = compare_samplers(
        data, schedule, samplers, steps, cfg.analytic_samples, cfg.seed, lambda it: progress(it, "Samplers")
    )
    lines = [
        "Distance to where the exact flow leads (root mean square), on a grid uniform in log-SNR:",
        f"{'sampler':<18}" + "".join(f"{f'{n} steps':>12}" for n in steps),
        *(f"{name:<18}" + "".join(f"{e:>12.2e}" for e in r.flow) for name, r in results.items() if r.flow),
        "",
        f"Distance of mean and covariance (chance alone gives {chance:.1e}):",
        f"{'sampler':<18}" + "".join(f"{f'{n} steps':>12}" for n in steps),
        *(f"{name:<18}" + "".join(f"{e:>12.2e}" for e in r.moments) for name, r in results.items()),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samplers.txt").write_text("\n".join(lines) + "\n")
    plots.sampler_errors({name: (r.evaluations, r.flow, r.moments) for name, r in results.items()}, chance).save(
        folder / "samplers.png"
    )
    print("\n".join(lines))
    print(f"Look at {folder / 'samplers.png'}")
    return {"steps": steps, "chance": chance, "samplers": {name: r._asdict() for name, r in results.items()}}


def standard_error(values: "torch.Tensor") -> float:
    """Of the mean of values (N,); NaN for a single one."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def with_error(values: "torch.Tensor") -> str:
    """The mean of values (N,) and its standard error, as they are shown."""
    error = standard_error(values)
    return f"{values.mean().item():.4f}" + (" (one sample)" if math.isnan(error) else f" +- {error:.4f}")


def progress(items: Iterable[int], label: str) -> Iterable[int]:
    """The items behind a progress bar."""
    from tqdm import tqdm

    bar: Iterable[int] = tqdm(items, desc=label)
    return bar


if __name__ == "__main__":
    launch("evaluate", evaluate)
