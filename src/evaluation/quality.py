"""Quality of a run's samples: all processes draw samples, extractors compute features, metrics compare features.

Every metric has a real-data baseline: the same metric of as many training samples, compared with the same validation
data. `reference="train"` swaps the roles of training and validation data, as in most papers.
"""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from src.cache import digest
from src.data.conditions import Condition, encode_conditions
from src.data.module import BaseDataModule
from src.data.table import TableDataModule
from src.distributed.processes import Processes
from src.evaluation.reverse_variance import Advance
from src.evaluation.settings import QualitySettings
from src.metrics.classifier import Classifier, train_classifier
from src.metrics.collected import Collected, collect_once
from src.metrics.confidence import Metric
from src.metrics.efficientnet import EfficientNet
from src.metrics.features import DinoV2, Extractor, Inception, Pixels, Values
from src.metrics.measure import image_metrics, memorization_metrics, point_metrics
from src.metrics.neighbors import Nearest, nearest_neighbors
from src.rng import key
from src.training.module import DiffusionModule, Sampler

log = logging.getLogger(__name__)
T = TypeVar("T")

MIN_REAL = 6  # minimum numbers of training and of validation samples: the metrics use the fifth nearest neighbor
FEW_VAL = 100  # below this many validation samples, metrics depend on the split, which their intervals do not cover
MAX_PIXELS = 4096
"""Maximum number of values of an image for features=pixels: the covariance has the square of this size."""
MAX_CLASSIFIER_IMAGES = 20_000
"""Training images of the classifier, which are kept in memory; a quarter as many measure its accuracy."""


class GeneratedSamples(NamedTuple):
    """Features and first samples of one sampler."""

    collected: dict[str, Collected]  # features by the name of the extractor
    first: Tensor  # (M, *data) first samples after `postprocess`
    calls: int  # network calls per sample
    seconds: float  # device seconds per sample


class SampleMetrics(NamedTuple):
    """Metrics of one sampler, and the nearest training sample of each of its first samples."""

    metrics: dict[str, Metric]
    neighbors: Nearest  # (M,) by position in the training data, in pixel space or in the space of the points


