"""Prompt alignment: how often samples match their prompt, and how diverse they are, over guidance scales."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src.data.module import BaseDataModule
from src.distributed.processes import Processes
from src.evaluation.benchmarks import PromptBenchmark, all_correct, attribute_accuracy
from src.evaluation.quality import draw_batches
from src.evaluation.reverse_variance import Advance
from src.evaluation.settings import AlignmentSettings
from src.metrics.confidence import Metric, mean_of, metric_name
from src.training.module import DiffusionModule, Sampler

MAX_ROWS, MAX_COLUMNS = 10, 8  # numbers of prompts and of samples per prompt in `prompts.png`


class AlignmentMetrics(NamedTuple):
    """Metrics of one group of prompts at one guidance scale."""

    metrics: dict[str, Metric]  # the fraction of correct samples in each attribute and in all, and `diversity`
    by_prompt: dict[str, float]  # the fraction of samples correct in all attributes, by the title of the prompt


class AlignmentResult(NamedTuple):
    """Metrics and example samples of an alignment benchmark."""

    groups: dict[str, dict[float, AlignmentMetrics]]  # metrics by group and guidance scale
    examples: dict[float, list[tuple[str, Tensor]]]  # titles of prompts with samples (M, C, H, W) uint8, by scale


def pairwise_rms(images: Tensor) -> float:
    """Return the RMS pixel difference, averaged over pairs of images (N, C, H, W) uint8. NaN for one image."""
    pixels = images.flatten(1).double()
    return torch.pdist(pixels).mean().item() / math.sqrt(pixels.shape[1])


def score_group(
    benchmark: PromptBenchmark,
    images: Tensor,
    prompts: Sequence[Any],
    titles: Sequence[str],
    real_rms: Sequence[float],
    seed: int,
) -> AlignmentMetrics:
    """Score images (N, C, H, W) uint8 of P prompts, where image k belongs to prompt k mod P.

    `real_rms` is the `pairwise_rms` of real images of each prompt: the unit of diversity. `seed` is that of the
    bootstrap over prompts.
    """
    count = len(prompts)
    correct = benchmark.correct(images, [prompts[k % count] for k in range(len(images))])
    metrics = attribute_accuracy(benchmark.attributes, correct)
    ratios = torch.tensor(
        [pairwise_rms(images[p::count]) / real_rms[p] if real_rms[p] else math.nan for p in range(count)]
    )
    if len(ratios := ratios[ratios.isfinite()]):
        metrics[metric_name("diversity", len(images))] = mean_of(ratios).bootstrap(seed)
    every = all_correct(correct).double()
    return AlignmentMetrics(metrics, {title: every[p::count].mean().item() for p, title in enumerate(titles)})


def possible_scales(module: DiffusionModule, sampler: Sampler, scales: Sequence[float]) -> list[float]:
    """Return the guidance scales in ascending order; only 1 for a run without an unconditional or guiding model."""
    possible = module.cond_drop_prob > 0 or sampler.guidance.model is not None
    return sorted({float(scale) for scale in scales}) if possible else [1.0]


def with_scale(sampler: Sampler, scale: float) -> Sampler:
    return sampler._replace(guidance=sampler.guidance._replace(scale=scale))


def sample_and_score(
    module: DiffusionModule,
    sampler: Sampler,
    benchmark: PromptBenchmark,
    data: BaseDataModule,
    settings: AlignmentSettings,
    processes: Processes,
    advance: Advance = lambda count: None,
) -> AlignmentResult:
    """Draw and score `benchmark.n` samples of each group at each of `settings.scales` by `draw_batches`.

    The noise is the same at all scales. Only rank 0 returns metrics.
    """
    assert data.condition is not None
    groups = benchmark.prompts
    prompts = [prompt for group in groups.values() for prompt in group]
    firsts = itertools.accumulate(map(len, groups.values()), initial=0)
    parts = {name: slice(first, first + len(groups[name])) for name, first in zip(groups, firsts, strict=False)}
    # Sample k belongs to group k // n, and cycles through the prompts of its group.
    total = benchmark.n * len(groups)
    prompt_of = [part.start + k % len(groups[name]) for name, part in parts.items() for k in range(benchmark.n)]
    cond = data.condition(prompts)  # one call, so that all have the same length
    titles = [data.condition.title(prompt) for prompt in prompts]
    real_rms = [pairwise_rms(benchmark.real(prompt)) for prompt in prompts] if processes.rank == 0 else []
    size = min(settings.batch_size, -(-total // processes.count))
    result = AlignmentResult({name: {} for name in groups}, {})

    def encode(numbers: range) -> Tensor:
        return cond[[prompt_of[k % total] for k in numbers]]

    for scale in settings.scales:
        guided = with_scale(sampler, scale)
        batches = draw_batches(module, guided, total, size, settings.seed, processes, encode, advance)
        images = torch.cat(processes.gather_in_turn([data.postprocess(x).cpu() for _, x in batches]))
        if processes.rank > 0:
            continue
        result.examples[scale] = []
        for (name, part), of_group in zip(parts.items(), torch.split(images, benchmark.n), strict=True):
            result.groups[name][scale] = score_group(
                benchmark, of_group, prompts[part], titles[part], real_rms[part], settings.seed
            )
            for p, title in enumerate(titles[part][: MAX_ROWS // len(groups)]):
                shown = title if len(groups) == 1 else f"{name}: {title}"
                result.examples[scale].append((shown, of_group[p :: len(groups[name])][:MAX_COLUMNS]))
    return result


def diversity_curve(by_scale: Mapping[float, AlignmentMetrics]) -> list[tuple[float, Metric, Metric]]:
    """Return the scales of a group, each with the diversity and the fraction correct in all attributes."""
    return [
        (scale, diversity, share_correct(each.metrics))
        for scale, each in by_scale.items()
        for name, diversity in each.metrics.items()
        if name.startswith("diversity_")
    ]


def best_scale(groups: Mapping[str, Mapping[float, AlignmentMetrics]]) -> float:
    """Return the scale with the largest fraction correct in all attributes, summed over groups; the lowest of ties."""
    scales = list(next(iter(groups.values())))
    return max(scales, key=lambda scale: sum(share_correct(each[scale].metrics).value for each in groups.values()))


def share_correct(metrics: Mapping[str, Metric]) -> Metric:
    return next(metric for key, metric in metrics.items() if key.startswith("all_"))
