"""How often samples show what they were asked to be, and how much they vary, over scales of guidance.

Who judges them was trained by this command: for pictures of shapes a network that finds objects and says
what they are, for classes a classifier. What it makes of real images is reported beside what it makes of samples.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from src.data.conditions import Classes
from src.data.module import BaseDataModule
from src.data.shapes import ATTRIBUTES, PLACES, WORDINGS, Scene, Shapes, caption, paint, parse, place, render
from src.distributed.processes import Processes
from src.evaluation.quality import Progress, classifier_of, shown_of
from src.metrics.confidence import Metric, mean_of, name, wilson
from src.metrics.detector import Pictures, Seen, train_detector
from src.rng import key
from src.training.module import DiffusionModule, Sampler

DETECTOR_STEPS = 600
"""Of training the judge of shapes, which are enough for `RIGHT`."""
RIGHT = 0.99
"""The share of fresh renders of which the judge of shapes must see each attribute as it is."""
RENDERS = 2000
"""On which that is found out."""
TOGETHER = 8
"""Samples of each caption, if there are so many."""
REAL = 32
"""Real images of each prompt, at most, that samples of it are to vary as much as."""
ROWS, COLUMNS = 10, 8
"""Of the picture of what was asked for, at most."""


class Settings(NamedTuple):
    """How alignment is measured."""

    scales: Sequence[float] = (1, 1.5, 2, 3, 5)
    """Of guidance."""
    n: int | None = None
    """Samples at each scale, of seen and of held-out captions each; None for 200, of classes 500 (or 2 of each)."""
    detector_steps: int = DETECTOR_STEPS
    seed: int = 0
    """Of the samples' noise, the choice of captions, and the bootstrap."""
    batch_size: int = 256
    cache: Path = Path("outputs/cache")

    def check(self) -> None:
        """Raise ValueError for what cannot be measured."""
        numbers = [scale for scale in self.scales if isinstance(scale, int | float) and 0 <= scale < math.inf]
        if not numbers or len(numbers) < len(self.scales):
            raise ValueError(
                f"alignment.scales are one or more scales of guidance from 0 on, got {list(self.scales)}: "
                "[1, 1.5, 2, 3, 5] is usual"
            )
        if self.n is not None and self.n < 2:
            raise ValueError(f"alignment.n must be at least 2, got {self.n}: null takes 200 of shapes, 500 of classes")


class PromptBenchmark(Protocol):
    """What samples are asked to be, and who judges what comes of it."""

    prompts: Mapping[str, Sequence[Any]]
    """By group, as the condition takes them."""
    n: int
    """Samples of each group."""
    attributes: Sequence[str]
    own: Mapping[str, Metric]
    """What the judge makes of real images: the share that is right in each attribute, and in all."""

    def right(self, images: Tensor, asked: Sequence[Any]) -> Tensor:
        """Images (N, C, H, W) uint8 asked to be N prompts -> (N, attributes): 1 right, 0 wrong, NaN not asked for."""
        ...

    def real(self, prompt: Any) -> Tensor:
        """Real images (M, C, H, W) uint8 that show it."""
        ...


def build_benchmark(
    data: BaseDataModule, settings: Settings, processes: Processes, progress: Progress = lambda steps: steps
) -> PromptBenchmark | None:
    """What a run can be asked; None where nobody judges what it shows. Every process needs one.

    The first trains the judge while the others wait, who then find it in the cache; `progress` shows how far a judge of
    shapes has come. Raises ValueError for settings that cannot be, and for a judge that is not good enough.
    """
    settings.check()
    data.setup()
    of_shapes = isinstance(data.source, Shapes) and data.condition is not None
    if not of_shapes and not (isinstance(data.condition, Classes) and len(data.shape) == 3):
        return None

    def made() -> PromptBenchmark:
        if of_shapes:
            return ShapesBenchmark(data, settings, device, progress)
        return ClassBenchmark(data, settings, device)

    # As for other figures: Apple's GPUs know no float64.
    device = torch.device("cpu") if processes.device.type == "mps" else processes.device
    benchmark = made() if processes.rank == 0 else None
    processes.gather(None)
    return benchmark or made()


