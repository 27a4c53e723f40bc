"""Measure the runs of a comparison: samples of each from the same noise, and the bound on the same validation data."""

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from src.cache import cached, digest
from src.comparison.grouping import RunRecord
from src.comparison.survey import SurveyedRun
from src.config.arguments import check_arguments
from src.config.search_path import CONF
from src.data.module import BaseDataModule
from src.distributed.processes import Processes
from src.errors import usage_errors
from src.evaluation.likelihood import SPECTRUM, bounds, error_by_log_snr, network_passes
from src.evaluation.quality import SampleEvaluator, build_on_rank_0_first, time_network_call
from src.evaluation.reports import load_val, standard_error
from src.evaluation.settings import QualitySettings
from src.runs import components
from src.runs.latents import has_autoencoder
from src.runs.open import OpenedRun, open_run
from src.runs.trust import check_targets, known_targets
from src.training.module import Sampler
from src.viz.tables import USUAL, format_duration, strip_sample_count

NUM_IMAGES, NUM_POINTS = 16, 1000  # samples of a run that the report shows

Measurements = dict[str, Tensor]
"""`metric/<name>`, `baseline/<name>` (3,): value and interval; `cost/<name>` (); `samples`, `real`; `error`."""

MEASURING = (
    *("cache.py", "rng.py", "comparison/measure.py", "training/module.py"),
    *(f"{folder}/**/*.py" for folder in ("data", "diffusion", "evaluation", "metrics", "models")),
)
"""Files and folders of src whose code determines the measurements. They are part of the cache key."""


def measure_run(
    run: OpenedRun, sampler: Sampler, evaluator: SampleEvaluator, cfg: DictConfig, advance: Callable[[int], object]
) -> Measurements:
    """Return the metrics of a model's samples, the first samples, and the bound and error of validation samples.

    `advance` receives the number of samples that completed a sampler step, or a network call of the bound.
    """
    is_latent = run.data.displayed is not run.data
    module, data, condition = run.module, run.data if is_latent else evaluator.data.displayed, run.data.condition
    data.setup()
    generated = evaluator.draw(
        module, sampler, lambda count: advance(count * sampler.steps), condition=condition, decode=data.postprocess
    )
    (samples,) = evaluator.measure([generated])
    result = {f"metric/{name}": torch.tensor(metric) for name, metric in samples.metrics.items()}
    result["cost/calls_per_image"] = torch.tensor(generated.calls)
    result["cost/seconds_per_image"] = torch.tensor(generated.seconds)
    num_shown = NUM_IMAGES if generated.first.ndim > 2 else NUM_POINTS
    result["samples"] = generated.first[:num_shown]
    result["real"] = data.displayed_examples(num_shown)
    if module.coupling == "ot":  # the bound describes another model
        result["error"] = torch.full((len(SPECTRUM) - 1,), torch.nan)
        return result
    positions = range(count_val(data, cfg))
    batches = [positions[start : start + cfg.batch_size] for start in range(0, len(positions), cfg.batch_size)]
    load = functools.partial(load_val, module, data, condition)
    parts = bounds(module, batches, load, cfg.seed, cfg.num_terms, cfg.reverse_variance, advance)
    total = torch.cat([part.total for part in parts])
    error = 1.96 * standard_error(total)
    result["metric/bits_per_dim"] = total.mean() + torch.tensor([0, -error, error])
    result["error"] = error_by_log_snr(parts, module.schedule, SPECTRUM)
    return result


def with_metrics(record: RunRecord, measurements: Measurements) -> RunRecord:
    metrics, costs = values_below("metric", measurements), values_below("cost", measurements)
    return replace(
        record,
        values={**{name: value for name, (value, _, _) in metrics.items()}, **record.values},
        intervals={name: (low, high) for name, (_, low, high) in metrics.items() if not math.isnan(low)},
        costs={**record.costs, **costs},
    )


def baselines_of(measurements: Measurements) -> dict[str, tuple[float, float, float]]:
    """Return the real-data baseline of each metric, which may use another number of samples."""
    measured = {strip_sample_count(name): each for name, each in values_below("baseline", measurements).items()}
    baselines = {}
    for name in values_below("metric", measurements):
        if each := measured.get(strip_sample_count(name)):
            baselines[name] = tuple(each)
        elif usual := USUAL.get(name.split("_")[0]):
            baselines[name] = (float(usual),) * 3
    return baselines


def values_below(node: str, measurements: Measurements) -> dict[str, Any]:
    """Return the measurements named `node`/<name>, by name."""
    return {k.removeprefix(f"{node}/"): v.tolist() for k, v in measurements.items() if k.startswith(f"{node}/")}


def open_surveyed(run: SurveyedRun, cfg: DictConfig) -> OpenedRun:
    """Open a surveyed run with the paths of this machine; `cfg.autoencoder` replaces that of a run on latents."""
    autoencoder = cfg.autoencoder if has_autoencoder(run.settings) else None
    places = {"data_root": cfg.data.root, "autoencoder": autoencoder, "device": str(cfg.device)}
    return open_run(None, str(run.checkpoint), cfg.ema, cfg.trust, **places)


def compared_sampler_settings(run: SurveyedRun, cfg: DictConfig) -> DictConfig:
    """Return the settings of the comparison's sampler, or of the run's own."""
    return components.sampler_settings(cfg.sampler, OmegaConf.create(run.settings["sampler"]))


