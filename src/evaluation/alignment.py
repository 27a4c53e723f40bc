"""Prompt alignment: how often samples match their prompt, and how diverse they are, over guidance scales."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src.data.module import BaseDataModule
from src.distributed.processes import Processes
from src.evaluation.benchmarks import PromptBenchmark, all_correct, attribute_accuracy
from src.evaluation.settings import AlignmentSettings
from src.metrics.confidence import Metric, mean_of, metric_name
from src.training.module import DiffusionModule, Sampler

MAX_ROWS, MAX_COLUMNS = 10, 8
"""Numbers of prompts and of samples per prompt in `prompts.png`."""


class AlignmentMetrics(NamedTuple):
    """Metrics of one group of prompts at one guidance scale."""

    metrics: dict[str, Metric]
    """The fraction of correct samples in each attribute and in all attributes, and `diversity`."""
    by_prompt: dict[str, float]
    """The fraction of samples that are correct in all attributes, by the title of the prompt."""


class AlignmentResult(NamedTuple):
    """Metrics and example samples of an alignment benchmark."""

    groups: dict[str, dict[float, AlignmentMetrics]]  # metrics by group and guidance scale
    examples: dict[float, list[tuple[str, Tensor]]]
    """By guidance scale: titles of some prompts, with samples (M, C, H, W) uint8 of each."""


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
    """Return the sampler with another guidance scale."""
    return sampler._replace(guidance=sampler.guidance._replace(scale=scale))


def sample_and_score(
    module: DiffusionModule,
    sampler: Sampler,
    benchmark: PromptBenchmark,
    data: BaseDataModule,
    settings: AlignmentSettings,
    processes: Processes,
    progress: Callable[[float, int], object],
) -> AlignmentResult:
    """Draw and score `benchmark.n` samples of each group at each of `settings.scales`, a part in each process.

    Sample k depends on (seed, k) and its prompt, so the noise is the same at all scales. `progress` receives the
    scale and the number of further samples. Only rank 0 returns metrics.

    Raises ValueError, in all processes, if any sample is not finite.
    """
    assert data.condition is not None
    groups = list(benchmark.prompts)
    prompts = [prompt for group in groups for prompt in benchmark.prompts[group]]
    # Sample k belongs to group k // n, and cycles through the prompts of its group.
    total = benchmark.n * len(groups)
    ends = list(itertools.accumulate(len(benchmark.prompts[group]) for group in groups))
    firsts = dict(zip(groups, [0, *ends], strict=False))
    prompt_of = [firsts[group] + k % len(benchmark.prompts[group]) for group in groups for k in range(benchmark.n)]
    cond = data.condition(prompts)  # one call, so that all have the same length
    titles = [data.condition.title(prompt) for prompt in prompts]
    real_rms = [pairwise_rms(benchmark.real(prompt)) for prompt in prompts] if processes.rank == 0 else []
    size = min(settings.batch_size, -(-total // processes.count))
    result = AlignmentResult({group: {} for group in groups}, {})
    for scale in settings.scales:
        parts, num_corrupted = [], 0
        # Sharded weights are gathered jointly, so all processes draw the same number of batches. Drop the surplus.
        for turn in range(-(-total // (size * processes.count))):
            start = (turn * processes.count + processes.rank) * size
            numbers = range(start, start + size)
            batch_cond = cond[[prompt_of[k % total] for k in numbers]]
            for x in module.sample(numbers, settings.seed, with_scale(sampler, scale), cond=batch_cond):  # noqa: B007
                pass
            x = x[: max(0, total - start)]
            num_corrupted += int((~x.isfinite().flatten(1).all(1)).sum())
            parts.append(data.postprocess(x).cpu())
            progress(scale, min(size * processes.count, total - turn * processes.count * size))
        if num_corrupted := sum(processes.gather(num_corrupted)):
            raise ValueError(
                f"{num_corrupted} of {total} samples are not finite: remove {scale:g} from alignment.scales"
            )
        images = torch.cat(processes.gather_in_turn(parts))
        if processes.rank > 0:
            continue
        result.examples[scale] = []
        for k, group in enumerate(groups):
            of_group, first = images[k * benchmark.n : (k + 1) * benchmark.n], firsts[group]
            count = len(benchmark.prompts[group])
            part = slice(first, first + count)
            result.groups[group][scale] = score_group(
                benchmark, of_group, prompts[part], titles[part], real_rms[part], settings.seed
            )
            for p in range(min(count, MAX_ROWS // len(groups))):
                title = titles[first + p] if len(groups) == 1 else f"{group}: {titles[first + p]}"
                result.examples[scale].append((title, of_group[p::count][:MAX_COLUMNS]))
    return result


def diversity_curves(
    groups: Mapping[str, Mapping[float, AlignmentMetrics]],
) -> dict[str, list[tuple[float, Metric, Metric]]]:
    """Return for each group its scales, each with the diversity and the fraction correct in all attributes."""
    return {
        group: [
            (scale, diversity, share_correct(each.metrics))
            for scale, each in by_scale.items()
            for name, diversity in each.metrics.items()
            if name.startswith("diversity_")
        ]
        for group, by_scale in groups.items()
    }


def best_scale(groups: Mapping[str, Mapping[float, AlignmentMetrics]]) -> float:
    """Return the scale with the largest fraction correct in all attributes, summed over groups; the lowest of ties."""
    scales = list(next(iter(groups.values())))
    return max(scales, key=lambda scale: sum(share_correct(each[scale].metrics).value for each in groups.values()))


def share_correct(metrics: Mapping[str, Metric]) -> Metric:
    """Return the fraction of samples that are correct in all attributes."""
    return next(metric for key, metric in metrics.items() if key.startswith("all_"))