class ClassBenchmark:
    """The classes of a run, by turns, judged by a classifier that was trained on the same images."""

    attributes: Sequence[str] = ("class",)

    def __init__(self, data: BaseDataModule, settings: Settings, device: torch.device) -> None:
        assert data.source is not None and data.source.labels is not None
        self.data = data
        classes = len(data.source.labels.classes)
        self.n = max(500, 2 * classes) if settings.n is None else settings.n
        if self.n < 2 * classes:
            raise ValueError(
                f"alignment.n={self.n} leaves less than two samples to each of {classes} classes: make it at least "
                f"{2 * classes}"
            )
        self.names = list(data.source.labels.classes)
        self.prompts: Mapping[str, Sequence[str]] = {"classes": self.names}
        self.device = device
        self.classifier, tested = classifier_of(data, settings.cache, device)
        right = round(self.classifier.accuracy * tested)
        self.own: Mapping[str, Metric] = {name(each, tested): wilson(right, tested) for each in ("class", "all")}

    def right(self, images: Tensor, asked: Sequence[str]) -> Tensor:
        seen = [self.classifier(part.to(self.device)).probabilities for part in torch.split(images, 256)]
        numbers = torch.cat([p.argmax(1).cpu() for p in seen if p is not None])
        return (numbers == torch.tensor([self.names.index(each) for each in asked])).double()[:, None]

    def real(self, prompt: str) -> Tensor:
        assert self.data.source is not None and self.data.source.labels is not None
        numbers = self.data.source.labels.targets
        shown = [k for k in self.data.train_indices if numbers[k] == self.names.index(prompt)][:REAL]
        return shown_of(self.data, shown) if shown else torch.empty(0, *self.data.shape, dtype=torch.uint8)


LOOKS = ("shape", "color", "size")
"""What the judge of shapes says of each object; of the whole picture it says the background."""


def compared(scene: Scene, seen: Seen) -> dict[str, bool]:
    """In which attributes a picture, of which the judge has `seen` so much, shows the scene.

    Each object that was asked for is held against one that is seen, so that as much as possible fits, and then that
    the relation does. `shape`, `color` and `size` are right if those of all objects are; an object too many is wrong
    in `number` alone. A `position` is right if it is the nearest one, a `relation` if it is that of the two objects.
    """
    asked = [tuple(ATTRIBUTES[look].index(getattr(each, look)) for look in LOOKS) for each in scene.objects]
    numbers = [*range(len(seen.looks)), *[None] * len(asked)][: max(len(seen.looks), len(asked))]
    best: tuple[tuple[int, bool], dict[str, bool]] | None = None
    for chosen in itertools.permutations(numbers, len(asked)):
        right = [
            [k is not None and seen.looks[k][q] == own[q] for q in range(len(LOOKS))]
            for k, own in zip(chosen, asked, strict=True)
        ]
        found = {look: all(column) for look, column in zip(LOOKS, zip(*right, strict=True), strict=True)}
        where = [None if k is None else seen.middles[k] for k in chosen]
        if scene.relation is None:
            lies = where[0] is not None and nearest_place(where[0]) == scene.objects[0].position
            found["position"] = lies
        else:
            lies = where[0] is not None and where[1] is not None and relation_of(where[0], where[1]) == scene.relation
            found["relation"] = lies
        fits = (sum(map(sum, right)), lies)
        if best is None or fits > best[0]:
            best = fits, found
    assert best is not None
    background = seen.ground == ATTRIBUTES["background"].index(scene.background)
    return {"number": len(seen.looks) == len(asked), **best[1], "background": background}


def nearest_place(middle: tuple[float, float]) -> str:
    """The position whose place is the nearest to a middle (x, y)."""
    return min(PLACES, key=lambda position: math.dist(PLACES[position], middle))


