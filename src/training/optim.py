"""Optimizer steps and learning-rate schedules."""

import math
from typing import Any, Literal, cast

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def skip_unless(fine: Tensor, optimizer: Optimizer) -> None:
    """Have the optimizer's next step change nothing, neither weights nor its own state, unless `fine` ()."""
    if optimizer.defaults.get("fused"):
        # The kernel looks at it on the device, for which nothing waits.
        cast(Any, optimizer).found_inf = (~fine).float()
    elif not fine:
        optimizer.zero_grad(set_to_none=True)


def warmup(
    optimizer: Optimizer,
    num_steps: int,
    *,
    warmup_steps: int,
    decay: Literal["none", "linear", "cosine"] = "none",
) -> LambdaLR:
    """Raise the learning rate linearly over `warmup_steps`, then hold it or let it fall to 0 at `num_steps`."""
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}: 0 starts at the full rate")
    if decay not in ("none", "linear", "cosine"):
        raise ValueError(f"unknown decay {decay!r}: lr_scheduler.decay is none, linear or cosine")

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(warmup_steps, 1))
        left = max(0.0, 1 - step / max(num_steps, 1))
        fall = {"none": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[decay]
        return rise * fall

    return LambdaLR(optimizer, factor)
