"""Prompt benchmarks: prompts for a run's samples, and a classifier or detector that scores the samples.

The scorer is trained once on real images. Its accuracy on other real images is reported next to its scores.
"""

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from src.data.conditions import Classes
from src.data.glyphs import GlyphSource
from src.data.module import BaseDataModule
from src.data.scene_images import PLACES, paint, place, render
from src.data.scenes import ATTRIBUTES, WORDINGS, Object, Scene, describe_scene, parse_scene
from src.data.shapes import Shapes
from src.data.text import TextCondition
from src.distributed.processes import Processes
from src.evaluation.quality import (
    build_on_rank_0_first,
    fetch_for_display,
    metric_device,
    quantize,
    train_data_classifier,
)
from src.evaluation.settings import DETECTOR_STEPS, AlignmentSettings
from src.metrics.confidence import Metric, metric_name, wilson
from src.metrics.detector import Detections, LabeledImages, train_detector
from src.metrics.retrieval import target_ranks
from src.rng import key

MIN_ACCURACY = 0.99  # accuracy that the detector needs in each attribute, on renders that it was not trained on
TEST_RENDERS = 2000  # renders that measure this accuracy
PER_CAPTION = 8  # samples per caption, if there are enough
MAX_REAL = 32  # real images per prompt that define the unit of diversity
TOP = 5  # A glyph is among the `TOP` nearest
NOISE = 0.1  # standard deviation of the noise that tests whether the nearest glyph is found; pixels are in [0, 1]
OBJECT_ATTRIBUTES = ("shape", "color", "size")  # attributes that the detector of shapes predicts for each object