def relation_of(first: tuple[float, float], second: tuple[float, float]) -> str:
    """How an object with its middle (x, y) at `first` lies to one at `second`, by the longer way; y goes downwards."""
    right, down = first[0] - second[0], first[1] - second[1]
    if abs(right) > abs(down):
        return "right of" if right > 0 else "left of"
    return "below" if down > 0 else "above"


class ShapesBenchmark:
    """Captions of shapes, of kinds that were seen in training and of those that were held out, and their judge.

    Raises ValueError if the judge is not right on `RIGHT` of fresh renders in each attribute; after fewer steps of
    training than are usual that is a warning.
    """

    attributes: Sequence[str] = ("number", *LOOKS, "position", "relation", "background")

    def __init__(self, data: BaseDataModule, settings: Settings, device: torch.device, progress: Progress) -> None:
        assert isinstance(data.source, Shapes)
        self.data, self.source = data, data.source
        self.seed = settings.seed
        self.n = 200 if settings.n is None else settings.n
        count = -(-self.n // TOGETHER)
        scenes = {"seen": self.source.seen_scenes(count, settings.seed)}
        if self.source.held_out:
            scenes["held out"] = self.source.held_out_scenes(count, settings.seed)
        self.prompts: Mapping[str, Sequence[str]] = {
            group: [caption(scene, key(settings.seed, "wording", k) % WORDINGS) for k, scene in enumerate(some)]
            for group, some in scenes.items()
        }
        # A judge that never saw two objects would not see the second one of a sample that has one too many.
        self.everything = Shapes(self.source.image_size, 2, "both", (), settings.seed)
        self.detector = train_detector(
            self._made,
            [len(ATTRIBUTES[look]) for look in LOOKS],
            len(ATTRIBUTES["background"]),
            settings.detector_steps,
            settings.cache,
            progress,
            device=device,
        )
        self.own: Mapping[str, Metric] = self._tested(settings.detector_steps)

    def right(self, images: Tensor, asked: Sequence[str]) -> Tensor:
        return self._compared(images, [parse(each) for each in asked])

    def real(self, prompt: str) -> Tensor:
        seeds = [key(self.seed, "real", prompt, k) for k in range(REAL)]
        return self._shown(render([parse(prompt)] * REAL, self.source.image_size, seeds))

    def _compared(self, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
        result = torch.full((len(images), len(self.attributes)), math.nan, dtype=torch.float64)
        for k, (scene, seen) in enumerate(zip(scenes, self.detector(images), strict=True)):
            found = compared(scene, seen)
            for column, attribute in enumerate(self.attributes):
                if attribute in found:
                    result[k, column] = found[attribute]
        return result

    def _made(self, step: int, count: int = 32) -> Pictures:
        """Renders of any scenes, of one and of two objects: what the judge learns from."""
        scenes = self.everything.any_scenes(count, key("judge", step))
        seeds = [key("judge", step, k) for k in range(count)]
        placed = place(scenes, seeds)
        looks = torch.zeros(count, 2, len(LOOKS), dtype=torch.int64)
        for n, scene in enumerate(scenes):
            for k, each in enumerate(scene.objects):
                looks[n, k] = torch.tensor([ATTRIBUTES[look].index(getattr(each, look)) for look in LOOKS])
        ground = torch.tensor([ATTRIBUTES["background"].index(scene.background) for scene in scenes])
        there = placed.shape >= 0
        middles = torch.where(there[..., None], placed.center, math.nan).float()
        return Pictures(self._shown(paint(placed, self.source.image_size)), middles, looks, ground)

    def _tested(self, steps: int) -> dict[str, Metric]:
        """The judge's figures on renders that it did not learn from."""
        scenes = self.everything.any_scenes(RENDERS, key("judge", "tested"))
        seeds = [key("judge", "tested", k) for k in range(RENDERS)]
        images = self._shown(render(scenes, self.source.image_size, seeds))
        right = self._compared(images, scenes)
        figures = shares(self.attributes, right)
        worst = min(figures, key=lambda each: figures[each].value if not each.startswith("all_") else math.inf)
        if figures[worst].value < RIGHT:
            told = (
                f"the judge of shapes is right in {worst.rpartition('_')[0]} on {figures[worst].value:.1%} of fresh "
                f"renders, less than {RIGHT:.0%}: raise alignment.detector_steps={steps}"
            )
            if steps >= DETECTOR_STEPS:
                raise ValueError(told)
            warnings.warn(told, stacklevel=2)
        return figures

    def _shown(self, images: Tensor) -> Tensor:
        """As files show them, to as many levels as the data have."""
        return self.data.postprocess(self.data.preprocess(images))


class Aligned(NamedTuple):
    """What samples at one scale, of one group of prompts, came to."""

    figures: dict[str, Metric]
    """The share that is right in each attribute and in all, and `diversity`."""
    by_prompt: dict[str, float]
    """The share of its samples that is right in all, by its title."""


class Asked(NamedTuple):
    """What came of what was asked for."""

    found: dict[str, dict[float, Aligned]]
    """By group and scale."""
    shown: dict[float, list[tuple[str, Tensor]]]
    """By scale: some prompts' titles, and samples (M, C, H, W) uint8 of each."""


def shares(attributes: Sequence[str], right: Tensor) -> dict[str, Metric]:
    """Of `right` (N, attributes), as an exam has it: each attribute's share among those asked for it, and of all."""
    figures = {}
    for attribute, column in zip(attributes, right.T, strict=True):
        asked = column[~column.isnan()]
        if len(asked):
            figures[name(attribute, len(asked))] = wilson(int(asked.sum()), len(asked))
    figures[name("all", len(right))] = wilson(int(right_in_all(right).sum()), len(right))
    return figures


def right_in_all(right: Tensor) -> Tensor:
    """(N,) bool: nothing that was asked for is wrong."""
    return (right != 0).all(1)


def spread(images: Tensor) -> float:
    """How much images (N, C, H, W) uint8 differ: the mean over pairs of the RMS difference of pixels. NaN for one."""
    pixels = images.flatten(1).double()
    return torch.pdist(pixels).mean().item() / math.sqrt(pixels.shape[1])


def aligned(
    benchmark: PromptBenchmark,
    images: Tensor,
    prompts: Sequence[Any],
    titles: Sequence[str],
    usual: Sequence[float],
    seed: int,
) -> Aligned:
    """What images (N, C, H, W) uint8 come to, of which number k was asked to be prompt k mod P of `prompts`.

    `usual` is the `spread` of real images of each prompt; `seed` that of the bootstrap over prompts.
    """
    count = len(prompts)
    right = benchmark.right(images, [prompts[k % count] for k in range(len(images))])
    figures = shares(benchmark.attributes, right)
    ratios = torch.tensor([spread(images[p::count]) / usual[p] if usual[p] else math.nan for p in range(count)])
    if len(ratios := ratios[ratios.isfinite()]):
        figures[name("diversity", len(images))] = mean_of(ratios).figure(seed)
    whole = right_in_all(right).double()
    return Aligned(figures, {title: whole[p::count].mean().item() for p, title in enumerate(titles)})


def scales_of(module: DiffusionModule, sampler: Sampler, scales: Sequence[float]) -> list[float]:
    """Those that a run can be sampled at, rising: only 1 for one that never was told nothing."""
    possible = module.cond_drop_prob > 0 or sampler.guidance.model is not None
    return sorted({float(scale) for scale in scales}) if possible else [1.0]


def at_scale(sampler: Sampler, scale: float) -> Sampler:
    """The same, guided at another scale."""
    return sampler._replace(guidance=sampler.guidance._replace(scale=scale))


def sample_and_score(
    module: DiffusionModule,
    sampler: Sampler,
    benchmark: PromptBenchmark,
    data: BaseDataModule,
    settings: Settings,
    processes: Processes,
    progress: Callable[[float, int], object],
) -> Asked:
    """Draw `benchmark.n` samples of each group at each of `settings.scales`, each process a share, and judge them.

    Sample k depends on (seed, k) and what it is asked to be: at all scales the noise is the same. `progress` is told
    the scale, and how many more have been drawn. Of processes beyond the first nothing is returned. Raises ValueError,
    in all processes, if any sample is not finite.
    """
    assert data.condition is not None
    groups = list(benchmark.prompts)
    prompts = [prompt for group in groups for prompt in benchmark.prompts[group]]
    # Sample k is of group k div n, whose prompts come by turns.
    total = benchmark.n * len(groups)
    ends = list(itertools.accumulate(len(benchmark.prompts[group]) for group in groups))
    firsts = dict(zip(groups, [0, *ends], strict=False))
    places = [firsts[group] + k % len(benchmark.prompts[group]) for group in groups for k in range(benchmark.n)]
    cond = data.condition(prompts)  # at once, so that they are equally long
    titles = [data.condition.title(prompt) for prompt in prompts]
    usual = [spread(benchmark.real(prompt)) for prompt in prompts] if processes.rank == 0 else []
    size = min(settings.batch_size, -(-total // processes.count))
    result = Asked({group: {} for group in groups}, {})
    for scale in settings.scales:
        parts, num_corrupted = [], 0
        # As many batches for each process, of which sharded weights are gathered together; what is too much is dropped.
        for turn in range(-(-total // (size * processes.count))):
            start = (turn * processes.count + processes.rank) * size
            numbers = range(start, start + size)
            asked = cond[[places[k % total] for k in numbers]]
            for x in module.sample(numbers, settings.seed, at_scale(sampler, scale), cond=asked):  # noqa: B007
                pass
            x = x[: max(0, total - start)]
            num_corrupted += int((~x.isfinite().flatten(1).all(1)).sum())
            parts.append(data.postprocess(x).cpu())
            progress(scale, min(size * processes.count, total - turn * processes.count * size))
        if num_corrupted := sum(processes.gather(num_corrupted)):
            raise ValueError(
                f"{num_corrupted} of {total} samples at guidance scale {scale:g} are not finite: leave it out of "
                "alignment.scales, or take another sampler"
            )
        images = torch.cat(processes.gather_in_turn(parts))
        if processes.rank > 0:
            continue
        result.shown[scale] = []
        for k, group in enumerate(groups):
            of_group, first, count = (
                images[k * benchmark.n : (k + 1) * benchmark.n],
                firsts[group],
                len(benchmark.prompts[group]),
            )
            its = slice(first, first + count)
            result.found[group][scale] = aligned(
                benchmark, of_group, prompts[its], titles[its], usual[its], settings.seed
            )
            for p in range(min(count, ROWS // len(groups))):
                title = titles[first + p] if len(groups) == 1 else f"{group}: {titles[first + p]}"
                result.shown[scale].append((title, of_group[p::count][:COLUMNS]))
    return result


def curves(found: Mapping[str, Mapping[float, Aligned]]) -> dict[str, list[tuple[float, Metric, Metric]]]:
    """For each group: its scales, each with the figures of diversity and of the share that is right in all."""
    result: dict[str, list[tuple[float, Metric, Metric]]] = {}
    for group, of_scale in found.items():
        for scale, each in of_scale.items():
            for diversity in (figure for named, figure in each.figures.items() if named.startswith("diversity_")):
                result.setdefault(group, []).append((scale, diversity, right_of(each.figures)))
    return result


def best(found: Mapping[str, Mapping[float, Aligned]]) -> float:
    """The scale at which most samples are right in all, over all groups; the lowest of several."""
    scales = list(next(iter(found.values())))
    return max(scales, key=lambda scale: sum(right_of(each[scale].figures).value for each in found.values()))


def right_of(figures: Mapping[str, Metric]) -> Metric:
    """The share that is right in all."""
    return next(figure for each, figure in figures.items() if each.startswith("all_"))
