"""How good a run's samples are: drawn by all processes, seen by extractors, held against held-out data and the floor.

The floor is what real data come to: as many training samples as were drawn, against the same held-out data. (Or all
of it the other way round, which is how most papers have it.)
"""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from src.cache import digest
from src.data.conditions import Condition, encode_conditions
from src.data.module import BaseDataModule
from src.distributed.processes import Processes
from src.metrics.classifier import Classifier, train_classifier
from src.metrics.collected import Collected, collect_once
from src.metrics.confidence import Metric
from src.metrics.features import DinoV2, Extractor, Inception, Pixels, Values
from src.metrics.measure import image_metrics, memorization_metrics, point_metrics
from src.metrics.memorization import Memorization
from src.metrics.neighbors import Nearest, nearest
from src.rng import key
from src.training.module import DiffusionModule, Sampler

log = logging.getLogger(__name__)


FEATURES = ("classifier", "pixels", "inception", "dinov2")
"""What images can be seen by."""

Progress = Callable[[Iterable[int]], Iterable[int]]
"""Passes its argument on, and shows how far it has come."""

FEWEST = 6
"""Of real data, whose balls reach to the fifth neighbour."""

FEW = 100
"""Of held-out data: figures hang on which ones these happen to be, which no interval over samples tells."""

MOST_PIXELS = 4096
"""Of an image whose pixels are features: their covariance has the square of it."""

CLASSIFIER_TRAINS_ON = 20_000
"""Images at most, and a quarter as many to test it, since they are held in memory."""


class Settings(NamedTuple):
    """How samples are measured."""

    features: Sequence[str] | None = None
    """Of images, any of `FEATURES`; None for the classifier where there are labels, else pixels. Points have theirs."""
    n: int = 1000
    """Samples to draw."""
    seed: int = 0
    """Of the samples' noise, the floor's choice of training samples, and the bootstrap."""
    batch_size: int = 256
    max_features: int = 10_000
    """Of which all figures but the Fréchet distance are: what needs pairs of samples."""
    num_memorization: int = 1000
    """Samples, and held-out ones, that are compared with the training data one by one."""
    reference: str = "val"
    """Or "train", as most papers do; the floor is then of held-out data against these."""
    cache: Path = Path("outputs/cache")
    inception_weights: Path | None = None
    dinov2_model: str = "facebook/dinov2-large"

    def check(self) -> None:
        """Raise ValueError for what cannot be measured."""
        for name in ("n", "batch_size", "max_features", "num_memorization"):
            least = 1 if name == "batch_size" else 10
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.reference not in ("val", "train"):
            raise ValueError(f"samples are measured against held_out or train, got against={self.reference}")
        if unknown := [name for name in self.features or () if name not in FEATURES]:
            raise ValueError(f"unknown features {', '.join(unknown)}: choose from {', '.join(FEATURES)}")


class GeneratedSamples(NamedTuple):
    """What is kept of the samples that one sampler drew."""

    collected: dict[str, Collected]
    """By the extractors' names."""
    first: Tensor
    """(M, *data) the first of them, as files show them."""
    calls: int
    """Of the network for each sample."""
    seconds: float
    """Of one device for each sample."""


class SampleMetrics(NamedTuple):
    """The figures of one sampler's samples, and the training sample that is nearest to each of the first."""

    figures: dict[str, Metric]
    neighbors: Nearest
    """(M,) by places in the training data, in pixels or in the points' space."""


