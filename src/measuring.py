"""What a comparison measures of one run, and how it is read."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from src.comparison import Record
from src.data.conditions import Condition, shown
from src.evaluation import SPECTRUM, ReverseVariance, bounds, error_by_log_snr
from src.module import DiffusionModule, Sampler
from src.quality import Yardstick
from src.tables import USUAL, stem

SHOWN_IMAGES, SHOWN_POINTS = 16, 1000

Measurements = dict[str, Tensor]
"""`figure/<name>`, `floor/<name>` (3,): a value and its interval; `cost/<name>` (); `samples`, `real`; `error`."""


def measured(
    module: DiffusionModule,
    sampler: Sampler,
    yardstick: Yardstick,
    held_out: int | None,
    links: int | None,
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
    data = yardstick.data
    drawn = yardstick.draw(module, sampler, lambda samples: advance(samples * sampler.steps), condition=condition)
    (samples,) = yardstick.measure([drawn], lambda it: it)
    found = {f"figure/{name}": torch.tensor(figure) for name, figure in samples.figures.items()}
    found["cost/calls_per_image"] = torch.tensor(drawn.calls)
    found["cost/seconds_per_image"] = torch.tensor(drawn.seconds)
    some = SHOWN_IMAGES if drawn.first.ndim == 4 else SHOWN_POINTS
    found["samples"] = drawn.first[:some]
    found["real"] = data.to_display(data.examples(some))

    count = min(held_out or len(data.val_indices), len(data.val_indices))
    source = data.source
    assert source is not None

    def load(places: range) -> tuple[Tensor, Tensor | None]:
        indices = data.val_indices[places.start : places.stop]
        cond = shown(condition, source, indices)
        return data.to_model(source.fetch(indices)).to(module.device), None if cond is None else cond.to(module.device)

    def show(places: range, passes: Iterable[int]) -> Iterator[int]:
        for each in passes:
            yield each
            advance(len(places))

    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    parts = bounds(module, batches, load, seed, links, variance, show)
    total = torch.cat([part.total for part in parts])
    error = 1.96 * total.std() / math.sqrt(count) if count > 1 else torch.full((), math.nan)
    found["figure/bits_per_dim"] = torch.stack([total.mean(), total.mean() - error, total.mean() + error])
    found["error"] = error_by_log_snr(parts, module.schedule, SPECTRUM)
    return found


def with_figures(record: Record, measurements: Measurements) -> Record:
    """A run's record with what was measured of it."""
    figures = {k.removeprefix("figure/"): v.tolist() for k, v in measurements.items() if k.startswith("figure/")}
    costs = {k.removeprefix("cost/"): v.item() for k, v in measurements.items() if k.startswith("cost/")}
    return replace(
        record,
        values={**{name: value for name, (value, _, _) in figures.items()}, **record.values},
        intervals={name: (low, high) for name, (_, low, high) in figures.items() if not math.isnan(low)},
        costs={**record.costs, **costs},
    )


def floors_of(measurements: Measurements) -> dict[str, tuple[float, float, float]]:
    """What real data come to, by metrics of samples; the number of the floor's, with which names end, may differ."""
    floors = {k.removeprefix("floor/"): v.tolist() for k, v in measurements.items() if k.startswith("floor/")}
    stems = {stem(name): tuple(floor) for name, floor in floors.items()}
    names = [k.removeprefix("figure/") for k in measurements if k.startswith("figure/")]
    usual = {name: float(value) for name in names if (value := USUAL.get(name.split("_")[0]))}
    return {name: (value, value, value) for name, value in usual.items()} | {
        name: stems[stem(name)] for name in names if stem(name) in stems
    }
