"""Build and measure the parts of an evaluation from its configuration. Checks of settings do not import torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from omegaconf import DictConfig, ListConfig, OmegaConf
from tqdm import tqdm

from src.config.arguments import check_arguments
from src.config.rules import check_values
from src.config.search_path import config_groups, load_option
from src.errors import format_override, usage_errors
from src.evaluation.settings import AlignmentSettings, QualitySettings
from src.runs import components
from src.runs.checkpoints import find_checkpoint
from src.runs.nodes import instantiate_node
from src.runs.open import OpenedRun, sampler_of
from src.viz.tables import format_duration

if TYPE_CHECKING:
    from src.data.analytic import GaussianMixture
    from src.diffusion.noise import Schedule
    from src.distributed.processes import Processes
    from src.evaluation.benchmarks import PromptBenchmark
    from src.training.module import DiffusionModule, Sampler


def evaluation_settings(cfg: DictConfig) -> tuple[QualitySettings, AlignmentSettings]:
    """Check all settings without importing torch, and return those of quality and alignment."""
    find_checkpoint(cfg.run, cfg.ckpt, cfg.init_from.path)
    check_values(cfg)
    if not all(isinstance(each, DictConfig) for each in sampler_list(cfg)):
        raise ValueError(f"samplers={cfg.samplers} must be a list such as [{{sampler: ddim, steps: 10}}]")
    if not (cfg.likelihood or cfg.quality or cfg.alignment.enabled):
        raise ValueError("likelihood=false quality=false alignment.enabled=false leaves nothing to evaluate")
    quality = quality_settings(cfg)
    own = cfg.alignment
    scales = list(own.scales) if isinstance(own.scales, ListConfig) else [own.scales]
    alignment = AlignmentSettings(scales, own.n, own.detector_steps, cfg.seed, cfg.batch_size, Path(str(cfg.cache)))
    if cfg.quality:
        quality.check()
    if own.enabled:
        alignment.check()
    return quality, alignment


def check_lengths(path: Path, ema: float | ListConfig) -> None:
    """Raise ValueError if a length in `ema` is repeated, or cannot be reconstructed for the checkpoint at `path`."""
    from src.training.checkpoints import read_checkpoint
    from src.training.power_ema import tracked_averages

    override, typed = format_override("ema", ema), list(ema) if isinstance(ema, ListConfig) else None
    lengths: list[Any] = [ema] if typed is None else typed
    if not lengths or len({*lengths}) < len(lengths):
        raise ValueError(f"{override} must list different lengths, such as [0.05,0.1,0.15]")
    tracked = tracked_averages(read_checkpoint(path) if path.is_file() else {}, path, override)
    for length in lengths:
        tracked.reconstruct(length, "ema", typed)


def quality_settings(cfg: DictConfig) -> QualitySettings:
    """Return the settings of sample quality, of src.evaluate or src.compare."""
    settings = {name: cfg[name] for name in QualitySettings._fields} | {"features": names_of(cfg.features)}
    paths = {"cache": Path(str(cfg.cache)), "inception_weights": cfg.inception_weights and Path(cfg.inception_weights)}
    return QualitySettings(**settings | paths)


def names_of(value: Any) -> list[str] | None:
    """Return a name or a sequence of names as a list; None if there is none."""
    return [value] if isinstance(value, str) else list(value) if value else None


def sampler_list(cfg: DictConfig) -> list[Any]:
    """Return the settings of each sampler in `samplers`; empty if only `sampler` is used."""
    return list(cfg.samplers) if isinstance(cfg.samplers, ListConfig) else [cfg.samplers] if cfg.samplers else []


def build_samplers(cfg: DictConfig, opened: OpenedRun) -> dict[str, "Sampler"]:
    """Return the samplers of `samplers`, or that of `sampler`, by the names of `sampler_name`."""
    samplers = {}
    for each in sampler_list(cfg) or [cfg.sampler]:
        typed = OmegaConf.masked_copy(each, [str(k) for k in each if k != "sampler"])
        chosen = OmegaConf.merge(load_option("sampler", str(each.sampler)), typed) if "sampler" in each else typed
        settings = components.sampler_settings(chosen, opened.config.sampler)  # type: ignore[arg-type]
        sampler = sampler_of(opened, settings, cfg.get("guidance"))
        scale = sampler.guidance.scale
        samplers[sampler_name(settings) + (f" guidance {scale:g}" if scale != 1 else "")] = sampler
    return samplers


def sampler_name(settings: DictConfig) -> str:
    """Return the name of a sampler in tables, such as `ddim 20`, with settings that differ from the group's option."""
    name = str(settings._target_).rpartition(".")[2]
    defaults = load_option("sampler", name) if name in config_groups()["sampler"] else OmegaConf.create()
    others = {str(k): v for k, v in settings.items() if k != "steps" and not str(k).startswith("_")}
    changed = [
        f"{k} {v}"
        for k, v in others.items()
        if not (v is None or isinstance(v, DictConfig) or v == OmegaConf.select(defaults, k))
    ]
    return " ".join([name, str(settings.steps), *changed])


