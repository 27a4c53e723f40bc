"""The parts of an evaluation: each measures, saves its plots in a folder, and returns metrics for a JSON file.

All processes call these functions; files and metrics come from rank 0.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from src.data.conditions import Condition, encode_conditions
from src.data.module import BaseDataModule
from src.data.table import TableDataModule
from src.distributed.processes import Processes
from src.errors import usage_errors
from src.evaluation.alignment import best_scale, diversity_curve, sample_and_score, share_correct
from src.evaluation.benchmarks import PromptBenchmark
from src.evaluation.likelihood import Bound, Load, bounds, flow_bits, network_passes
from src.evaluation.quality import GeneratedSamples, SampleEvaluator, SampleMetrics, fetch_for_display, values_of
from src.evaluation.reverse_variance import sum_errors
from src.evaluation.sampler_accuracy import SamplerErrors
from src.evaluation.settings import AlignmentSettings, ReverseVariance
from src.metrics.classifier import Classifier
from src.metrics.confidence import Metric, wilson
from src.metrics.tables import association_error, associations, closer_to_training, marginal_distances
from src.training.module import DiffusionModule, Sampler
from src.viz import distributions, images, line_plots
from src.viz.tables import markdown_table, strip_sample_count

PLOTTED = (
    *("fd_", "fid_", "kd_efficientnet_", "precision_", "recall_"),
    *("sliced_wasserstein_", "energy_distance_", "mmd_"),
)
"""Metrics plotted over the cost of sampling, in the first feature space."""
NUM_SHOWN = 12  # samples per row of an image
MAX_ROWS = 5000  # rows of training and of validation data in the report on a table


def evaluate_likelihood(
    module: DiffusionModule,
    data: BaseDataModule,
    processes: Processes,
    folder: Path,
    *,
    num_val: int,
    num_terms: int | None,
    reverse_variance: ReverseVariance,
    ode_tolerance: float | None,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Return the variational bound of `num_val` validation samples in bits/dim, its terms, and its standard error.

    With `ode_tolerance` also the likelihood by the probability flow, which is the only one of a model with
    data.coupling=ot: the bound describes another model.
    """
    size = min(batch_size, -(-num_val // processes.count))
    own = processes.share([range(num_val)[start : start + size] for start in range(0, num_val, size)])
    load = partial(load_val, module, data, data.condition)
    metrics: dict[str, Any] = {"num_val": num_val}
    if module.coupling == "independent":
        metrics |= evaluate_bound(module, own, load, processes, folder, num_terms, reverse_variance, seed)
    if ode_tolerance is not None:
        flows = []
        for batch in tqdm(own, desc="Flow", disable=processes.rank > 0):
            x, cond = load(batch)
            flows.append(flow_bits(module, x, seed, ode_tolerance, batch.start, cond))
        flow = torch.cat(processes.gather_in_turn(flows))
        metrics |= {"flow_bits_per_dim": flow.mean().item(), "flow_standard_error": standard_error(flow)}
    return metrics


def evaluate_bound(
    module: DiffusionModule,
    own: Sequence[range],
    load: Load,
    processes: Processes,
    folder: Path,
    num_terms: int | None,
    reverse_variance: ReverseVariance,
    seed: int,
) -> dict[str, Any]:
    """Return the variational bound in bits/dim of the samples at this process's `own` positions and all others."""
    total_calls = network_passes(module.schedule, num_terms, reverse_variance) * sum(map(len, own))
    with progress_bar("Bound", total_calls, processes.rank) as bar:
        settings = seed, num_terms, reverse_variance
        parts = bounds(module, own, load, *settings, bar.update, lambda errors: sum_errors(processes.gather(errors)))
    prior, total, *sums = zip(*processes.gather_in_turn(parts), strict=True)
    result = Bound(torch.cat(prior), torch.cat(total), *(torch.stack(part).sum(0) for part in sums))
    metrics: dict[str, Any] = {
        "num_terms": num_terms or module.schedule.num_steps,
        "reverse_variance": reverse_variance,
        "bits_per_dim": result.total.mean().item(),
        "standard_error": standard_error(result.total),
        "prior": result.prior.mean().item(),
        "decoder": result.terms[0].item(),
    }
    metrics["divergences"] = metrics["bits_per_dim"] - metrics["prior"] - metrics["decoder"]
    if processes.rank == 0:
        log_snr = torch.stack([module.schedule.row(t).snr.log() for t in range(module.schedule.num_steps)])
        line_plots.bound_curves(result.terms, result.mse, log_snr).save(folder / "bound.png")
    return metrics


def load_val(
    module: DiffusionModule, data: BaseDataModule, condition: Condition | None, positions: range
) -> tuple[Tensor, Tensor | None]:
    """Return the validation samples at these positions after `preprocess`, and their conditions, on the device."""
    assert data.source is not None
    indices = data.val_indices[positions.start : positions.stop]
    cond = encode_conditions(condition, data.source, indices)
    x = data.preprocess(data.source.fetch(indices)).to(module.device)
    return x, None if cond is None else cond.to(module.device)


def evaluate_quality(
    module: DiffusionModule, samplers: Mapping[str, Sampler], evaluator: SampleEvaluator, folder: Path
) -> dict[str, Any]:
    """Return the metrics of each sampler's samples and their real-data baseline, and save plots. Rank 0 only."""
    processes, n = evaluator.processes, evaluator.settings.n
    with progress_bar("Samples", n * len(samplers), processes.rank) as bar, usage_errors():
        generated = {
            name: evaluator.draw(module, sampler, bar.update, condition=evaluator.data.condition)
            for name, sampler in samplers.items()
        }
    baseline = evaluator.baseline()
    measured = evaluator.measure(list(generated.values()), show_progress=True)
    if processes.rank > 0:
        return {}
    rows = {}
    for (name, samples), each in zip(generated.items(), measured, strict=True):
        costs = {"calls_per_image": samples.calls, "seconds_per_image": samples.seconds}
        rows[name] = {**costs, "metrics": as_dicts(each.metrics)}
    metrics: dict[str, Any] = {"n": n, "reference": evaluator.settings.reference, "baseline": as_dicts(baseline)}
    metrics["samplers"] = rows
    for extractor in evaluator.extractors:
        if isinstance(extractor, Classifier):
            metrics["classifier_accuracy"] = extractor.accuracy
    save_samples(folder, evaluator, generated, measured)
    save_class_frequencies(folder, evaluator, generated)
    if isinstance(evaluator.data, TableDataModule):
        metrics["table"] = table_report(folder, evaluator.data, next(iter(generated.values())).first)
    if len(generated) > 1:
        save_quality_curves(folder, samplers, generated, measured, baseline)
    return metrics


def save_samples(
    folder: Path,
    evaluator: SampleEvaluator,
    generated: Mapping[str, GeneratedSamples],
    measured: Sequence[SampleMetrics],
) -> None:
    """Save samples of each sampler from the same noise, and next to it those nearest to the training data."""
    data = evaluator.data
    real = data.displayed_examples(NUM_SHOWN)
    if real.ndim == 2:
        val = data.displayed_examples(2000)
        plots = [images.add_title(distributions.scatter(each.first, val), name) for name, each in generated.items()]
        images.tile(plots).save(folder / "samples.png")
        return
    rows = [*(each.first for each in generated.values()), real]
    count = min(map(len, rows))
    images.labeled_rows([row[:count] for row in rows], [*generated, "validation data"]).save(folder / "samples.png")
    first, nearest = next(iter(generated.values())).first, measured[0].neighbors
    closest = nearest.distances.argsort()[:NUM_SHOWN]
    pairs = [first[closest], fetch_for_display(data, [data.train_indices[k] for k in nearest.numbers[closest]])]
    images.labeled_rows(pairs, ["closest samples", "training data"]).save(folder / "nearest.png")


def save_class_frequencies(folder: Path, evaluator: SampleEvaluator, generated: Mapping[str, GeneratedSamples]) -> None:
    """Save how often the classifier predicts each class in real data and in samples, if there is a classifier."""
    if "classifier" not in evaluator.reference:
        return
    assert evaluator.data.source is not None and evaluator.data.source.labels is not None
    names = evaluator.data.source.labels.classes
    shares = {}
    for name, each in {"real data": evaluator.reference, **{k: g.collected for k, g in generated.items()}}.items():
        p = each["classifier"].probabilities
        shares[name] = [wilson(int(count), len(p)) for count in p.argmax(1).bincount(minlength=len(names))]
    distributions.class_frequencies(names, shares).save(folder / "classes.png")


def table_report(folder: Path, data: TableDataModule, samples: Tensor) -> dict[str, Any]:
    """Return metrics of generated rows, display values (N, K), against held-out rows, and save two pictures.

    The baseline of each distance is that of training rows, as many as there are samples or held-out rows.
    """
    val, train = (fetch_for_display(data, part[:MAX_ROWS]).cpu() for part in (data.val_indices, data.train_indices))
    samples, baseline = samples.cpu(), train[: len(samples)]
    kinds = data.num_categories
    names = [column.name for column in data.encoders]
    categories = [column.category_names for column in data.encoders]
    distributions.marginals(samples, val, data.columns or names, categories).save(folder / "columns.png")
    ours, real, of_baseline = (associations(rows, kinds) for rows in (samples, val, baseline))
    if len(names) > 1:
        distributions.association_matrices(ours, real, names).save(folder / "associations.png")
    distances = (marginal_distances(rows, val, kinds) for rows in (samples, baseline))
    nearer = closer_to_training(*(values_of(data)(rows).features for rows in (samples, train, val)))
    return {
        "n": len(samples),
        "num_val": len(val),
        "columns": {
            name: {"distance": distance, "baseline": other}
            for name, distance, other in zip(names, *distances, strict=True)
        },
        "association_error": association_error(ours, real),
        "association_baseline": association_error(of_baseline, real),
        "closer_to_training": nearer._asdict(),
    }


def save_quality_curves(
    folder: Path,
    samplers: Mapping[str, Sampler],
    generated: Mapping[str, GeneratedSamples],
    measured: Sequence[SampleMetrics],
    baseline: Mapping[str, Metric],
) -> None:
    """Save up to three metrics over network calls, one line per sampler, next to the baseline."""
    # The numbers of samples may differ.
    baselines = {strip_sample_count(name): metric for name, metric in baseline.items()}
    known = (name for name in measured[0].metrics if strip_sample_count(name) in baselines)
    titles = [name for name in known if name.startswith(PLOTTED)][:3]
    curves: dict[str, list[tuple[int, list[Metric]]]] = {}
    for (name, samples), each in zip(generated.items(), measured, strict=True):
        label = name.replace(f" {samplers[name].steps}", "", 1)
        curves.setdefault(label, []).append((samples.calls, [each.metrics[title] for title in titles]))
    plot = line_plots.quality_against_cost(titles, curves, [baselines[strip_sample_count(title)] for title in titles])
    plot.save(folder / "quality.png")


def evaluate_alignment(
    module: DiffusionModule,
    data: BaseDataModule,
    sampler: Sampler,
    benchmark: PromptBenchmark,
    settings: AlignmentSettings,
    processes: Processes,
    folder: Path,
) -> dict[str, Any]:
    """Return the accuracy of samples given their prompts, and their diversity, at each guidance scale. Rank 0 only."""
    total = benchmark.n * len(benchmark.prompts) * len(settings.scales)
    with progress_bar("Alignment", total, processes.rank) as bar, usage_errors():
        result = sample_and_score(module, sampler, benchmark, data, settings, processes, bar.update)
    if processes.rank > 0:
        return {}
    accuracy = share_correct(benchmark.detector_accuracy).value
    curves = {group: diversity_curve(by_scale) for group, by_scale in result.groups.items()}
    if any(curves.values()):  # a prompt with one real image, such as a glyph, has no diversity
        line_plots.alignment_against_diversity(curves, accuracy).save(folder / "alignment.png")
    scale = best_scale(result.groups)
    titles, rows = zip(*result.examples[scale], strict=True)
    images.add_title(images.titled_grids(rows, titles), f"prompts, at guidance {scale:g}").save(folder / "prompts.png")
    groups: dict[str, dict[str, Any]] = {group: {} for group in result.groups}
    for group, by_scale in result.groups.items():
        for scale, each in by_scale.items():
            groups[group][f"{scale:g}"] = {"metrics": as_dicts(each.metrics), "by_prompt": each.by_prompt}
    return {"n": benchmark.n, "detector": as_dicts(benchmark.detector_accuracy), "groups": groups}


def format_sampler_errors(
    results: Mapping[str, SamplerErrors], steps: Sequence[int], sampling_error: float, grid: str
) -> str:
    """Return the errors of samplers as two Markdown tables."""

    def table(errors: Mapping[str, Sequence[float]]) -> str:
        rows = [[name, *(f"{error:.2e}" for error in values)] for name, values in errors.items() if values]
        return markdown_table(["sampler", *(f"{n} steps" for n in steps)], rows)

    flow, moments = ({name: getattr(r, field) for name, r in results.items()} for field in ("flow", "moments"))
    return (
        f"Root mean square distance from the exact flow, {grid}:\n\n{table(flow)}\n\n"
        f"Distance of mean and covariance ({sampling_error:.1e} for exact samples):\n\n{table(moments)}"
    )


def as_dicts(metrics: Mapping[str, Metric]) -> dict[str, dict[str, float]]:
    return {name: metric._asdict() for name, metric in metrics.items()}


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of values (N,); NaN for N = 1."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def progress_bar(label: str, total: int, rank: int) -> Any:
    return tqdm(total=total, unit="sample", unit_scale=True, desc=label, disable=rank > 0)
