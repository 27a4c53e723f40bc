"""Muon for the weight matrices of hidden layers and AdamW for the other parameters, as one optimizer."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from src.distributed.sharding import local_shard, shard_like, unsharded
from src.training.finetuning import match_names

AdjustLr = Literal["match_rms_adamw", "original", "spectral_unclamped"]

OUTER = ("*_in.*", "*_out.*", "time.*", "noise.*", "augment.*", "condition.*")
"""Names of first and last layers and embeddings in this project's networks; not each network has all."""


class MuonAdamW(Optimizer):
    """Update weight matrices of hidden layers by Muon and the other parameters by AdamW, both of torch.

    Muon replaces the momentum of a matrix by its nearest orthogonal matrix. It gets the parameters in a group's
    "matrices", a dictionary of parameters and their names (see `TrainingModule.hidden_matrices`), except names that
    match a shell pattern in `adamw`: the first and the last layer, and the embeddings of time and condition. If no
    group has "matrices", it gets all parameters with two or more dimensions. A convolution's kernel (out, in, *size)
    counts as a matrix (out, in * size).

    `adjust_lr_fn` scales Muon's learning rate for each matrix (A, B). "match_rms_adamw", 0.2 sqrt(max(A, B)), makes its
    updates as large as AdamW's, so that one learning rate and one weight decay suit both. "original" is
    sqrt(max(1, A / B)) and "spectral_unclamped" sqrt(A / B). `betas` and `fused` are AdamW's.

    Source: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon); Liu et al. 2025 (arXiv 2502.16982), eq. 4.

    Raises ValueError for a value out of range, for a pattern that matches no matrix (but those of `OUTER`), or if no
    matrix is left to Muon.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: AdjustLr = "match_rms_adamw",
        betas: Sequence[float] = (0.9, 0.999),
        fused: bool | None = None,
        adamw: Sequence[str] = OUTER,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"optimizer.momentum={momentum} must be in [0, 1): 0.95 is usual")
        if not 1 <= ns_steps < 100:
            raise ValueError(f"optimizer.ns_steps={ns_steps} must be in [1, 99]: 5 is usual")
        params = list(params)
        named = any("matrices" in group for group in params)
        if known := [name for group in params for name in group.get("matrices", {}).values()]:
            typed = [pattern for pattern in adamw if pattern not in OUTER]
            match_names(known, typed, "optimizer.adamw", "weight matrix of a hidden layer")
        hidden, others = [], []
        for group in params:
            settings = {name: value for name, value in group.items() if name not in ("params", "matrices")}
            names = group.get("matrices", {} if named else {p: "" for p in group["params"] if p.ndim > 1})
            matrices = {p for p in group["params"] if p in names and not _matches(names[p], adamw)}
            hidden.append({**settings, "params": [p for p in group["params"] if p in matrices]})
            others.append({**settings, "params": [p for p in group["params"] if p not in matrices]})
        hidden, others = ([group for group in groups if group["params"]] for groups in (hidden, others))
        if not hidden:
            raise ValueError(f"optimizer.adamw={list(adamw)} leaves no matrix to Muon; choose optimizer=adamw")
        as_matrices = [{**group, "params": [p.detach().flatten(1) for p in group["params"]]} for group in hidden]
        self.muon = Muon(
            as_matrices, lr, weight_decay, momentum, nesterov, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn
        )
        self.muon.param_groups = [
            {**group, "params": own["params"]} for group, own in zip(self.muon.param_groups, hidden, strict=True)
        ]
        beta1, beta2 = betas
        self.adamw = AdamW(others or [{"params": []}], lr, (beta1, beta2), weight_decay=weight_decay, fused=fused)
        groups = [*self.muon.param_groups, *(group for group in self.adamw.param_groups if group["params"])]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        # Loading a state replaces groups and state of this optimizer.
        self.adamw.param_groups = [group for group in self.param_groups if "ns_steps" not in group]
        self.adamw.state = self.state
        self.adamw.step()
        for group in self.param_groups:
            for p in group["params"] if "ns_steps" in group else ():
                if p.grad is not None:
                    self._step_matrix(p, group)
        return loss

    def _step_matrix(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        """Let Muon update one matrix, which is gathered if it is sharded: orthogonalization needs all of it."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        stored = p.detach(), state["momentum_buffer"]
        matrix, momentum = (unsharded(each).flatten(1) for each in stored)
        assert p.grad is not None
        matrix.grad = unsharded(p.grad).flatten(1)
        self.muon.param_groups = [{**group, "params": [matrix]}]
        self.muon.state = cast(Any, {matrix: {"momentum_buffer": momentum}})
        self.muon.step()  # type: ignore[no-untyped-call]
        for target, value in zip(stored, (matrix, momentum), strict=True):
            if value is not target:
                local_shard(target).copy_(shard_like(value.view(p.shape), p))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
