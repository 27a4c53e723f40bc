"""Evaluate a run, `python -m src.evaluate run=outputs/train/...`, or samplers, `... analytic=mixture`."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from omegaconf import DictConfig, ListConfig, OmegaConf

from src.config.arguments import check_counts, check_names, check_seeds
from src.config.cli import launch
from src.config.output import begin
from src.config.overrides import CONF, config_groups, nearest
from src.distributed.ranks import rank
from src.errors import UsageError, data_errors, memory_errors, usage_errors
from src.quoting import format_override
from src.runs.checkpoints import find_checkpoint
from src.viz.tables import duration, markdown, stem

if TYPE_CHECKING:
    import torch

    from src.distributed.processes import Processes
    from src.evaluation.alignment import PromptBenchmark, Settings
    from src.evaluation.likelihood import Bound
    from src.evaluation.quality import GeneratedSamples, SampleEvaluator, SampleMetrics
    from src.metrics.confidence import Metric
    from src.runs.open import OpenedRun
    from src.training.module import Sampler

T = TypeVar("T")


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Write `metrics.json` and plots into the output folder; returns the metrics."""
    folder = Path(cfg.run_dir)
    for name, value in (("run", cfg.run), ("ckpt", cfg.ckpt)):
        if cfg.analytic and value is not None:
            raise UsageError(
                f"{format_override(name, value)} is a trained model, and analytic=... evaluates samplers without one: leave one "
                "of them out"
            )
    if cfg.analytic and rank() > 0:
        return {}
    metrics = against_the_exact(cfg, folder) if cfg.analytic else of_run(cfg, folder)
    from src.viz.tables import write_json

    if rank() == 0:
        write_json(folder / "metrics.json", metrics)
        print(f"All figures: {folder / 'metrics.json'}")
    return metrics


def of_run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """The likelihood of held-out data, and the quality and alignment of samples: a table, plots and pictures."""
    from src.runs import components, out_of_memory
    from src.runs.open import configure_inference, open_run, pick_device, sampler_of

    with usage_errors():
        find_checkpoint(cfg.run, cfg.ckpt)  # before anything heavy is imported
        check_counts(
            cfg, "n", "batch_size", "max_features", "num_memorization", "num_val", "num_terms", "sampler.steps"
        )
        check_seeds(cfg)
        check_counts(cfg, "alignment.n", "alignment.detector_steps")
        check_names(cfg, "features")
        if not all(isinstance(each, DictConfig) for each in samplers_of(cfg)):
            raise ValueError(f"samplers={cfg.samplers} must be a list such as [{{sampler: ddim, steps: 10}}]")
        if not cfg.ode_tolerance > 0:
            raise ValueError(f"ode_tolerance={cfg.ode_tolerance} must be positive: 1e-5 is usual")
        from src.evaluation.likelihood import check_halves, check_reverse_variance

        check_reverse_variance(cfg.reverse_variance, "reverse_variance")
        if not (cfg.likelihood or cfg.quality or cfg.alignment.enabled):
            raise ValueError(
                "likelihood=false quality=false alignment.enabled=false leaves nothing to evaluate: leave one out"
            )
        opened = open_run(cfg.run, cfg.ckpt, cfg.ema, cfg.trust, cfg.data.root, cfg.encoder)
        configure_inference(opened, cfg.precision, cfg.compile)
        samplers = {}
        own = opened.config.sampler
        for asked in samplers_of(cfg) or [None]:
            settings = components.named_sampler(asked, own) if asked else components.sampler_settings(cfg.sampler, own)
            sampler = sampler_of(opened, settings, cfg.guidance)
            scale = sampler.guidance.scale
            samplers[sampler_name(settings) + (f" guidance {scale:g}" if scale != 1 else "")] = sampler
        if rank() == 0:  # the others come after it
            opened.data.prepare_data()
            opened.data.setup()
        from src.distributed.processes import start_processes

        processes = start_processes(pick_device(cfg.device), cfg.devices, cfg.num_nodes)
        opened.data.setup()
        if cfg.likelihood:
            count = min(cfg.num_val or len(opened.data.val_indices), len(opened.data.val_indices))
            check_halves(cfg.reverse_variance, count, "reverse_variance")
    with memory_errors(lambda: out_of_memory.at_batch_size(opened, cfg.batch_size, processes.device)), data_errors():
        opened.module.to(processes.device)
        metrics: dict[str, Any] = {"checkpoint": str(opened.checkpoint)}
        # Before anything long: what cannot be measured is refused, and a judge may not be good enough.
        evaluator = build_evaluator(cfg, opened, processes) if cfg.quality else None
        benchmark = build_benchmark(cfg, opened, processes)
        if evaluator is None and benchmark is None and not cfg.likelihood:
            raise UsageError(
                "likelihood=false quality=false leaves nothing to evaluate, since this run's alignment cannot be "
                "measured: leave one of them out"
            )
        begin(folder)
        if cfg.likelihood:
            metrics |= likelihood(cfg, folder, opened, processes)
        if evaluator is not None:
            metrics |= quality(cfg, folder, opened, samplers, processes, evaluator)
        if benchmark is not None:
            name, sampler = next(iter(samplers.items()))
            metrics |= alignment(cfg, folder, opened, name.partition(" guidance ")[0], sampler, benchmark, processes)
    if processes.rank == 0:
        text = markdown(metrics)
        (folder / "table.md").write_text(text)
        print(f"\n{text}\nLook at:")
        for path in sorted([*folder.glob("*.png"), folder / "table.md"]):
            print(f"  {path}")
    return metrics


