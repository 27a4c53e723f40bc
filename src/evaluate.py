"""Evaluate a run, `python -m src.evaluate run=outputs/train/...`, or samplers, `... analytic=mixture`."""

import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from src.checkpoints import find_checkpoint
from src.cli import launch
from src.errors import UsageError, memory_errors, usage_errors
from src.overrides import config_groups, nearest
from src.ranks import rank
from src.trust import CONF

if TYPE_CHECKING:
    import torch

    from src.evaluation import Bound
    from src.processes import Processes
    from src.runs import OpenedRun

T = TypeVar("T")


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Write `metrics.json` and plots into the output folder; returns the metrics."""
    folder = Path(cfg.run_dir)
    if cfg.analytic and rank() > 0:
        return {}
    metrics = compare(cfg, folder) if cfg.analytic else likelihood(cfg, folder)
    from src.runs import write_json

    if rank() == 0:
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
        if rank() == 0:  # the others come after it
            opened.data.prepare_data()
            opened.data.setup()
        from src.processes import start_processes

        processes = start_processes(runs.pick_device(cfg.device), cfg.devices, cfg.num_nodes)
        opened.data.setup()

    import torch

    from src import plots
    from src.evaluation import flow_bits

    count = min(cfg.n or len(opened.data.val_indices), len(opened.data.val_indices))
    batch_size = min(cfg.batch_size, -(-count // processes.count))
    with memory_errors(lambda: runs.out_of_memory_at(opened, batch_size, processes.device)):
        module = opened.module.to(processes.device)
        batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        result = bound_of(opened, batches, cfg, processes)
        flows = []
        for batch in progress(processes.share(batches), "Flow", processes.rank) if cfg.ode else ():
            x = held_out(opened, batch).to(processes.device)
            flows.append(flow_bits(module, x, cfg.seed, cfg.ode_tolerance, batch.start))
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
        flow = torch.cat(processes.gather_in_turn(flows))
        metrics |= {"flow_bits_per_dim": flow.mean().item(), "flow_standard_error": standard_error(flow)}
    if processes.rank > 0:
        return metrics
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


def bound_of(opened: "OpenedRun", batches: Sequence[range], cfg: DictConfig, processes: "Processes") -> "Bound":
    """The bound of held-out samples, batch by batch, each process a share of these."""
    import torch

    from src.evaluation import Bound, bound

    parts = []
    mine = processes.share(batches)
    for k, batch in enumerate(mine):
        x = held_out(opened, batch).to(opened.module.device)
        show = functools.partial(progress, label=f"Bound, batch {k + 1} of {len(mine)}", rank=processes.rank)
        parts.append(bound(opened.module, x, cfg.seed, cfg.links, show, batch.start))
    prior, total, *sums = zip(*processes.gather_in_turn(parts), strict=True)
    return Bound(torch.cat(prior), torch.cat(total), *(torch.stack(part).sum(0) for part in sums))


def held_out(opened: "OpenedRun", places: range) -> "torch.Tensor":
    """Held-out samples of these places as the network sees them."""
    data = opened.data
    assert data.source is not None
    return data.to_model(data.source.fetch(data.val_indices[places.start : places.stop]))


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


def progress(items: Iterable[T], label: str, rank: int = 0) -> Iterable[T]:
    """The items behind a progress bar, which the first process shows."""
    from tqdm import tqdm

    bar: Iterable[T] = tqdm(items, desc=label, disable=rank > 0)
    return bar


if __name__ == "__main__":
    launch("evaluate", evaluate)