def build_analytic(cfg: DictConfig) -> "tuple[GaussianMixture, Schedule, dict[str, Sampler], str]":
    """Return the distribution, the schedule, the samplers, and the name of their time grid, for `analytic=...`.

    Raises ValueError for a setting that is out of range.
    """
    names = [name for name in config_groups()["schedule"] if name != "custom"]  # custom needs betas
    if cfg.analytic_schedule not in names:
        raise ValueError(f"analytic_schedule={cfg.analytic_schedule} must be one of {', '.join(names)}")
    steps = list(cfg.analytic_steps or [])
    if not steps or min(steps) < 2:
        raise ValueError(f"analytic_steps={steps} must hold numbers of at least 2")
    check_values(cfg)
    check_arguments(cfg.analytic, "analytic")
    from src.diffusion.noise import Spacing

    spacings: list[Any] = names_of(cfg.analytic_spacing) or [None]
    if unknown := set(spacings) - {None, *get_args(Spacing)}:
        raise ValueError(
            f"analytic_spacing={','.join(map(str, unknown))} must be null, or one or a list of "
            f"{', '.join(get_args(Spacing))}"
        )
    node = load_option("schedule", cfg.analytic_schedule)
    schedule = components.build_schedule(node.get("schedule", node), 1.0, False)
    samplers = {}
    for name in (name for name in config_groups()["sampler"] if name != "diffusers"):
        sampler = components.build_sampler(load_option("sampler", name))
        for spacing in spacings:
            label = f"{name} {spacing}" if len(spacings) > 1 else name
            samplers[label] = sampler if spacing is None else sampler._replace(spacing=spacing)
    grid = "each sampler's own spacing" if spacings == [None] else f"spacing {', '.join(spacings)}"
    return instantiate_node(cfg.analytic), schedule, samplers, grid


def announce_samples(
    module: "DiffusionModule", n: int, calls: dict[str, int], size: int, what: str, processes: "Processes"
) -> None:
    """Print the estimated time to draw `n` samples in batches of `size`; `calls` are the network calls per sample."""
    from src.evaluation.quality import estimate_seconds

    seconds = estimate_seconds(module, n, sum(calls.values()), size, processes.count)
    if processes.rank == 0:
        tqdm.write(
            f"Drawing {n} samples by {what}: about {format_duration(seconds)} on {processes.count} x "
            f"{processes.device.type}"
        )


def measure_alignment(
    cfg: DictConfig,
    opened: OpenedRun,
    samplers: "dict[str, Sampler]",
    benchmark: "PromptBenchmark",
    settings: AlignmentSettings,
    processes: "Processes",
    folder: Path,
) -> dict[str, Any]:
    """Measure the prompt alignment of the first sampler at each guidance scale that suits the run."""
    from src.evaluation.alignment import possible_scales, with_scale
    from src.evaluation.reports import evaluate_alignment

    name, sampler = next(iter(samplers.items()))
    scales = possible_scales(opened.module, sampler, settings.scales)
    calls = {f"{scale:g}": opened.module.network_calls(with_scale(sampler, scale)) for scale in scales}
    name, total = name.partition(" guidance ")[0], benchmark.n * len(benchmark.prompts)
    reason = "" if scales == sorted({*settings.scales}) else " (trained with conditioning.cond_drop_prob=0)"
    size = min(cfg.batch_size, -(-total // processes.count))
    announce_samples(opened.module, total, calls, size, f"{name} at guidance {', '.join(calls)}{reason}", processes)
    settings = settings._replace(scales=scales)
    result = evaluate_alignment(opened.module, opened.data, sampler, benchmark, settings, processes, folder)
    return result and {"sampler": name, **result}


def build_alignment(settings: AlignmentSettings, opened: OpenedRun, processes: "Processes") -> "PromptBenchmark | None":
    """Return the prompt benchmark of a conditional run, or None with one printed line if there is none."""
    if opened.data.condition is None:
        return None
    from src.evaluation.benchmarks import build_benchmark

    with usage_errors():
        benchmark = build_benchmark(opened.data, settings, processes)
    if benchmark is None and processes.rank == 0:
        tqdm.write(
            "Skipping alignment: it supports images with conditioning=class, and data=shapes, kanji and emoji with "
            "conditioning=text."
        )
    return benchmark