def samplers_of(cfg: DictConfig) -> list[Any]:
    """Return the settings of each sampler that is asked for by `samplers`; none for the one of `sampler`."""
    return list(cfg.samplers) if isinstance(cfg.samplers, ListConfig) else [cfg.samplers] if cfg.samplers else []


def sampler_name(settings: DictConfig) -> str:
    """What a sampler is called in tables: `ddim 20`, with its settings where they are not the usual ones."""
    name = str(settings._target_).rpartition(".")[2]
    file = CONF / "sampler" / f"{name}.yaml"
    usual = OmegaConf.load(file) if file.is_file() else OmegaConf.create()
    others = {str(k): v for k, v in settings.items() if k != "steps" and not str(k).startswith("_")}
    unusual = [
        f"{k} {v}"
        for k, v in others.items()
        if not (v is None or isinstance(v, DictConfig) or v == OmegaConf.select(usual, k))
    ]
    return " ".join([name, str(settings.steps), *unusual])


def likelihood(cfg: DictConfig, folder: Path, opened: "OpenedRun", processes: "Processes") -> dict[str, Any]:
    """The variational bound of held-out data in bits/dim, its terms, and the flow's likelihood if asked for."""
    import torch

    from src.evaluation.likelihood import flow_bits
    from src.viz import charts

    module = opened.module
    count = min(cfg.num_val or len(opened.data.val_indices), len(opened.data.val_indices))
    batch_size = min(cfg.batch_size, -(-count // processes.count))
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    result = bound_of(opened, batches, cfg, processes)
    flows = []
    for batch in progress(processes.share(batches), "Flow", processes.rank) if cfg.ode else ():
        x = held_out(opened, batch).to(processes.device)
        flows.append(flow_bits(module, x, cfg.seed, cfg.ode_tolerance, batch.start, conditions(opened, batch)))
    metrics: dict[str, Any] = {
        "num_val": count,
        "num_terms": cfg.num_terms or module.schedule.num_steps,
        "reverse_variance": cfg.reverse_variance,
        "bits_per_dim": result.total.mean().item(),
        "standard_error": standard_error(result.total),
        "prior": result.prior.mean().item(),
    }
    metrics["decoder"] = result.terms[0].item()
    metrics["divergences"] = metrics["bits_per_dim"] - metrics["prior"] - metrics["decoder"]
    if cfg.ode:
        flow = torch.cat(processes.gather_in_turn(flows))
        metrics |= {"flow_bits_per_dim": flow.mean().item(), "flow_standard_error": standard_error(flow)}
    if processes.rank > 0:
        return metrics
    rows = [module.schedule.row(t) for t in range(module.schedule.num_steps)]
    log_snr = torch.stack([row.snr.log() for row in rows])
    charts.bound_curves(result.terms, result.mse, log_snr).save(folder / "bound.png")
    steps = module.schedule.num_steps
    how = "at most" if cfg.num_terms is None else f"by an estimate from {cfg.num_terms} of {steps} links"
    print(
        f"{count} held-out samples of {opened.checkpoint}: {how} {with_error(result.total)} bits/dim "
        f"(prior {metrics['prior']:.4f}, decoder {metrics['decoder']:.4f})"
    )
    if cfg.ode:
        print(f"by the flow {with_error(flow)} bits/dim")
    return metrics


def build_evaluator(cfg: DictConfig, opened: "OpenedRun", processes: "Processes") -> "SampleEvaluator":
    """What samples are measured with."""
    from src.evaluation.quality import FEW, SampleEvaluator, Settings
    from src.runs import components

    settings = Settings(
        components.names_of(cfg.features),
        cfg.n,
        cfg.seed,
        cfg.batch_size,
        cfg.max_features,
        cfg.num_memorization,
        cfg.reference,
        Path(cfg.cache),
        cfg.inception_weights and Path(cfg.inception_weights),
        cfg.dinov2_model,
    )
    with usage_errors():
        evaluator = SampleEvaluator(opened.data, settings, processes)
    if processes.rank == 0 and (count := len(opened.data.val_indices)) < FEW:
        print(
            f"Only {count} held-out samples: the figures hang on which ones these are, and their intervals do not say "
            "so; hold out more when training (data.val_fraction)"
        )
    return evaluator


def quality(
    cfg: DictConfig,
    folder: Path,
    opened: "OpenedRun",
    samplers: Mapping[str, "Sampler"],
    processes: "Processes",
    evaluator: "SampleEvaluator",
) -> dict[str, Any]:
    """The figures of samples by every sampler, beside the floor, with plots and pictures."""
    from tqdm import tqdm

    from src.evaluation.quality import seconds_of_call

    module = opened.module
    calls = {name: module.network_calls(sampler) for name, sampler in samplers.items()}
    size = min(cfg.batch_size, cfg.n)
    turns = -(-cfg.n // (size * processes.count))
    seconds = seconds_of_call(module, size) * turns * sum(calls.values())  # all processes compile before the clock runs
    if processes.rank == 0:
        print(
            f"Drawing {cfg.n} samples by {', '.join(f'{name} ({n} network calls)' for name, n in calls.items())}: "
            f"about {duration(seconds)} on {processes.count} x {processes.device.type}",
            flush=True,
        )
    drawn = {}
    bar = tqdm(total=cfg.n * sum(calls.values()), unit="call", unit_scale=True, desc="Samples", disable=rank() > 0)
    with bar, usage_errors():
        for name, sampler in samplers.items():
            drawn[name] = evaluator.draw(
                module, sampler, functools.partial(advance, bar, calls[name]), condition=opened.data.condition
            )
    floor = evaluator.floor()
    measured = evaluator.measure(list(drawn.values()), lambda it: progress(it, "Nearest", processes.rank))
    if processes.rank > 0:
        return {}
    metrics: dict[str, Any] = {
        "n": cfg.n,
        "sampling_precision": cfg.precision,
        "sampling_compiled": cfg.compile,
        "reference": cfg.reference,
        "floor": {name: figure._asdict() for name, figure in floor.items()},
        "samplers": {
            name: {
                "calls_per_image": d.calls,
                "seconds_per_image": d.seconds,
                "figures": {key: figure._asdict() for key, figure in m.figures.items()},
            }
            for (name, d), m in zip(drawn.items(), measured, strict=True)
        },
    }
    if evaluator.accuracy is not None:
        metrics["classifier_accuracy"] = evaluator.accuracy
    leave_pictures(folder, evaluator, samplers, drawn, measured, floor)
    return metrics


SHOWN = ("fd_", "fid_", "precision_", "recall_", "sliced_wasserstein_", "energy_distance_", "mmd_")
"""The figures whose course over the cost is drawn, of the first features that were asked for."""


def leave_pictures(
    folder: Path,
    evaluator: "SampleEvaluator",
    samplers: Mapping[str, "Sampler"],
    drawn: Mapping[str, "GeneratedSamples"],
    measured: "Sequence[SampleMetrics]",
    floor: Mapping[str, "Metric"],
) -> None:
    """Samples of each sampler from the same noise, their nearest training samples, classes, quality against cost."""
    from src.viz import charts, images

    data = evaluator.data
    shown = 12
    real = data.postprocess(data.examples(shown))
    if real.ndim == 4:
        rows = [*(d.first[:shown] for d in drawn.values()), real]
        count = min(map(len, rows))
        images.labelled_rows([row[:count] for row in rows], [*drawn, "real, held out"]).save(folder / "samples.png")
        first, nearest = next(iter(drawn.values())).first, measured[0].neighbors
        closest = nearest.distances.argsort()[:shown]
        pairs = [first[closest], evaluator.training_samples(nearest.numbers[closest])]
        images.labelled_rows(pairs, ["closest samples", "training data"]).save(folder / "nearest.png")
    else:
        held_out_points = data.postprocess(data.examples(2000))
        clouds = [images.captioned(charts.scatter(d.first, held_out_points), name) for name, d in drawn.items()]
        images.side_by_side(clouds, gap=8).save(folder / "samples.png")
    classes = {"real data": evaluator.reference} | {name: d.collected for name, d in drawn.items()}
    seen = {name: each["classifier"].probabilities for name, each in classes.items() if "classifier" in each}
    if seen and data.source and data.source.labels:
        names = data.source.labels.classes
        shares = {
            name: p.argmax(1).bincount(minlength=len(names)) / len(p) for name, p in seen.items() if p is not None
        }
        charts.class_shares(names, shares).save(folder / "classes.png")
    if len(drawn) > 1:
        floors = {stem(name): figure for name, figure in floor.items()}  # of as many, or of as many as there are
        titles = [name for name in measured[0].figures if name.startswith(SHOWN) and stem(name) in floors][:3]
        curves: dict[str, list[tuple[int, list[Metric]]]] = {}
        for (name, d), m in zip(drawn.items(), measured, strict=True):
            steps = f" {samplers[name].steps}"
            curves.setdefault(name.replace(steps, "", 1), []).append((d.calls, [m.figures[t] for t in titles]))
        picture = charts.quality_against_cost(titles, curves, [floors[stem(title)] for title in titles])
        picture.save(folder / "quality.png")


def alignment_settings(cfg: DictConfig) -> "Settings":
    """How alignment is measured."""
    from src.evaluation.alignment import Settings

    own = cfg.alignment
    scales = list(own.scales) if isinstance(own.scales, ListConfig) else [own.scales]
    return Settings(scales, own.n, own.detector_steps, cfg.seed, cfg.batch_size, Path(cfg.cache))


def build_benchmark(cfg: DictConfig, opened: "OpenedRun", processes: "Processes") -> "PromptBenchmark | None":
    """What samples are asked to be, if that is to be measured and can be."""
    if not cfg.alignment.enabled or opened.data.condition is None:
        return None
    from src.evaluation import alignment

    with usage_errors():
        benchmark = alignment.build_benchmark(
            opened.data, alignment_settings(cfg), processes, lambda steps: progress(steps, "Detector", processes.rank)
        )
    if benchmark is None and processes.rank == 0:
        print(
            "How often samples show what they were asked to is measured of images by class and of data=shapes by "
            "caption, not of this run's conditions."
        )
    return benchmark


def alignment(
    cfg: DictConfig,
    folder: Path,
    opened: "OpenedRun",
    name: str,
    sampler: "Sampler",
    benchmark: "PromptBenchmark",
    processes: "Processes",
) -> dict[str, Any]:
    """How often samples show what they were asked to, and how much they vary, over scales of guidance."""
    from tqdm import tqdm

    from src.evaluation.alignment import at_scale, best, curves, right_of, sample_and_score, scales_of
    from src.evaluation.quality import seconds_of_call
    from src.viz import charts, images

    module = opened.module
    settings = alignment_settings(cfg)
    scales = scales_of(module, sampler, settings.scales)
    calls = {scale: module.network_calls(at_scale(sampler, scale)) for scale in scales}
    total = benchmark.n * len(benchmark.prompts)
    size = min(settings.batch_size, -(-total // processes.count))
    turns = -(-total // (size * processes.count))
    seconds = seconds_of_call(module, size) * turns * sum(calls.values())
    if processes.rank == 0:
        alone = (
            "" if scales == sorted({*settings.scales}) else ", as this run never learned what is asked for by nothing"
        )
        print(
            f"Drawing {total} samples by {name} at guidance {', '.join(f'{scale:g}' for scale in scales)}{alone}: "
            f"about {duration(seconds)} on {processes.count} x {processes.device.type}",
            flush=True,
        )
    bar = tqdm(
        total=total * sum(calls.values()), unit="call", unit_scale=True, desc="Alignment", disable=processes.rank > 0
    )
    with bar, usage_errors():
        asked = sample_and_score(
            module,
            sampler,
            benchmark,
            opened.data,
            settings._replace(scales=scales),
            processes,
            lambda scale, samples: advance(bar, calls[scale], samples),
        )
    if processes.rank > 0:
        return {}
    found, scale = asked.found, best(asked.found)
    charts.alignment_against_diversity(curves(found), right_of(benchmark.own).value).save(folder / "alignment.png")
    titles, rows = zip(*asked.shown[scale], strict=True)
    images.captioned(images.rows(rows, titles), f"asked for, at guidance {scale:g}").save(folder / "asked.png")
    return {
        "alignment": {
            "sampler": name,
            "n": benchmark.n,
            "judge": {named: figure._asdict() for named, figure in benchmark.own.items()},
            "asked": {
                group: {
                    f"{scale:g}": {
                        "figures": {named: figure._asdict() for named, figure in each.figures.items()},
                        "by_prompt": each.by_prompt,
                    }
                    for scale, each in of_scale.items()
                }
                for group, of_scale in found.items()
            },
        }
    }


def advance(bar: Any, calls: int, samples: int) -> None:
    """Move a bar of network calls on by so many samples."""
    bar.update(calls * samples)


def bound_of(opened: "OpenedRun", batches: Sequence[range], cfg: DictConfig, processes: "Processes") -> "Bound":
    """The bound of held-out samples, batch by batch, each process a share of these."""
    import torch

    from src.evaluation.likelihood import Bound, Errors, bounds

    mine = processes.share(batches)

    def load(batch: range) -> "tuple[torch.Tensor, torch.Tensor | None]":
        return held_out(opened, batch).to(opened.module.device), conditions(opened, batch)

    def show(batch: range, passes: Iterable[int]) -> Iterable[int]:
        return progress(passes, f"Bound, samples {batch.start + 1} to {batch.stop}", processes.rank)

    def together(errors: Errors) -> Errors:
        return Errors(*(torch.stack(part).sum(0) for part in zip(*processes.gather(errors), strict=True)))

    parts = bounds(opened.module, mine, load, cfg.seed, cfg.num_terms, cfg.reverse_variance, show, together)
    prior, total, *sums = zip(*processes.gather_in_turn(parts), strict=True)
    return Bound(torch.cat(prior), torch.cat(total), *(torch.stack(part).sum(0) for part in sums))


def held_out(opened: "OpenedRun", places: range) -> "torch.Tensor":
    """Held-out samples of these places as the network sees them."""
    data = opened.data
    assert data.source is not None
    return data.preprocess(data.source.fetch(data.val_indices[places.start : places.stop]))


def conditions(opened: "OpenedRun", places: range) -> "torch.Tensor | None":
    """What held-out samples show, of a run that takes conditions, on its device."""
    from src.data.conditions import encode_conditions

    data = opened.data
    assert data.source is not None
    cond = encode_conditions(data.condition, data.source, data.val_indices[places.start : places.stop])
    return None if cond is None else cond.to(opened.module.device)


def against_the_exact(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Every sampler, with the exact denoiser of a distribution that is known, against the exact answer."""
    names = [name for name in config_groups()["schedule"] if name != "custom"]  # which needs betas
    if cfg.analytic_schedule not in names:
        hint = nearest(cfg.analytic_schedule, names) or f": choose from {', '.join(names)}"
        raise UsageError(f"unknown analytic_schedule '{cfg.analytic_schedule}'{hint}")

    from src.config.arguments import check_arguments
    from src.diffusion.noise import Spacing
    from src.runs import components
    from src.viz import charts

    with usage_errors():
        if not cfg.analytic_steps or min(cfg.analytic_steps) < 2 or cfg.analytic_samples < 10:
            raise ValueError(
                f"needs analytic_steps of at least 2 and 10 analytic_samples, got {list(cfg.analytic_steps)} and "
                f"{cfg.analytic_samples}"
            )
        check_arguments(cfg.analytic, "analytic")
        check_seeds(cfg)
        data = components.make(cfg.analytic)
        node = OmegaConf.load(CONF / "schedule" / f"{cfg.analytic_schedule}.yaml")
        assert isinstance(node, DictConfig)
        schedule = components.build_schedule(node.get("schedule", node), 1.0, False)
        spacings: list[Any] = components.names_of(cfg.analytic_spacing) or [None]
        if unknown := set(spacings) - {None, *get_args(Spacing)}:
            raise ValueError(
                f"analytic_spacing={','.join(map(str, unknown))} must be one or a list of "
                f"{', '.join(get_args(Spacing))}, or null for each sampler's own"
            )
        samplers = {}
        for name in config_groups()["sampler"]:
            if name == "diffusers":
                continue
            settings = OmegaConf.load(CONF / "sampler" / f"{name}.yaml")
            assert isinstance(settings, DictConfig)
            sampler = components.build_sampler(settings)
            for spacing in spacings:
                samplers[f"{name} {spacing}" if len(spacings) > 1 else name] = (
                    sampler if spacing is None else sampler._replace(spacing=spacing)
                )

    from src.evaluation.sampler_accuracy import compare_samplers

    steps = list(cfg.analytic_steps)
    results, chance = compare_samplers(
        data, schedule, samplers, steps, cfg.analytic_samples, cfg.seed, lambda it: progress(it, "Samplers")
    )
    grids = "the grid of each sampler" if spacings == [None] else f"spacing {', '.join(spacings)}"
    width = max(18, *(len(name) + 1 for name in samplers))
    lines = [
        f"Distance to where the exact flow leads (root mean square), {grids}:",
        f"{'sampler':<{width}}" + "".join(f"{f'{n} steps':>12}" for n in steps),
        *(f"{name:<{width}}" + "".join(f"{e:>12.2e}" for e in r.flow) for name, r in results.items() if r.flow),
        "",
        f"Distance of mean and covariance (chance alone gives {chance:.1e}):",
        f"{'sampler':<{width}}" + "".join(f"{f'{n} steps':>12}" for n in steps),
        *(f"{name:<{width}}" + "".join(f"{e:>12.2e}" for e in r.moments) for name, r in results.items()),
    ]
    begin(folder)
    (folder / "samplers.txt").write_text("\n".join(lines) + "\n")
    charts.sampler_errors({name: (r.evaluations, r.flow, r.moments) for name, r in results.items()}, chance).save(
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
    launch("evaluate", evaluate, together="sampler")
