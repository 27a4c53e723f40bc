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
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from src import resolvers, runs  # noqa: F401 - conf/ needs what the first registers
from src.data.images import digits
from src.module import Sampler
from src.trust import CONF

Array = NDArray[np.float64]
HEADER = "| digits | Fréchet, pixels | Fréchet, features | sure | novelty | classes 0-9, % |\n|---|---|---|---|---|---|"


class Quality(NamedTuple):
    """The figures of one set of digits."""

    pixels: float
    features: float
    sure: float
    novelty: float
    classes: Array  # (10,) shares


class Reference:
    """The digits of one split, (N, 64) in 0..16, and the classifier trained on its training part."""

    def __init__(self, train: Sequence[int], held_out: Sequence[int]) -> None:
        images = digits(None, 8, 1).fetch(range(len(train) + len(held_out)))
        x, labels = images.flatten(1).double().numpy(), load_digits().target
        self.train, self.held_out = x[list(train)], x[list(held_out)]
        self.classifier = MLPClassifier((128, 64), max_iter=300, random_state=0)
        self.classifier.fit(self.train, labels[list(train)])
        self.accuracy = float(self.classifier.score(self.held_out, labels[list(held_out)]))

    def features(self, x: Array) -> Array:
        """The classifier's last hidden layer: (N, 64) -> (N, 64)."""
        for weight, bias in zip(self.classifier.coefs_[:-1], self.classifier.intercepts_[:-1], strict=True):
            x = np.maximum(x @ weight + bias, 0)
        return x

    def quality(self, x: Array) -> Quality:
        """The figures of digits x (N, 64) against the held-out ones."""
        p = self.classifier.predict_proba(x)
        return Quality(
            pixels=frechet(x, self.held_out),
            features=frechet(self.features(x), self.features(self.held_out)),
            sure=float((p.max(1) > 0.9).mean()),
            novelty=nearest(x, self.train) / nearest(self.held_out, self.train),
            classes=np.bincount(p.argmax(1), minlength=10) / len(x),
        )


reference = cache(Reference)


def frechet(a: Array, b: Array) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) for the moments of a (N, D) and b (M, D)."""
    c1, c2 = np.cov(a.T), np.cov(b.T)
    # The eigenvalues of C1 C2 are the squared singular values of C1^(1/2) C2^(1/2), which are never complex.
    cross = np.linalg.svd(root(c1) @ root(c2), compute_uv=False).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(c1 + c2) - 2 * cross)


def root(c: Array) -> Array:
    """The square root of a covariance (D, D)."""
    values, vectors = np.linalg.eigh(c)
    return np.asarray((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)


def nearest(x: Array, train: Array) -> float:
    """The median distance from x (N, D) to the nearest of train (M, D)."""
    distances = torch.cdist(torch.from_numpy(x), torch.from_numpy(train), compute_mode="donot_use_mm_for_euclid_dist")
    return distances.min(1).values.median().item()


def chosen(name: str, steps: int, eta: float | None) -> Sampler:
    """The sampler of that YAML, in so many steps."""
    cfg = OmegaConf.load(CONF / "sampler" / f"{name}.yaml")
    assert isinstance(cfg, DictConfig)
    if eta is not None:
        cfg.eta = eta
    return runs.build_sampler(cfg)._replace(steps=steps)


def draw(opened: runs.OpenedRun, n: int, seed: int, sampler: Sampler) -> Array:
    """Samples 0..n - 1 of a run, as (n, 64) whole numbers in 0..16."""
    parts = []
    for start in range(0, n, 256):
        *_, x = opened.module.sample(range(start, min(start + 256, n)), seed, sampler)
        parts.append(opened.data.to_display(x).flatten(1))
    return (torch.cat(parts).double() * 16 / 255).round().numpy()


def row(name: str, qualities: Sequence[Quality]) -> str:
    """A line of the table: means over seeds, with their standard deviations if there are several."""
    columns = zip(*((q.pixels, q.features, q.sure, q.novelty) for q in qualities), strict=True)
    cells = [
        f"{mean(c):.{places}f}" + (f" ± {stdev(c):.{places}f}" if len(c) > 1 else "")
        for c, places in zip(columns, (1, 2, 3, 3), strict=True)
    ]
    share = np.mean([q.classes for q in qualities], axis=0)
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
            print(f"right on {real.accuracy:.1%} of {len(real.held_out)} held-out digits\n\n{HEADER}")
            print(row("held-out digits", [real.quality(real.held_out)]))
            print(row(f"{len(few)} training digits (floor)", [real.quality(few)]))
        qualities = [real.quality(draw(opened, args.n, seed, sampler)) for seed in args.seeds]
        print(row(folder, qualities), flush=True)


if __name__ == "__main__":
    main()
