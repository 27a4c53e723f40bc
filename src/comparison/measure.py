"""Measure every run of a comparison."""

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from src.comparison.statistics import Record
from src.comparison.survey import SurveyedRun
from src.config.overrides import CONF
from src.data.conditions import Condition, encode_conditions
from src.errors import usage_errors
from src.evaluation.likelihood import SPECTRUM, ReverseVariance, bounds, error_by_log_snr
from src.evaluation.quality import SampleEvaluator
from src.training.module import DiffusionModule, Sampler
from src.viz.tables import USUAL, stem

if TYPE_CHECKING:
    from src.distributed.processes import Processes
    from src.runs.open import OpenedRun


SHOWN_IMAGES, SHOWN_POINTS = 16, 1000


Measurements = dict[str, Tensor]
"""`figure/<name>`, `floor/<name>` (3,): a value and its interval; `cost/<name>` (); `samples`, `real`; `error`."""


def measured(
    module: DiffusionModule,
    sampler: Sampler,
    evaluator: SampleEvaluator,
    held_out: int | None,
    num_terms: int | None,
    variance: ReverseVariance,
    batch_size: int,
    seed: int,
    advance: Callable[[int], object],
    condition: Condition | None = None,
) -> Measurements:
    """The figures of a model's samples, the first of them, and the bound and error over log-SNR of `held_out` data.

    `condition` is the model's, if it takes any. `advance` is told how many more samples have gone a step of the
    sampler, or a call of the network for the bound.
    """
    data = evaluator.data
    drawn = evaluator.draw(module, sampler, lambda samples: advance(samples * sampler.steps), condition=condition)
    (samples,) = evaluator.measure([drawn], lambda it: it)
    found = {f"figure/{name}": torch.tensor(figure) for name, figure in samples.figures.items()}
    found["cost/calls_per_image"] = torch.tensor(drawn.calls)
    found["cost/seconds_per_image"] = torch.tensor(drawn.seconds)
    some = SHOWN_IMAGES if drawn.first.ndim == 4 else SHOWN_POINTS
    found["samples"] = drawn.first[:some]
    found["real"] = data.postprocess(data.examples(some))

    count = min(held_out or len(data.val_indices), len(data.val_indices))
    source = data.source
    assert source is not None

    def load(places: range) -> tuple[Tensor, Tensor | None]:
        indices = data.val_indices[places.start : places.stop]
        cond = encode_conditions(condition, source, indices)
        return data.preprocess(source.fetch(indices)).to(module.device), None if cond is None else cond.to(
            module.device
        )

    def show(places: range, passes: Iterable[int]) -> Iterator[int]:
        for each in passes:
            yield each
            advance(len(places))

    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    parts = bounds(module, batches, load, seed, num_terms, variance, show)
    total = torch.cat([part.total for part in parts])
    error = 1.96 * total.std() / math.sqrt(count) if count > 1 else torch.full((), math.nan)
    found["figure/bits_per_dim"] = torch.stack([total.mean(), total.mean() - error, total.mean() + error])
    found["error"] = error_by_log_snr(parts, module.schedule, SPECTRUM)
    return found


def with_metrics(record: Record, measurements: Measurements) -> Record:
    """A run's record with what was measured of it."""
    figures = {k.removeprefix("figure/"): v.tolist() for k, v in measurements.items() if k.startswith("figure/")}
    costs = {k.removeprefix("cost/"): v.item() for k, v in measurements.items() if k.startswith("cost/")}
    return replace(
        record,
        values={**{name: value for name, (value, _, _) in figures.items()}, **record.values},
        intervals={name: (low, high) for name, (_, low, high) in figures.items() if not math.isnan(low)},
        costs={**record.costs, **costs},
    )


def baselines_of(measurements: Measurements) -> dict[str, tuple[float, float, float]]:
    """What real data come to, by metrics of samples; the number of the floor's, with which names end, may differ."""
    floors = {k.removeprefix("floor/"): v.tolist() for k, v in measurements.items() if k.startswith("floor/")}
    stems = {stem(name): tuple(floor) for name, floor in floors.items()}
    names = [k.removeprefix("figure/") for k in measurements if k.startswith("figure/")]
    usual = {name: float(value) for name in names if (value := USUAL.get(name.split("_")[0]))}
    return {name: (value, value, value) for name, value in usual.items()} | {
        name: stems[stem(name)] for name in names if stem(name) in stems
    }


MEASURING = (
    "cache.py",
    "rng.py",
    "comparison/measure.py",
    "data",
    "diffusion",
    "evaluation",
    "metrics",
    "models",
    "training/module.py",
)
"""Files and folders of src whose code determines what is measured."""


def opened_run(run: SurveyedRun, cfg: DictConfig) -> "OpenedRun":
    from src.runs.open import open_run

    return open_run(None, str(run.checkpoint), cfg.ema, cfg.trust, cfg.data.root)


def sampler_settings(run: SurveyedRun, cfg: DictConfig) -> DictConfig:
    """The sampler that is asked for, or the run's own."""
    from src.runs import components

    return components.sampler_settings(cfg.sampler, OmegaConf.create(run.settings["sampler"]))


