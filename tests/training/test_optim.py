"""Optimizers by configuration."""

from __future__ import annotations

import torch

from src.runs.build import build
from tests.conftest import TINY, compose


def test_any_torch_optimizer_is_built_from_its_target(tmp_path):
    """By a file of conf/optimizer, or by `_target_` without the arguments that the class lacks."""
    for name, *overrides in (
        ("SGD", "optimizer=sgd"),
        ("Adam", "optimizer=adam"),
        ("AdamW", "optimizer=adamw"),
        ("RMSprop", "optimizer=sgd", "optimizer._target_=torch.optim.RMSprop", "~optimizer.fused"),
        ("RAdam", "optimizer._target_=torch.optim.RAdam", "~optimizer.fused"),
        ("Adagrad", "optimizer._target_=torch.optim.Adagrad", "~optimizer.betas"),
    ):
        run = build(compose("train", *TINY, *overrides, f"run_dir='{tmp_path / name}'"))
        optimizer, _ = run.module.prepare_optimizer(1)
        assert type(optimizer) is getattr(torch.optim, name)
        before = [p.detach().clone() for p in run.module.weights]
        run.module.training_step({"x": torch.zeros(4, *run.module.shape), "start": 0, "total": 4}, 0)["loss"].backward()
        optimizer.step()
        assert any(not torch.equal(a, b) for a, b in zip(before, run.module.weights, strict=True)), name
