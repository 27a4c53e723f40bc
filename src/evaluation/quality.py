"""Quality of a run's samples: all processes draw samples, extractors compute features, metrics compare features.

Every metric has a real-data baseline: the same metric of as many training samples, compared with the same validation
data. `reference="train"` swaps the roles of training and validation data, as in most papers.
"""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from src.cache import digest
from src.data.conditions import Condition, encode_conditions
from src.data.module import BaseDataModule
from src.data.table import TableDataModule
from src.distributed.processes import Processes
from src.evaluation.reverse_variance import Progress
from src.evaluation.settings import QualitySettings
from src.metrics.classifier import Classifier, train_classifier
from src.metrics.collected import Collected, collect_once
from src.metrics.confidence import Metric
from src.metrics.features import DinoV2, Extractor, Inception, Pixels, Values
from src.metrics.measure import image_metrics, memorization_metrics, point_metrics
from src.metrics.neighbors import Nearest, nearest_neighbors
from src.rng import key
from src.training.module import DiffusionModule, Sampler

log = logging.getLogger(__name__)

MIN_REAL = 6
"""Minimum numbers of training and of validation samples: the metrics use the fifth nearest neighbor."""
FEW_VAL = 100
"""Below this many validation samples, metrics depend on the split, which their intervals do not cover."""
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
                f"quality=true needs at least {MIN_REAL} validation and training samples, found {least}: use more data"
            )
        self.data = data
        self.settings = settings
        self.processes = processes
        # MPS has no float64.
        self.device = torch.device("cpu") if processes.device.type == "mps" else processes.device
        if processes.rank == 0:  # downloads or trains; the other processes read the result
            self.extractors = self._open_extractors()
        processes.gather(None)
        if processes.rank > 0:
            self.extractors = self._open_extractors()
        own: Extractor = Pixels() if len(data.shape) == 3 else values_of(data)
        self.spaces = {own.name: own, **{e.name: e for e in self.extractors}}
        """Feature spaces in which copies are searched; always includes the space of the data."""
        reference, self._baseline_indices = data.val_indices, data.train_indices
        if settings.reference == "train":
            reference, self._baseline_indices = self._baseline_indices, reference
        self.reference = self._collect(reference)

    def draw(
        self,
        module: DiffusionModule,
        sampler: Sampler,
        progress: Callable[[int], object],
        on_step: Callable[[], object] = lambda: None,
        condition: Condition | None = None,
    ) -> GeneratedSamples:
        """Draw `settings.n` samples, divided among the processes. `progress` receives the number of further samples.

        Sample k equals that of `src.sample` with the same seed; its condition, if the module takes one, is that of
        some training sample. `on_step` is called at every noise level.

        Raises ValueError, in all processes, if any sample is not finite.
        """
        assert self.data.source is not None
        n, max_features, count = self.settings.n, self.settings.max_features, self.processes.count
        size = min(self.settings.batch_size, n)
        # Sharded weights are gathered jointly, so all processes draw the same number of batches. Drop the surplus.
        turns = -(-n // (size * count))
        collected: dict[str, Collected] = {}
        first: list[Tensor] = []
        seconds, num_corrupted = 0.0, 0
        for turn in range(turns):
            start = (turn * count + self.processes.rank) * size
            began = time.perf_counter()
            numbers = range(start, start + size)
            indices = self.data.condition_indices(numbers, self.settings.seed)
            cond = encode_conditions(condition, self.data.source, indices)
            for x in module.sample(numbers, self.settings.seed, sampler, cond=cond):  # noqa: B007
                on_step()
            x = x[: max(0, n - start)]
            finite = x.isfinite().flatten(1).all(1)
            num_corrupted += int((~finite).sum())
            # Zeros replace corrupted samples until all processes raise together below.
            display = self.data.postprocess(torch.where(finite.view(-1, *[1] * (x.ndim - 1)), x, 0)).to(self.device)
            _synchronize(self.processes.device)
            seconds += time.perf_counter() - began
            if len(display):
                for extractor in self.extractors:
                    part = Collected.of(extractor(display), start, max_features).to("cpu")
                    before = collected.get(extractor.name)
                    collected[extractor.name] = before.merge(part, max_features) if before else part
            first.append(display[: max(0, self.settings.num_memorization - start)].cpu())
            progress(min(size * count, n - turn * count * size))
        if num_corrupted := sum(self.processes.gather(num_corrupted)):
            raise ValueError(
                f"{num_corrupted} of {n} samples are not finite: training diverged, or sampler=... is unsuitable"
            )
        return GeneratedSamples(
            {e.name: self._merge(collected.get(e.name)) for e in self.extractors},
            torch.cat(self.processes.gather_in_turn(first)),
            module.network_calls(sampler),
            sum(self.processes.gather(seconds)) / (turns * count * size),
        )

    def baseline(self) -> dict[str, Metric]:
        """Return the metrics of `settings.n` real samples outside the reference, or of all if fewer. Rank 0 only."""
        chosen = torch.Generator().manual_seed(key(self.settings.seed, "floor"))
        order = torch.randperm(len(self._baseline_indices), generator=chosen)[: self.settings.n].tolist()
        collected = self._collect([self._baseline_indices[k] for k in order])
        return self._compute_metrics(collected) if self.processes.rank == 0 else {}

    def measure(self, generated: Sequence[GeneratedSamples], progress: Progress) -> list[SampleMetrics]:
        """Return the metrics of each sampler; rank 0 only. `progress` wraps the batches of training data."""
        count = min(self.settings.num_memorization, len(self.data.val_indices))
        groups = [fetch_for_display(self.data, self.data.val_indices[:count]), *(g.first for g in generated)]
        neighbors = self._nearest(torch.cat(groups), progress)
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

    def training_samples(self, positions: Tensor) -> Tensor:
        """Return the training samples at these positions (M,) after `postprocess`."""
        return fetch_for_display(self.data, [self.data.train_indices[k] for k in positions.tolist()])

    def _open_extractors(self) -> list[Extractor]:
        device, settings = self.device, self.settings
        if len(self.data.shape) != 3:
            if settings.features:
                raise ValueError(f"features={','.join(settings.features)} needs images; leave it out")
            if len(self.data.shape) > 1 and self.processes.rank == 0:
                log.info(f"Skipping the metrics of images: samples of shape {self.data.shape} are compared like points")
            return [values_of(self.data)]
        assert self.data.source is not None
        names = settings.features or ["classifier" if self.data.source.labels else "pixels"]
        extractors: list[Extractor] = []
        for name in dict.fromkeys(names):
            match name:
                case "pixels":
                    if (size := math.prod(self.data.shape)) > MAX_PIXELS:
                        raise ValueError(
                            f"features=pixels allows {MAX_PIXELS} values per image, got {size}: use features=inception"
                        )
                    extractors.append(Pixels())
                case "classifier":
                    if not (labels := self.data.source.labels):
                        raise ValueError(
                            "features=classifier needs labels: use features=pixels, or a folder of images per class"
                        )
                    classifier, _ = train_data_classifier(self.data, settings.cache, device)
                    extractors.append(classifier)
                    if classifier.accuracy < 0.1 + 1 / len(labels.classes) and self.processes.rank == 0:
                        warnings.warn(
                            f"the classifier's accuracy on validation images is {classifier.accuracy:.0%}, close to "
                            "chance: choose other features=...",
                            stacklevel=2,
                        )
                case "inception":
                    extractors.append(Inception(settings.inception_weights, device))
                case "dinov2":
                    extractors.append(DinoV2(settings.dinov2_model, device))
        return extractors

    def _batches(self, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield this process's batches on its device, each with the position of its first sample."""
        size = self.settings.batch_size
        for start in self.processes.share(range(0, len(indices), size)):
            yield start, fetch_for_display(self.data, indices[start : start + size]).to(self.device)

    def _collect(self, indices: Sequence[int]) -> dict[str, Collected]:
        """Return the features of these samples by extractor; each process caches its part."""
        parts: dict[str, Collected | None] = {e.name: None for e in self.extractors}
        if self.processes.rank * self.settings.batch_size < len(indices):
            data = digest(*(part for start, x in self._batches(indices) for part in (start, x)))
            for extractor in self.extractors:
                part = collect_once(
                    self.settings.cache, data, extractor, lambda: self._batches(indices), self.settings.max_features
                )
                parts[extractor.name] = part.to("cpu")
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

    def _nearest(self, samples: Tensor, progress: Progress) -> dict[str, Nearest]:
        """Return the nearest training samples of (N, *data) in each space; each process searches a part."""
        size, device = self.settings.batch_size, self.device
        queries = {
            name: torch.cat([space(part.to(device)).features for part in torch.split(samples, size)])
            for name, space in self.spaces.items()
        }
        result = {name: Nearest.none(x) for name, x in queries.items()}
        batches = self._batches(self.data.train_indices)
        for _ in progress(self.processes.share(range(0, len(self.data.train_indices), size))):
            start, x = next(batches)
            for name, space in self.spaces.items():
                result[name] = result[name].or_nearer(nearest_neighbors(queries[name], space(x).features, start))
        return {
            name: reduce(Nearest.or_nearer, self.processes.gather(Nearest(*(x.cpu() for x in own))))
            for name, own in result.items()
        }


def train_data_classifier(data: BaseDataModule, cache: Path, device: torch.device) -> tuple[Classifier, int]:
    """Return a classifier of the data's labels, trained once, and the number of images behind its accuracy."""
    assert data.source is not None and data.source.labels is not None
    labels = data.source.labels.targets
    x, train = data.fetch(data.train_indices[:MAX_CLASSIFIER_IMAGES])
    y, val = data.fetch(data.val_indices[: MAX_CLASSIFIER_IMAGES // 4])
    images, val_images = (data.postprocess(data.preprocess(part)) for part in (x, y))
    classifier = train_classifier(images, labels[train], (val_images, labels[val]), cache, device=device)
    return classifier, len(val)


def fetch_for_display(data: BaseDataModule, indices: Sequence[int]) -> Tensor:
    """Return these samples of the source after `preprocess` and `postprocess`, as generated samples are displayed."""
    return data.postprocess(data.preprocess(data.fetch(indices)[0]))


def values_of(data: BaseDataModule) -> Values:
    """Return the feature space of points or rows of a table."""
    return Values(data.std, data.num_categories if isinstance(data, TableDataModule) else ())


def time_network_call(module: DiffusionModule, batch_size: int) -> float:
    """Return the seconds of one network call during sampling: the second of two, since the first may compile."""
    x = torch.zeros(batch_size, *module.shape, device=module.device)
    cond = None if module.null is None else module.null.repeat(batch_size, *[1] * (module.null.ndim - 1))
    level = module.schedule.row(module.schedule.num_steps // 2)
    training = module.training
    module.eval()
    with torch.no_grad():
        for _ in range(2):
            _synchronize(module.device)
            began = time.perf_counter()
            module.denoise_for_sampling(x, level, cond)
            _synchronize(module.device)
    module.train(training)
    return time.perf_counter() - began


def estimate_seconds(module: DiffusionModule, n: int, calls: int, batch_size: int, num_processes: int) -> float:
    """Return the estimated seconds to draw n samples, in batches of this size, with this many network calls each."""
    return time_network_call(module, batch_size) * calls * -(-n // (batch_size * num_processes))


def _synchronize(device: torch.device) -> None:
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
