"""A model of another project in the terms of this one."""

from typing import Any, NamedTuple

from torch import Tensor


class ImportedModel(NamedTuple):
    """A U-Net of another project: how this project builds it, and its weights."""

    model: dict[str, Any]
    """Arguments of `src.models.unet.UNet` without `condition`, with `channels`, `image_size` and `outputs`."""
    schedule: dict[str, Any]
    """A node like those of conf/schedule, with `_target_`."""
    diffusion: dict[str, Any]
    """Arguments of `GaussianDiffusion`, such as prediction and variance."""
    weights: dict[str, Tensor]
    """The weights by the names of our U-Net; those of a class embedding start with `condition.`."""
    num_classes: int | None = None
    """Classes of a class-conditional model, without the empty one; None for an unconditional one."""
    zero_terminal_snr: bool = False
    """Whether the schedule is rescaled to end at SNR 0."""
    sampler: str = "ancestral"
    """The name of a file in conf/sampler."""
    has_null_class: bool = False
    """Whether the last row of the class embedding was trained as the empty class, as guidance needs it."""