class PromptBenchmark(Protocol):
    """Prompts, and a scorer of the samples drawn for them."""

    prompts: Mapping[str, Sequence[Any]]  # prompts by group, in the form that the condition accepts
    n: int  # samples per group
    attributes: Sequence[str]
    detector_accuracy: Mapping[str, Metric]
    """The scorer's accuracy on real images in each attribute and in all attributes."""

    def correct(self, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        """Score images (N, C, H, W) uint8 for N prompts: (N, attributes), 1 correct, 0 wrong, NaN not in the prompt."""
        ...

    def real(self, prompt: Any) -> Tensor:
        """Return real images (M, C, H, W) uint8 that show the prompt."""
        ...


def build_benchmark(data: BaseDataModule, settings: AlignmentSettings, processes: Processes) -> PromptBenchmark | None:
    """Return the benchmark for a run's data, or None if there is none. Every process must call this.

    Raises ValueError for invalid settings, and for a detector that is not accurate enough.
    """
    settings.check()
    data.setup()
    source = data.displayed.source
    benchmark: type[ShapesBenchmark | GlyphBenchmark | ClassBenchmark]
    if isinstance(source, Shapes) and data.condition is not None:
        benchmark = ShapesBenchmark
    elif isinstance(source, GlyphSource) and isinstance(data.condition, TextCondition):
        benchmark = GlyphBenchmark
    elif isinstance(data.condition, Classes) and len(data.shape) == 3:
        benchmark = ClassBenchmark
    else:
        return None
    return build_on_rank_0_first(processes, lambda: benchmark(data, settings, metric_device(processes)))


class ClassBenchmark:
    """Cycles through the classes of a run, scored by a classifier trained on the same images."""

    attributes: Sequence[str] = ("class",)

    def __init__(self, data: BaseDataModule, settings: AlignmentSettings, device: torch.device) -> None:
        assert data.source is not None and data.source.labels is not None
        self.data, self.labels = data, data.source.labels
        num_classes = len(self.labels.classes)
        self.n = max(500, 2 * num_classes) if settings.n is None else settings.n
        if self.n < 2 * num_classes:
            raise ValueError(
                f"alignment.n={self.n} must be at least {2 * num_classes}: 2 samples for each of {num_classes} classes"
            )
        self.classes = list(self.labels.classes)
        self.prompts: Mapping[str, Sequence[str]] = {"classes": self.classes}
        self.device = device
        self.classifier, tested = train_data_classifier(data, settings.cache, device)
        accuracy = wilson(round(self.classifier.accuracy * tested), tested)
        self.detector_accuracy: Mapping[str, Metric] = {
            metric_name(each, tested): accuracy for each in ("class", "all")
        }

    def correct(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        parts = [self.classifier(part.to(self.device)).probabilities for part in torch.split(images, 256)]
        predicted = torch.cat([p.argmax(1).cpu() for p in parts if p is not None])
        return (predicted == torch.tensor([self.classes.index(prompt) for prompt in prompts])).double()[:, None]

    def real(self, prompt: str) -> Tensor:
        wanted = self.classes.index(prompt)
        indices = [k for k in self.data.train_indices if self.labels.targets[k] == wanted][:MAX_REAL]
        return fetch_for_display(self.data, indices) if indices else torch.empty(0, *self.data.displayed.shape)


def match_scene(scene: Scene, detected: Detections) -> dict[str, bool]:
    """Return whether the detected objects show the scene, by attribute.

    Each object of the scene is assigned to a detected one, to maximize the matching attributes; ties are broken by
    the position or relation. `shape`, `color` and `size` must match in all objects. A surplus object counts
    against `number` only. `position` is the nearest named position; `relation` is `spatial_relation`.
    """
    wanted = [object_classes(each) for each in scene.objects]
    found = len(detected.attributes)
    spatial_name = "position" if scene.relation is None else "relation"
    results = []
    for assigned in itertools.permutations(range(max(found, len(wanted))), len(wanted)):
        matches = [
            [k < found and detected.attributes[k][q] == own[q] for q in range(len(OBJECT_ATTRIBUTES))]
            for k, own in zip(assigned, wanted, strict=True)
        ]
        correct = dict(zip(OBJECT_ATTRIBUTES, map(all, zip(*matches, strict=True)), strict=True))
        centers = [detected.centers[k] for k in assigned if k < found]
        if len(centers) < len(wanted):
            correct[spatial_name] = False
        elif scene.relation is None:
            nearest = min(PLACES, key=lambda position: math.dist(PLACES[position], centers[0]))
            correct[spatial_name] = nearest == scene.objects[0].position
        else:
            correct[spatial_name] = spatial_relation(*centers) == scene.relation
        results.append((sum(map(sum, matches)), correct))
    _, best = max(results, key=lambda result: (result[0], result[1][spatial_name]))
    background = detected.background == ATTRIBUTES["background"].index(scene.background)
    return {"number": found == len(wanted), **best, "background": background}


def object_classes(each: Object) -> tuple[int, ...]:
    """Return the index of each of an object's `OBJECT_ATTRIBUTES`."""
    return tuple(ATTRIBUTES[name].index(getattr(each, name)) for name in OBJECT_ATTRIBUTES)


def spatial_relation(first: tuple[float, float], second: tuple[float, float]) -> str:
    """Return the relation of the first center (x, y) to the second, along the axis of larger distance; y downward."""
    right, down = first[0] - second[0], first[1] - second[1]
    if abs(right) > abs(down):
        return "right of" if right > 0 else "left of"
    return "below" if down > 0 else "above"


class ShapesBenchmark:
    """Captions of shapes, with attributes seen in training and held out of it, scored by a detector.

    Raises ValueError if the detector's accuracy in an attribute is below `MIN_ACCURACY`. With fewer than
    `DETECTOR_STEPS` training steps this is a warning.
    """

    attributes: Sequence[str] = ("number", *OBJECT_ATTRIBUTES, "position", "relation", "background")

    def __init__(self, data: BaseDataModule, settings: AlignmentSettings, device: torch.device) -> None:
        assert isinstance(data.displayed.source, Shapes)
        self.data, self.source = data, data.displayed.source
        self.seed = settings.seed
        self.n = 200 if settings.n is None else settings.n
        count = -(-self.n // PER_CAPTION)
        scenes = {"seen": self.source.seen_scenes(count, settings.seed)}
        if self.source.held_out:
            scenes["held out"] = self.source.held_out_scenes(count, settings.seed)
        self.prompts: Mapping[str, Sequence[str]] = {
            group: [describe_scene(scene, key(settings.seed, "wording", k) % WORDINGS) for k, scene in enumerate(some)]
            for group, some in scenes.items()
        }
        # A detector trained on single objects would overlook a surplus object in a sample.
        self._train_source = Shapes(self.source.image_size, 2, "both", (), settings.seed)
        self.detector = train_detector(
            self._render_batch,
            [len(ATTRIBUTES[attribute]) for attribute in OBJECT_ATTRIBUTES],
            len(ATTRIBUTES["background"]),
            settings.detector_steps,
            settings.cache,
            device=device,
        )
        self.detector_accuracy: Mapping[str, Metric] = self._test_detector(settings.detector_steps)

    def correct(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._score(images, [parse_scene(prompt) for prompt in prompts])

    def real(self, prompt: str) -> Tensor:
        seeds = [key(self.seed, "real", prompt, k) for k in range(MAX_REAL)]
        return quantize(self.data, render([parse_scene(prompt)] * MAX_REAL, self.source.image_size, seeds))

    def _score(self, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
        matches = [match_scene(*pair) for pair in zip(scenes, self.detector(images), strict=True)]
        rows = [[float(each.get(attribute, math.nan)) for attribute in self.attributes] for each in matches]
        return torch.tensor(rows, dtype=torch.float64)

    def _render_batch(self, step: int, count: int = 32) -> LabeledImages:
        """Render random scenes of one and two objects to train the detector on."""
        scenes = self._train_source.any_scenes(count, key("judge", step))
        placed = place(scenes, [key("judge", step, k) for k in range(count)])
        attributes = torch.zeros(count, 2, len(OBJECT_ATTRIBUTES), dtype=torch.int64)
        for n, scene in enumerate(scenes):
            for k, each in enumerate(scene.objects):
                attributes[n, k] = torch.tensor(object_classes(each))
        background = torch.tensor([ATTRIBUTES["background"].index(scene.background) for scene in scenes])
        centers = torch.where((placed.shape >= 0)[..., None], placed.center, math.nan).float()
        images = quantize(self.data, paint(placed, self.source.image_size))
        return LabeledImages(images, centers, attributes, background)

    def _test_detector(self, steps: int) -> dict[str, Metric]:
        scenes = self._train_source.any_scenes(TEST_RENDERS, key("judge", "tested"))
        seeds = [key("judge", "tested", k) for k in range(TEST_RENDERS)]
        images = quantize(self.data, render(scenes, self.source.image_size, seeds))
        accuracy = attribute_accuracy(self.attributes, self._score(images, scenes))
        worst = min(accuracy, key=lambda each: accuracy[each].value if not each.startswith("all_") else math.inf)
        if accuracy[worst].value < MIN_ACCURACY:
            message = (
                f"alignment.detector_steps={steps} gives the detector an accuracy of {accuracy[worst].value:.1%} in "
                f"{worst.rpartition('_')[0]}, below {MIN_ACCURACY:.0%}: use more steps"
            )
            if steps >= DETECTOR_STEPS:
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)
        return accuracy


class GlyphBenchmark:
    """Captions of held-out and of training glyphs. A sample is correct if the nearest of all glyphs is the right one.

    `top_1` and `top_5` are the fractions of samples whose glyph is the nearest, and among the five nearest.
    """

    attributes: Sequence[str] = ("top_1", f"top_{TOP}")

    def __init__(self, data: BaseDataModule, settings: AlignmentSettings, device: torch.device) -> None:
        assert isinstance(data.displayed.source, GlyphSource)
        self.data, self.source = data, data.displayed.source
        glyphs = self.source.glyphs
        trained = [self.source.seen[k] for k in data.train_indices if glyphs.parts[self.source.seen[k]]]
        trained.sort(key=lambda i: key(settings.seed, "glyph", glyphs.ids[i]))
        self.n = settings.n or len(self.source.held_out) or 200
        of_group = {"held out": self.source.held_out[: self.n], "seen": trained[: self.n]}
        self._index = {glyphs.captions[i]: i for indices in of_group.values() for i in indices}
        # Pictures show the first captions, and their font has no CJK.
        self.prompts: Mapping[str, Sequence[str]] = {
            group: sorted((glyphs.captions[i] for i in indices), key=lambda caption: not caption.isascii())
            for group, indices in of_group.items()
            if indices
        }
        self._references = quantize(data, glyphs.images)
        self.detector_accuracy: Mapping[str, Metric] = self._test()

    def correct(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        targets = torch.tensor([self._index[prompt] for prompt in prompts])
        ranks = target_ranks(images, self._references, targets)
        return torch.stack([ranks < 1, ranks < TOP], dim=1).double()

    def real(self, prompt: str) -> Tensor:
        return self._references[self._index[prompt]][None]

    def _test(self) -> dict[str, Metric]:
        """Return how often a glyph with noise is the nearest to itself."""
        prompts = [prompt for group in self.prompts.values() for prompt in group]
        clean = torch.cat([self.real(prompt) for prompt in prompts])
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        noisy = (clean.float() + 255 * NOISE * noise).clamp(0, 255).to(torch.uint8)
        return attribute_accuracy(self.attributes, self.correct(noisy, prompts))


def attribute_accuracy(attributes: Sequence[str], correct: Tensor) -> dict[str, Metric]:
    """Return the fraction of correct samples per attribute, among prompts that name it, and in all attributes.

    `correct` (N, attributes) is the output of `PromptBenchmark.correct`.
    """
    metrics = {}
    for attribute, column in zip(attributes, correct.T, strict=True):
        named = column[~column.isnan()]
        if len(named):
            metrics[metric_name(attribute, len(named))] = wilson(int(named.sum()), len(named))
    metrics[metric_name("all", len(correct))] = wilson(int(all_correct(correct).sum()), len(correct))
    return metrics


def all_correct(correct: Tensor) -> Tensor:
    """Return (N,) bool: whether no attribute of the prompt is wrong."""
    return (correct != 0).all(1)
