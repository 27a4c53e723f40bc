"""Optimizer steps and learning-rate schedules."""

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

COUNTERS = ("k", "weight_sum", "lr_max", "scheduled_lr")
"""What a schedule-free optimizer keeps in its parameter groups besides settings."""

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]  # parameter groups -> an optimizer


def weight_matrices(net: nn.Module) -> dict[nn.Parameter, str]:
    """Return the weights of linear layers and convolutions, and their names.

    These are the parameters named `weight` with at least two dimensions, except those of `nn.Embedding`. All others are
    biases, norms, embeddings, positions and learned tokens.
    """
    return {
        p: name
        for name, p in net.named_parameters()
        if (parts := name.rpartition("."))[2] == "weight"
        and p.ndim > 1
        and not isinstance(net.get_submodule(parts[0]), nn.Embedding)
    }


def warmup(
    optimizer: Optimizer, num_steps: int, *, warmup_steps: int, decay: Literal["none", "linear", "cosine"] = "none"
) -> LambdaLR:
    """Raise the learning rate linearly over `warmup_steps`, then keep it or decay it to 0 at `num_steps`."""
    if warmup_steps < 0:
        raise ValueError(f"lr_scheduler.warmup_steps={warmup_steps} must be at least 0: 0 starts at the full rate")
    if decay not in ("none", "linear", "cosine"):
        raise ValueError(f"lr_scheduler.decay={decay} must be none, linear or cosine")

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(warmup_steps, 1))
        left = max(0.0, 1 - step / max(num_steps, 1))
        fall = {"none": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[decay]
        return rise * fall

    return LambdaLR(optimizer, factor)


def skip_unless(finite: Tensor, optimizer: Optimizer) -> None:
    """Make the optimizer's next step change neither weights nor its own state unless `finite` ()."""
    if optimizer.defaults.get("fused"):
        # The fused kernel reads the flag on the device, so nothing synchronizes.
        cast(Any, optimizer).found_inf = (~finite).float()
    elif not finite:
        optimizer.zero_grad(set_to_none=True)


def keep_current_settings(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Replace the settings in a state to load by the optimizer's own, except the learning rate and `COUNTERS`.

    A run may resume with other settings, or in a precision whose optimizer is not fused.
    """
    for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        kept = ("params", "lr", "initial_lr", *COUNTERS)
        group.update({name: value for name, value in own.items() if name not in kept})


def update_settings(scheduler: LRScheduler, fresh: LRScheduler) -> None:
    """Set the optimizer of a resumed `scheduler` to the settings of `fresh`, a new one, at the same step.

    Factors by which `NonFiniteGuard` lowered the learning rate stay.
    """
    groups = [*zip(scheduler.optimizer.param_groups, fresh.optimizer.param_groups, strict=True)]
    for k, (old, new) in enumerate(groups):
        lowered = scheduler.base_lrs[k] / old["initial_lr"]
        same = new["initial_lr"] == old["initial_lr"]
        fresh.base_lrs[k] = scheduler.base_lrs[k] if same else new["initial_lr"] * lowered
        new["lr"] *= lowered
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns, because this optimizer takes no step before its scheduler
        if isinstance(fresh, LambdaLR):  # computes the rate of any step directly
            fresh.last_epoch = scheduler.last_epoch - 1
        for _ in range(scheduler.last_epoch - fresh.last_epoch):
            fresh.step()
    for old, new in groups:
        old.update({name: value for name, value in new.items() if name not in ("params", *COUNTERS)})
    scheduler.load_state_dict({**fresh.state_dict(), "_step_count": scheduler.state_dict()["_step_count"]})


def replace_schedule(scheduler: LRScheduler, fresh: LRScheduler) -> LRScheduler:
    """Return `fresh`, a new schedule of another length, at the step and for the optimizer of `scheduler`."""
    update_settings(scheduler, fresh)
    fresh.optimizer, fresh._step_count = scheduler.optimizer, scheduler._step_count
    return fresh


def trial_state(make: MakeOptimizer, size: int) -> dict[str, Any]:
    """Return the optimizer's state of a weight (size, size) after one step."""
    weight = nn.Parameter(torch.zeros(size, size))
    weight.grad = torch.zeros(size, size)
    optimizer = make([{"params": [weight]}])
    optimizer.step()
    return dict(optimizer.state[weight])