def sampler_of(run: SurveyedRun, cfg: DictConfig) -> "Sampler":
    """The same, built."""
    from src.config.arguments import check_arguments
    from src.runs import components
    from src.runs.trust import check_targets, known_targets

    if not cfg.trust:
        check_targets({"sampler": run.settings["sampler"]}, known_targets(), run.checkpoint)
    settings = sampler_settings(run, cfg)
    check_arguments(settings, "sampler")
    return components.build_sampler(
        settings, run.settings.get("guidance") and OmegaConf.create(run.settings["guidance"])
    )


def measure_all(
    found: Sequence[SurveyedRun],
    samplers: Sequence["Sampler"],
    first: "OpenedRun",
    cfg: DictConfig,
    processes: "Processes",
    print_summary: Callable[..., None],
) -> list["Measurements"]:
    """What is measured of each run, in their order; of processes beyond the first nothing.

    What is in the cache is read; each process measures a share of the other runs.
    """
    from tqdm import tqdm

    from src.cache import cached
    from src.evaluation.likelihood import network_passes
    from src.evaluation.quality import SampleEvaluator, Settings
    from src.runs import components

    folder = Path(cfg.cache)
    code = code_digest()
    data = data_digest(first)
    keys = [measurement_key(run, cfg, data, code, processes.device.type) for run in found]
    # As the first process saw it, before any wrote.
    missing = processes.gather([k for k, key in enumerate(keys) if not (folder / f"{key}.safetensors").is_file()])[0]
    settings = Settings(
        features=components.names_of(cfg.features),
        n=cfg.n,
        seed=cfg.seed,
        batch_size=cfg.batch_size,
        max_features=cfg.max_features,
        num_memorization=cfg.num_memorization,
        reference=cfg.reference,
        cache=folder,
        inception_weights=cfg.inception_weights and Path(cfg.inception_weights),
        dinov2_model=cfg.dinov2_model,
    )

    @functools.cache
    def evaluator() -> tuple["SampleEvaluator", "Measurements"]:
        """With the figures of real data."""
        import torch

        with usage_errors():
            made = SampleEvaluator(first.data, settings, type(processes)(processes.device))
        return made, {f"floor/{name}": torch.tensor(figure) for name, figure in made.floor().items()}

    mine = processes.share(missing)
    if cfg.sampler._target_ is not None:  # a run's own sampler was tried when it was trained
        with usage_errors():
            for k in mine:
                opened_run(found[k], cfg).module.check_sampler(samplers[k])
    total = 0
    if missing:
        if processes.rank == 0:  # what is downloaded or trained, the others find
            evaluator()
        processes.gather(None)
        passes = network_passes(first.module.schedule, cfg.num_terms, cfg.reverse_variance)
        bound = passes * held_out_count(first, cfg)
        total = sum(cfg.n * samplers[k].steps + bound for k in mine)
        print_summary(len(found), len(missing), samplers[missing[0]], bound, first, cfg, processes)
    bar = tqdm(total=total, unit="step", unit_scale=True, desc="Runs", disable=processes.rank > 0 or not missing)

    def measure(k: int) -> "Measurements":
        def compute() -> "Measurements":
            run = first if k == 0 else opened_run(found[k], cfg)
            run.module.to(processes.device)
            tools, floor = evaluator()
            of_bound = cfg.num_val, cfg.num_terms, cfg.reverse_variance
            own = run.data.condition
            return floor | measured(
                run.module, samplers[k], tools, *of_bound, cfg.batch_size, cfg.seed, bar.update, own
            )

        bar.set_postfix_str(found[k].folder.name)
        return cached(folder, keys[k], compute)

    with bar:
        done: dict[int, Measurements] = {}
        for part in processes.gather({k: measure(k) for k in mine}):
            done |= part
        return [done[k] if k in done else measure(k) for k in range(len(found))] if processes.rank == 0 else []


def held_out_count(opened: "OpenedRun", cfg: DictConfig) -> int:
    """The number of held-out samples of which the bound is measured."""
    count = len(opened.data.val_indices)
    return min(cfg.num_val or count, count)


def data_digest(opened: "OpenedRun") -> str:
    """Of the held-out data, and of how many there are in all."""
    from src.cache import digest

    opened.data.setup()
    source, places = opened.data.source, opened.data.val_indices
    assert source is not None
    parts = (digest(source.fetch(places[start : start + 256])) for start in range(0, len(places), 256))
    return digest(len(source), *parts)


def measurement_key(run: SurveyedRun, cfg: DictConfig, data: str, code: str, device: str) -> str:
    """Stands for all that measurements of a run depend on: its weights, how they are measured, and by which code."""
    import torch

    with run.checkpoint.open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    names = [
        "n",
        "features",
        "inception_weights",
        "dinov2_model",
        "reference",
        "max_features",
        "num_memorization",
        "num_val",
        "num_terms",
    ]
    asked = {name: cfg[name] for name in (*names, "reverse_variance", "batch_size", "seed", "ema")}
    sampler = OmegaConf.to_container(sampler_settings(run, cfg))
    root = cfg.data.root or run.record.settings.get("data.root")
    how = [weights, asked, sampler, root, data, code, device, torch.__version__]
    return "compare-" + hashlib.sha256(repr(how).encode()).hexdigest()[:32]


def code_digest() -> str:
    """Return the SHA-256 of the files that determine what is measured."""
    src = CONF.parent / "src"
    named = [src / name for name in MEASURING]
    files = [file for path in named for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