def build_compared_sampler(run: SurveyedRun, cfg: DictConfig) -> Sampler:
    """Return the comparison's sampler, or the run's own. Raises ValueError for an untrusted or invalid one."""
    if not cfg.trust:
        check_targets({"sampler": run.settings["sampler"]}, known_targets(), run.checkpoint)
    settings = compared_sampler_settings(run, cfg)
    check_arguments(settings, "sampler")
    guidance = run.settings.get("guidance")
    return components.build_sampler(settings, guidance and OmegaConf.create(guidance))


def measure_all(
    runs: Sequence[SurveyedRun],
    samplers: Sequence[Sampler],
    first: OpenedRun,
    cfg: DictConfig,
    settings: QualitySettings,
    processes: Processes,
) -> list[Measurements]:
    """Return the measurements of each run in order; rank 0 only.

    Cached runs are read; the others are divided among the processes, after one printed line with the expected time.
    """
    folder = Path(cfg.cache)
    code, data = code_digest(), data_digest(first)
    keys = [measurement_key(run, cfg, data, code, processes.device.type) for run in runs]
    # Rank 0 decides, before any process writes to the cache.
    missing = processes.gather([k for k, key in enumerate(keys) if not (folder / f"{key}.safetensors").is_file()])[0]

    @functools.cache
    def evaluator() -> tuple[SampleEvaluator, Measurements]:
        with usage_errors():
            built = SampleEvaluator(first.data, settings, type(processes)(processes.device))
        return built, {f"baseline/{name}": torch.tensor(metric) for name, metric in built.baseline().items()}

    own = processes.share(missing)
    if cfg.sampler._target_ is not None:  # training already checked each run's own sampler
        with usage_errors():
            for k in own:
                open_surveyed(runs[k], cfg).module.check_sampler(samplers[k])
    total = 0
    if missing:
        first.to(processes.device)
        build_on_rank_0_first(processes, evaluator)
        passes = network_passes(first.module.schedule, cfg.num_terms, cfg.reverse_variance)
        bound_calls = passes * count_val(first.data, cfg)
        total = sum(cfg.n * samplers[k].steps + bound_calls for k in own)
        if processes.rank == 0:
            announce_runs(first, samplers[missing[0]], cfg, bound_calls, len(missing), len(runs), processes)
    bar = tqdm(total=total, unit="step", unit_scale=True, desc="Runs", disable=processes.rank > 0 or not missing)

    def measure(k: int) -> Measurements:
        def compute() -> Measurements:
            run = first if k == 0 else open_surveyed(runs[k], cfg)
            run.to(processes.device)
            tools, baseline = evaluator()
            return baseline | measure_run(run, samplers[k], tools, cfg, bar.update)

        bar.set_postfix_str(runs[k].folder.name)
        return cached(folder, keys[k], compute)

    with bar:
        done: dict[int, Measurements] = {}
        for part in processes.gather({k: measure(k) for k in own}):
            done |= part
        return [done[k] if k in done else measure(k) for k in range(len(runs))] if processes.rank == 0 else []


def announce_runs(
    first: OpenedRun,
    sampler: Sampler,
    cfg: DictConfig,
    bound_calls: int,
    num_missing: int,
    num_runs: int,
    processes: Processes,
) -> None:
    """Print how long it takes to measure the missing runs, each with `bound_calls` network calls besides samples."""
    calls, size = first.module.network_calls(sampler), min(cfg.batch_size, cfg.n)
    turns = -(-num_missing // processes.count)
    seconds = time_network_call(first.module, size) / size * (cfg.n * calls + bound_calls) * turns
    others = f" ({num_runs - num_missing} others are cached)" if num_missing < num_runs else ""
    tqdm.write(
        f"Measuring {num_missing} runs{others}: {cfg.n} samples with {calls} network calls each, and the bound of "
        f"validation data; about {format_duration(seconds)} on {processes.count} x {processes.device.type}"
    )


def count_val(data: BaseDataModule, cfg: DictConfig) -> int:
    """Return the number of validation samples in the bound."""
    return min(cfg.num_val or len(data.val_indices), len(data.val_indices))


def data_digest(opened: OpenedRun) -> str:
    opened.data.setup()
    source, indices = opened.data.displayed.source, opened.data.val_indices
    assert source is not None
    parts = (digest(source.fetch(indices[start : start + 256])) for start in range(0, len(indices), 256))
    return digest(len(source), *parts)


def measurement_key(run: SurveyedRun, cfg: DictConfig, data: str, code: str, device: str) -> str:
    """Return the cache key of a run's measurements: a hash of its weights, the settings, the data and the code."""
    with run.checkpoint.open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    names = ["n", "features", "inception_weights", "dinov2_model", "reference", "max_features", "num_memorization"]
    names += ["num_val", "num_terms", "reverse_variance", "batch_size", "seed", "ema"]
    settings = {name: cfg[name] for name in names}
    sampler = OmegaConf.to_container(compared_sampler_settings(run, cfg))
    root = cfg.data.root or run.record.settings.get("data.root")
    parts = [weights, settings, sampler, root, data, code, device, torch.__version__]
    return "compare-" + hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def code_digest() -> str:
    files = [file for pattern in MEASURING for file in sorted((CONF.parent / "src").glob(pattern))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