class SampleEvaluator:
    """Measure samples against the data of a run. Every process needs one and must take part in each call.

    Raises ValueError for features that are not available.
    """

    def __init__(self, data: BaseDataModule, settings: QualitySettings, processes: Processes) -> None:
        settings.check()
        data.setup()
        if (least := min(len(data.val_indices), len(data.train_indices))) < MIN_REAL:
            raise ValueError(
                f"quality=true needs at least {MIN_REAL} validation and training samples, found {least}; "
                "use more data, or add quality=false to src.evaluate"
            )
        self.data = data
        self.settings = settings
        self.processes = processes
        self.device = metric_device(processes)
        self.extractors = build_on_rank_0_first(processes, self._open_extractors)
        own: Extractor = Pixels() if len(data.shape) == 3 else values_of(data)
        self.spaces = {own.name: own, **{e.name: e for e in self.extractors}}
        """Feature spaces in which copies are searched; always includes the space of the data."""
        splits = {"val": data.val_indices, "train": data.train_indices}
        self.reference = self._collect(splits.pop(settings.reference))
        (self._baseline_indices,) = splits.values()

    def draw(
        self,
        module: DiffusionModule,
        sampler: Sampler,
        advance: Advance = lambda count: None,
        on_step: Callable[[], object] = lambda: None,
        condition: Condition | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> GeneratedSamples:
        """Draw `settings.n` samples by `draw_batches`, with the conditions of training samples.

        `decode` is the `postprocess` of the module's data, by default of those of this evaluator. Sample k equals that
        of `src.sample` with the same seed.
        """
        settings, source = self.settings, self.data.source
        assert source is not None

        def encode(numbers: range) -> Tensor | None:
            return encode_conditions(condition, source, self.data.condition_indices(numbers, settings.seed))

        collected: dict[str, Collected] = {}
        first: list[Tensor] = []
        seconds, began = 0.0, time.perf_counter()
        size = min(settings.batch_size, settings.n)
        for start, x in draw_batches(
            module, sampler, settings.n, size, settings.seed, self.processes, encode, advance, on_step
        ):
            display = (decode or self.data.postprocess)(x).to(self.device)
            _synchronize(self.processes.device)
            seconds += time.perf_counter() - began
            if len(display):
                for extractor in self.extractors:
                    part = Collected.of(extractor(display), start, settings.max_features).to("cpu")
                    before = collected.get(extractor.name)
                    collected[extractor.name] = before.merge(part, settings.max_features) if before else part
            first.append(display[: max(0, settings.num_memorization - start)].cpu())
            began = time.perf_counter()
        return GeneratedSamples(
            {e.name: self._merge(collected.get(e.name)) for e in self.extractors},
            torch.cat(self.processes.gather_in_turn(first)),
            module.network_calls(sampler),
            sum(self.processes.gather(seconds)) / (len(first) * self.processes.count * size),
        )

    def baseline(self) -> dict[str, Metric]:
        """Return the metrics of `settings.n` real samples outside the reference, or of all if fewer. Rank 0 only."""
        chosen = torch.Generator().manual_seed(key(self.settings.seed, "floor"))
        order = torch.randperm(len(self._baseline_indices), generator=chosen)[: self.settings.n].tolist()
        collected = self._collect([self._baseline_indices[k] for k in order])
        return self._compute_metrics(collected) if self.processes.rank == 0 else {}

    def measure(self, generated: Sequence[GeneratedSamples], show_progress: bool = False) -> list[SampleMetrics]:
        """Return the metrics of each sampler; rank 0 only."""
        count = min(self.settings.num_memorization, len(self.data.val_indices))
        groups = [fetch_for_display(self.data, self.data.val_indices[:count]), *(g.first for g in generated)]
        neighbors = self._nearest(torch.cat(groups), show_progress)
        if self.processes.rank > 0:
            return []
        sizes = [len(group) for group in groups]
        parts = {
            space: [Nearest(*part) for part in zip(*(torch.split(x, sizes) for x in each), strict=True)]
            for space, each in neighbors.items()
        }
        results = []
        for k, samples in enumerate(generated):
            metrics = self._compute_metrics(samples.collected)
            for space, (of_val, *of_samples) in parts.items():
                try:
                    distances = of_samples[k].distances, of_val.distances
                    metrics |= memorization_metrics(space, *distances, self.settings.seed)
                except ValueError as error:
                    warnings.warn(f"skipping the search for copies in {space}: {error}", stacklevel=2)
            results.append(SampleMetrics(metrics, next(iter(parts.values()))[1 + k]))
        return results

    def _open_extractors(self) -> list[Extractor]:
        settings = self.settings
        if len(self.data.shape) != 3:
            if settings.features:
                raise ValueError(f"features={','.join(settings.features)} needs images; leave it out")
            if len(self.data.shape) > 1 and self.processes.rank == 0:
                log.info(f"Skipping the metrics of images: samples of shape {self.data.shape} are compared like points")
            return [values_of(self.data)]
        assert self.data.source is not None
        names = settings.features or ["classifier" if self.data.source.labels else "pixels"]
        return [self._open_extractor(name) for name in dict.fromkeys(names)]

    def _open_extractor(self, name: str) -> Extractor:
        if name == "inception":
            return Inception(self.settings.inception_weights, self.device)
        if name == "dinov2":
            return DinoV2(self.settings.dinov2_model, self.device)
        if name == "efficientnet":
            return EfficientNet(self.device)
        if name == "pixels":
            if (size := math.prod(self.data.displayed.shape)) > MAX_PIXELS:
                raise ValueError(
                    f"features=pixels allows {MAX_PIXELS} values per image, got {size}: use features=efficientnet"
                )
            return Pixels()
        assert self.data.source is not None
        if not (labels := self.data.source.labels):
            raise ValueError("features=classifier needs labels: use features=pixels, or a folder of images per class")
        classifier, _ = train_data_classifier(self.data, self.settings.cache, self.device)
        if classifier.accuracy < 0.1 + 1 / len(labels.classes) and self.processes.rank == 0:
            warnings.warn(
                f"the classifier's accuracy on validation images is {classifier.accuracy:.0%}, close to chance: choose "
                "another value of features",
                stacklevel=2,
            )
        return classifier

    def _batches(self, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield this process's batches on its device, each with the position of its first sample."""
        size = self.settings.batch_size
        for start in self.processes.share(range(0, len(indices), size)):
            yield start, fetch_for_display(self.data, indices[start : start + size]).to(self.device)

    def _collect(self, indices: Sequence[int]) -> dict[str, Collected]:
        """Return the features of these samples by extractor; each process caches its part."""
        parts: dict[str, Collected | None] = {e.name: None for e in self.extractors}
        if self.processes.rank * self.settings.batch_size < len(indices):
            cache, limit, batches = self.settings.cache, self.settings.max_features, partial(self._batches, indices)
            data = digest(*(part for start, x in batches() for part in (start, x)))
            for extractor in self.extractors:
                parts[extractor.name] = collect_once(cache, data, extractor, batches, limit).to("cpu")
        return {name: self._merge(part) for name, part in parts.items()}

    def _merge(self, part: Collected | None) -> Collected:
        """Merge the features of all processes; None stands for a process without samples."""
        parts = [p for p in self.processes.gather(part) if p is not None]
        return reduce(lambda merged, each: merged.merge(each, self.settings.max_features), parts)

    def _compute_metrics(self, samples: Mapping[str, Collected]) -> dict[str, Metric]:
        metrics: dict[str, Metric] = {}
        for name, on_cpu in samples.items():
            each, reference = on_cpu.to(self.device), self.reference[name].to(self.device)
            if name == "values":
                metrics |= point_metrics(each.features, reference.features, self.settings.seed)
            else:
                metrics |= image_metrics(name, each, reference, self.settings.seed)
        return metrics

    def _nearest(self, samples: Tensor, show_progress: bool) -> dict[str, Nearest]:
        """Return the nearest training samples of (N, *data) in each space; each process searches a part."""
        parts = torch.split(samples, self.settings.batch_size)
        queries = {
            name: torch.cat([space(part.to(self.device)).features for part in parts])
            for name, space in self.spaces.items()
        }
        result = {name: Nearest.none(x) for name, x in queries.items()}
        batches = self._batches(self.data.train_indices)
        total = -(-len(self.data.train_indices) // (self.settings.batch_size * self.processes.count))
        hidden = self.processes.rank > 0 or not show_progress
        for start, x in tqdm(batches, desc="Nearest", total=total, disable=hidden):
            for name, space in self.spaces.items():
                result[name] = result[name].or_nearer(nearest_neighbors(queries[name], space(x).features, start))
        return {
            name: reduce(Nearest.or_nearer, self.processes.gather(Nearest(*(x.cpu() for x in own))))
            for name, own in result.items()
        }


def draw_batches(
    module: DiffusionModule,
    sampler: Sampler,
    n: int,
    batch_size: int,
    seed: int,
    processes: Processes,
    encode: Callable[[range], Tensor | None],
    advance: Advance = lambda count: None,
    on_step: Callable[[], object] = lambda: None,
) -> Iterator[tuple[int, Tensor]]:
    """Draw samples 0..n - 1, divided among the processes; yield batches with the number of their first sample.

    Sample k depends on (seed, k) and its condition by `encode`. `advance` receives the number of further samples of all
    processes. `on_step` is called at every noise level.

    Raises ValueError after the last batch, in all processes, if any sample is not finite; zeros replace it until then.
    """
    num_corrupted, stride = 0, batch_size * processes.count
    # Sharded weights are gathered jointly, so all processes draw the same number of batches. Drop the surplus.
    for start in range(0, n, stride):
        own = start + processes.rank * batch_size
        numbers = range(own, own + batch_size)
        for x in module.sample(numbers, seed, sampler, cond=encode(numbers)):  # noqa: B007
            on_step()
        x = x[: max(0, n - own)]
        finite = x.isfinite().flatten(1).all(1)
        num_corrupted += int((~finite).sum())
        yield own, torch.where(finite.view(-1, *[1] * (x.ndim - 1)), x, 0)
        advance(min(stride, n - start))
    if num_corrupted := sum(processes.gather(num_corrupted)):
        raise ValueError(
            f"{num_corrupted} of {n} samples are not finite: training diverged, or the sampler or the guidance scale "
            f"{sampler.guidance.scale:g} is unsuitable"
        )


def build_on_rank_0_first(processes: Processes, build: Callable[[], T]) -> T:
    """Return `build()` in every process: rank 0 downloads or trains what the others then read from the cache."""
    result = build() if processes.rank == 0 else None
    processes.gather(None)
    return build() if result is None else result


def metric_device(processes: Processes) -> torch.device:
    """Return the device of the metrics, which need float64; MPS has none."""
    return torch.device("cpu") if processes.device.type == "mps" else processes.device


def train_data_classifier(data: BaseDataModule, cache: Path, device: torch.device) -> tuple[Classifier, int]:
    """Return a classifier of the data's labels, trained once, and the number of images behind its accuracy."""
    assert data.source is not None and data.source.labels is not None
    labels = data.source.labels.targets
    x, train = data.displayed.fetch(data.train_indices[:MAX_CLASSIFIER_IMAGES])
    y, val = data.displayed.fetch(data.val_indices[: MAX_CLASSIFIER_IMAGES // 4])
    held_out = quantize(data, y), labels[val]
    return train_classifier(quantize(data, x), labels[train], held_out, cache, device=device), len(val)


def fetch_for_display(data: BaseDataModule, indices: Sequence[int]) -> Tensor:
    """Return these samples of `data.displayed` after `quantize`."""
    return quantize(data, data.displayed.fetch(indices)[0])


def quantize(data: BaseDataModule, samples: Tensor) -> Tensor:
    """Return raw samples of `data.displayed` with the values that generated samples can have."""
    return data.displayed.postprocess(data.displayed.preprocess(samples))


def values_of(data: BaseDataModule) -> Values:
    return Values(data.std, data.num_categories if isinstance(data, TableDataModule) else ())


def time_network_call(module: DiffusionModule, batch_size: int) -> float:
    """Return the seconds of one network call during sampling: the second of two, since the first may compile."""
    x = torch.zeros(batch_size, *module.shape, device=module.device)
    level = module.schedule.row(module.schedule.num_steps // 2)
    training = module.training
    module.eval()
    with torch.no_grad():
        for _ in range(2):
            _synchronize(module.device)
            began = time.perf_counter()
            module.denoise_for_sampling(x, level)
            _synchronize(module.device)
    module.train(training)
    return time.perf_counter() - began


def estimate_seconds(module: DiffusionModule, n: int, calls: int, batch_size: int, num_processes: int) -> float:
    """Return the estimated seconds to draw n samples, in batches of this size, with this many network calls each."""
    return time_network_call(module, batch_size) * calls * -(-n // (batch_size * num_processes))


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
