"""What a comparison measures of one run, and how it is read."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from src.comparison import Record
from src.data.conditions import Condition, shown
from src.evaluation import SPECTRUM, bound, error_by_log_snr
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
    batch_size: int,
    seed: int,
    advance: Callable[[int], object],
    condition: Condition | None = None,
) -> Measurements:
    """The figures of a model's samples, the first of them, and the bound and error over log-SNR of `held_out` data.

    `condition` is the model's, if it takes any. `advance` is told how many more samples have gone a step of the
    sampler, or a link of the bound.
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
    parts = []
    assert data.source is not None
    for start in range(0, count, batch_size):
        places = data.val_indices[start : min(start + batch_size, count)]
        x = data.to_model(data.source.fetch(places)).to(module.device)

        cond = shown(condition, data.source, places)
        cond = None if cond is None else cond.to(module.device)

        def show(each: Iterable[int], size: int = len(x)) -> Iterator[int]:
            for link in each:
                yield link
                advance(size)

        parts.append(bound(module, x, seed, links, show, start, cond))
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
