"""How good samples of runs on the embedded digits are: `python -m benchmarks.digits outputs/train/... --n 1000`.

Everything is measured against the run's own held-out digits, which the network never saw:

- Fréchet distance (Heusel et al. 2017, 1706.08500, eq. 6) of Gaussians fitted to both,
  |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), over the 64 pixels (0..16) and over the 64 hidden features of a small
  classifier trained on the training digits. It falls with the number of samples; the row of the training digits,
  as many of them, says how far real digits are from real digits.
- sure: the share of samples that the classifier gives a class with p > 0.9, and the classes that it gives.
- novelty: the median distance (in pixels) to the nearest training digit over that of held-out digits: 1 is like new
  real digits, 0 is copies.
"""

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from sklearn.datasets import load_digits
from torch import Tensor

from src import building, resolvers, runs  # noqa: F401 - conf/ needs what the first registers
from src.data.images import digits
from src.metrics.classes import class_counts
from src.metrics.classifier import train_classifier
from src.metrics.frechet import Moments, frechet_distance
from src.metrics.memorisation import memorisation
from src.module import Sampler
from src.trust import CONF

CACHE = Path("outputs/cache")
HEADER = "| digits | Fréchet, pixels | Fréchet, features | sure | novelty | classes 0-9, % |\n|---|---|---|---|---|---|"


class Quality(NamedTuple):
    """The figures of one set of digits."""

    pixels: float
    features: float
    sure: float
    novelty: float
    classes: Tensor  # (10,) shares


class Reference:
    """The digits of one split, (N, 1, 8, 8) uint8, and the classifier trained on its training part."""

    def __init__(self, train: Sequence[int], held_out: Sequence[int]) -> None:
        images = shown(digits(None, 8, 1).fetch(range(len(train) + len(held_out))))
        labels = torch.from_numpy(load_digits().target)
        self.train, self.held_out = images[list(train)], images[list(held_out)]
        tested = self.held_out, labels[list(held_out)]
        self.classifier = train_classifier(self.train, labels[list(train)], tested, CACHE)

    def quality(self, images: Tensor) -> Quality:
        """The figures of digits (N, 1, 8, 8) uint8 against the held-out ones."""
        x, real, train = (pixels(each) for each in (images, self.held_out, self.train))
        features, p = self.classifier(images)
        return Quality(
            pixels=frechet_distance(Moments.of(x), Moments.of(real)),
            features=frechet_distance(Moments.of(features), Moments.of(self.classifier(self.held_out).features)),
            sure=(p.max(1).values > 0.9).double().mean().item(),
            novelty=memorisation(x, real, train).ratio.value,
            classes=class_counts(p.argmax(1), 10) / len(x),
        )


reference = cache(Reference)


def shown(levels: Tensor) -> Tensor:
    """Grey levels 0..16 as uint8 0..255."""
    return (levels.double() * 255 / 16).round().to(torch.uint8)


def pixels(images: Tensor) -> Tensor:
    """uint8 0..255 (N, 1, 8, 8) as whole numbers in 0..16 (N, 64)."""
    return (images.flatten(1).double() * 16 / 255).round()


def chosen(name: str, steps: int, eta: float | None) -> Sampler:
    """The sampler of that YAML, in so many steps."""
    cfg = OmegaConf.load(CONF / "sampler" / f"{name}.yaml")
    assert isinstance(cfg, DictConfig)
    if eta is not None:
        cfg.eta = eta
    return building.build_sampler(cfg)._replace(steps=steps)


def draw(opened: runs.OpenedRun, n: int, seed: int, sampler: Sampler) -> Tensor:
    """Samples 0..n - 1 of a run, as (n, 1, 8, 8) uint8."""
    parts = []
    for start in range(0, n, 256):
        *_, x = opened.module.sample(range(start, min(start + 256, n)), seed, sampler)
        parts.append(opened.data.to_display(x))
    return torch.cat(parts)


def row(name: str, qualities: Sequence[Quality]) -> str:
    """A line of the table: means over seeds, with their standard deviations if there are several."""
    columns = zip(*((q.pixels, q.features, q.sure, q.novelty) for q in qualities), strict=True)
    cells = [
        f"{mean(c):.{places}f}" + (f" ± {stdev(c):.{places}f}" if len(c) > 1 else "")
        for c, places in zip(columns, (1, 2, 3, 3), strict=True)
    ]
    share = torch.stack([q.classes for q in qualities]).mean(0)
    return f"| {name} | {' | '.join(cells)} | {' '.join(f'{100 * s:.0f}' for s in share)} |"


def main() -> None:
    """Measure every run, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, under outputs/train")
    parser.add_argument("--n", type=int, default=1000, help="samples per run and seed")
    parser.add_argument("--sampler", default="ddim", help="a file under conf/sampler")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--eta", type=float, help="for samplers that have it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    last, sampler = None, chosen(args.sampler, args.steps, args.eta)
    for folder in args.runs:
        opened = runs.open_run(folder)
        if opened.config.data.source._target_ != "src.data.images.digits":
            raise SystemExit(f"{folder} was not trained on the embedded digits: give runs with data=digits")
        opened.data.setup()
        real = reference(tuple(opened.data.train_indices), tuple(opened.data.val_indices))
        if real is not last:
            last, few = real, real.train[: args.n]
            print(
                f"\n{args.n} samples, {args.sampler} with {args.steps} steps"
                + (f" and eta {args.eta:g}" if args.eta is not None else "")
                + f", seeds {args.seeds}; classifier"
            )
            print(f"right on {real.classifier.accuracy:.1%} of {len(real.held_out)} held-out digits\n\n{HEADER}")
            print(row("held-out digits", [real.quality(real.held_out)]))
            print(row(f"{len(few)} training digits (floor)", [real.quality(few)]))
        qualities = [real.quality(draw(opened, args.n, seed, sampler)) for seed in args.seeds]
        print(row(folder, qualities), flush=True)


if __name__ == "__main__":
    main()
