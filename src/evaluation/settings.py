"""Settings of an evaluation and their checks. This module does not import torch, so errors appear immediately."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from src.config.rules import check_value

ReverseVariance = Literal["optimal", "fixed_small", "fixed_large", "trained"]
"""The variance of the reverse steps in the bound; `trained` is the variance of the run's diffusion process."""
DETECTOR_STEPS = 600  # training steps after which the detector of shapes reaches the required accuracy


class QualitySettings(NamedTuple):
    """Settings of the sample quality metrics."""

    features: Sequence[str] | None = None  # names in `rules.CHOICES`; None: classifier if labeled, else pixels
    n: int = 1000  # number of generated samples
    seed: int = 0  # seed of the sampling noise, of the training samples in the baseline, and of the bootstrap
    batch_size: int = 256
    max_features: int = 10_000  # maximum number of samples in metrics that compare pairs: all but the Fréchet distance
    num_memorization: int = 1000  # samples and validation samples whose nearest training samples are searched
    reference: str = "val"  # reference data of the metrics: `val` or `train`; the baseline is the other split
    cache: Path = Path("outputs/cache")
    inception_weights: Path | None = None
    dinov2_model: str = "facebook/dinov2-large"

    def check(self) -> None:
        """Raise UsageError for a value that is out of range."""
        check_value("n", self.n, "evaluate.n")
        for name in ("batch_size", "max_features", "num_memorization", "reference"):
            check_value(name, getattr(self, name))
        check_value("features", self.features and [*self.features])


class AlignmentSettings(NamedTuple):
    """Settings of the prompt alignment benchmark."""

    scales: Sequence[float] = (1, 1.5, 2, 3, 5)  # guidance scales
    n: int | None = None  # samples per scale and group of prompts; None: 200 for captions, 500 for classes
    detector_steps: int = DETECTOR_STEPS
    seed: int = 0  # seed of the sampling noise, of the captions, and of the bootstrap
    batch_size: int = 256
    cache: Path = Path("outputs/cache")

    def check(self) -> None:
        """Raise ValueError for a value that is out of range."""
        numbers = [scale for scale in self.scales if isinstance(scale, int | float) and 0 <= scale < math.inf]
        if not numbers or len(numbers) < len(self.scales):
            raise ValueError(
                f"alignment.scales={list(self.scales)} must be guidance scales of at least 0, such as [1,1.5,2,3,5]"
            )
        check_value("alignment.n", self.n)
        check_value("alignment.detector_steps", self.detector_steps)


def check_num_val(variance: str, count: int, setting: str) -> None:
    """Raise ValueError that names `setting` if `count` validation samples are too few for the reverse variance."""
    if variance == "optimal" and count < 2:
        raise ValueError(
            f"{setting}=optimal needs at least 2 validation samples, got {count}; set {setting}=fixed_large"
        )