class SampleEvaluator:
    """The data of a run, as measurements see them. Every process needs one, and must take part in each call.

    Raises ValueError for features that are not to be had.
    """

    def __init__(self, data: BaseDataModule, settings: Settings, processes: Processes) -> None:
        settings.check()
        data.setup()
        if (least := min(len(data.val_indices), len(data.train_indices))) < FEWEST:
            raise ValueError(
                f"samples are measured against at least {FEWEST} held-out and {FEWEST} training samples, of one kind "
                f"there are {least}: use more data, or another data.val_fraction when training"
            )
        self.data = data
        self.settings = settings
        self.processes = processes
        # Apple's GPUs know no float64.
        self.device = torch.device("cpu") if processes.device.type == "mps" else processes.device
        if processes.rank == 0:  # what is downloaded or trained, the others find
            self.extractors = self._open()
        processes.gather(None)
        if processes.rank > 0:
            self.extractors = self._open()
        own: Extractor = Pixels() if len(data.shape) == 3 else Values(data.std)
        self.spaces = {own.name: own, **{e.name: e for e in self.extractors}}
        """Where copies are looked for: always in the data's own space, too."""
        reference, self._others = data.val_indices, data.train_indices
        if settings.reference == "train":
            reference, self._others = self._others, reference
        self.reference = self._collect(reference)

    def draw(
        self,
        module: DiffusionModule,
        sampler: Sampler,
        progress: Callable[[int], object],
        on_step: Callable[[], object] = lambda: None,
        condition: Condition | None = None,
    ) -> GeneratedSamples:
        """`settings.n` samples, each process a share of them. `progress` is told how many more have been drawn.

        Sample k is the one that `src.sample` draws with the same seed, asked to be, by the module's `condition`, what
        some training sample shows. `on_step` is called at every level. Raises ValueError, in all processes, if any
        sample is not finite.
        """
        assert self.data.source is not None
        n, max_features, count = self.settings.n, self.settings.max_features, self.processes.count
        size = min(self.settings.batch_size, n)
        # As many batches for each process, of which sharded weights are gathered together; what is too much is dropped.
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
            # Those that are not are told of below, by all processes together.
            display = self.data.postprocess(torch.where(finite.view(-1, *[1] * (x.ndim - 1)), x, 0)).to(self.device)
            _wait_for(self.processes.device)
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
                f"{num_corrupted} of {n} samples are not finite: the model has diverged, or wants another sampler"
            )
        return GeneratedSamples(
            {e.name: self._merge(collected.get(e.name)) for e in self.extractors},
            torch.cat(self.processes.gather_in_turn(first)),
            module.network_calls(sampler),
            sum(self.processes.gather(seconds)) / (turns * count * size),
        )

    @property
    def accuracy(self) -> float | None:
        """Of the classifier on held-out images; None without one."""
        return next((e.accuracy for e in self.extractors if isinstance(e, Classifier)), None)

    def floor(self) -> dict[str, Metric]:
        """The figures of real data that are not the reference, as many as are drawn or as there are.

        Of processes beyond the first nothing.
        """
        chosen = torch.Generator().manual_seed(key(self.settings.seed, "floor"))
        order = torch.randperm(len(self._others), generator=chosen)[: self.settings.n].tolist()
        collected = self._collect([self._others[k] for k in order])
        return self._figures(collected) if self.processes.rank == 0 else {}

    def measure(self, drawn: Sequence[GeneratedSamples], progress: Progress) -> list[SampleMetrics]:
        """The figures of each; of processes beyond the first nothing. `progress` shows the way through the data."""
        count = min(self.settings.num_memorization, len(self.data.val_indices))
        groups = [self._shown(self.data.val_indices[:count]), *(d.first for d in drawn)]
        found = self._nearest(torch.cat(groups), progress)
        if self.processes.rank > 0:
            return []
        parts = {
            name: [
                Nearest(*part)
                for part in zip(*(torch.split(x, [len(g) for g in groups]) for x in each), strict=True)
            ]
            for name, each in found.items()
        }  # fmt: skip
        results = []
        for k, each in enumerate(drawn):
            figures = self._figures(each.collected)
            for name, (usual, *of_samples) in parts.items():
                try:
                    memory = Memorization.of(of_samples[k], usual.distances)
                except ValueError as error:
                    warnings.warn(f"copies are not looked for in {name}: {error}", stacklevel=2)
                else:
                    figures |= memorization_metrics(name, memory, self.settings.seed)
            own = next(iter(parts.values()))
            results.append(SampleMetrics(figures, own[1 + k]))
        return results

    def training_samples(self, places: Tensor) -> Tensor:
        """Those at some places in the training data (M,), as files show them."""
        return self._shown([self.data.train_indices[k] for k in places.tolist()])

    def _open(self) -> list[Extractor]:
        device, settings = self.device, self.settings
        if len(self.data.shape) != 3:
            if settings.features:
                raise ValueError(f"features={list(settings.features)} are of images, the data are points: leave it out")
            return [Values(self.data.std)]
        assert self.data.source is not None
        names = settings.features or ["classifier" if self.data.source.labels else "pixels"]
        opened: list[Extractor] = []
        for name in dict.fromkeys(names):
            match name:
                case "pixels":
                    if (numbers := math.prod(self.data.shape)) > MOST_PIXELS:
                        raise ValueError(
                            f"pixels are features of images of up to {MOST_PIXELS} numbers, these have {numbers}: use "
                            "features=[inception] or [dinov2], or put the images of each kind into a folder of its own"
                        )
                    opened.append(Pixels())
                case "classifier":
                    opened.append(self._classifier())
                case "inception":
                    opened.append(Inception(settings.inception_weights, device))
                case "dinov2":
                    opened.append(DinoV2(settings.dinov2_model, device))
        return opened

    def _classifier(self) -> Extractor:
        assert self.data.source is not None
        labels = self.data.source.labels
        if labels is None:
            raise ValueError(
                "features=[classifier] needs labels, and the data have none: put the images of each kind into a folder "
                "of its own, or use pixels, inception or dinov2"
            )
        made, _ = classifier_of(self.data, self.settings.cache, self.device)
        if made.accuracy < 0.1 + 1 / len(labels.classes) and self.processes.rank == 0:
            warnings.warn(
                f"the classifier is right on {made.accuracy:.0%} of held-out images, little more than chance, so its "
                "features tell little: choose others by features=...",
                stacklevel=2,
            )
        return made

    def _shown(self, indices: Sequence[int]) -> Tensor:
        """Samples of the source as files show them."""
        return shown_of(self.data, indices)

    def _batches(self, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """This process's share of samples of the source, on its device, with the place of each batch's first."""
        size = self.settings.batch_size
        for start in self.processes.share(range(0, len(indices), size)):
            yield start, self._shown(indices[start : start + size]).to(self.device)

    def _collect(self, indices: Sequence[int]) -> dict[str, Collected]:
        """What the extractors see in samples of the source; each process caches its share."""
        parts: dict[str, Collected | None] = {e.name: None for e in self.extractors}
        if self.processes.rank * self.settings.batch_size < len(indices):
            data = digest(*(part for start, x in self._batches(indices) for part in (start, x)))
            for each in self.extractors:
                found = collect_once(
                    self.settings.cache, data, each, lambda: self._batches(indices), self.settings.max_features
                )
                parts[each.name] = found.to("cpu")
        return {name: self._merge(part) for name, part in parts.items()}

    def _merge(self, part: Collected | None) -> Collected:
        """What every process collected, of which those that came late to it have nothing."""
        if part is not None:  # what others have more of is not sent
            part = part.below(self.settings.max_features)
        parts = [p for p in self.processes.gather(part) if p is not None]
        return reduce(lambda whole, each: whole.merge(each, self.settings.max_features), parts)

    def _figures(self, samples: dict[str, Collected]) -> dict[str, Metric]:
        figures: dict[str, Metric] = {}
        for name, of_cpu in samples.items():
            each, reference = of_cpu.to(self.device), self.reference[name].to(self.device)
            if name == "values":
                figures |= point_metrics(each.features, reference.features, self.settings.seed)
            else:
                figures |= image_metrics(name, each, reference, self.settings.seed)
        return figures

    def _nearest(self, samples: Tensor, progress: Progress) -> dict[str, Nearest]:
        """The nearest training samples of some (N, *data), by the spaces' names; each process looks at a share."""
        size, device = self.settings.batch_size, self.device
        queries = {
            name: torch.cat([space(part.to(device)).features for part in torch.split(samples, size)])
            for name, space in self.spaces.items()
        }
        found = {name: Nearest.none(x) for name, x in queries.items()}
        batches = self._batches(self.data.train_indices)
        for _ in progress(self.processes.share(range(0, len(self.data.train_indices), size))):
            start, shown = next(batches)
            for name, space in self.spaces.items():
                found[name] = found[name].or_nearer(nearest(queries[name], space(shown).features, start))
        whole = {}
        for name, own in found.items():
            whole[name] = reduce(Nearest.or_nearer, self.processes.gather(Nearest(*(x.cpu() for x in own))))
        return whole


def classifier_of(data: BaseDataModule, cache: Path, device: torch.device) -> tuple[Classifier, int]:
    """A classifier of images with labels, and on how many held-out ones its accuracy is; trained once."""
    assert data.source is not None and data.source.labels is not None
    numbers = data.source.labels.targets
    x, train = data.fetch(data.train_indices[:CLASSIFIER_TRAINS_ON])
    y, held_out = data.fetch(data.val_indices[: CLASSIFIER_TRAINS_ON // 4])
    learned, tested = data.postprocess(data.preprocess(x)), data.postprocess(data.preprocess(y))
    made = train_classifier(learned, numbers[train], (tested, numbers[held_out]), cache, device=device)
    return made, len(held_out)


def shown_of(data: BaseDataModule, indices: Sequence[int]) -> Tensor:
    """Samples of the data's source as files show them."""
    return data.postprocess(data.preprocess(data.fetch(indices)[0]))


def seconds_of_call(module: DiffusionModule, batch_size: int) -> float:
    """What one call of the network takes for so many samples, as it samples: the second of two, on zeros.

    A network that is to be compiled is so with the first.
    """
    x = torch.zeros(batch_size, *module.shape, device=module.device)
    cond = None if module.null is None else module.null.repeat(batch_size, *[1] * (module.null.ndim - 1))
    level = module.schedule.row(module.schedule.num_steps // 2)
    training = module.training
    module.eval()
    with torch.no_grad():
        for _ in range(2):
            _wait_for(module.device)
            began = time.perf_counter()
            module.denoise_for_sampling(x, level, cond)
            _wait_for(module.device)
    module.train(training)
    return time.perf_counter() - began


def _wait_for(device: torch.device) -> None:
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
