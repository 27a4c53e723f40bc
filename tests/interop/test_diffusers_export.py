"""Exported pipelines, opened in a process that has diffusers but not this project, against our samplers."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from src.diffusion import curves, samplers, schedules
from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.guidance import Guidance, guided
from src.diffusion.noise import ContinuousSchedule, NoiseSchedule, make_time_grid
from src.interop.diffusers_export import make_pipeline, sampling_code, write_pipeline
from src.interop.diffusers_samplers import diffusers
from src.models.conditioning import ClassEmbedding, ContinuousEmbedding
from src.models.mlp import MLP
from src.models.unet import UNet
from tests.models.test_models import randomize

pytest.importorskip("diffusers")

T = 100
MODEL = {
    "channels": 1,
    "image_size": 8,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [4],
    "num_heads": 1,
    "num_head_channels": None,
    "patch_size": 1,
    "resblock_updown": False,
    "dropout": 0.0,
    "time_conditioning": "add",
    "time_scale": float(T),
}
TABLES = {
    "linear": schedules.linear(T),
    "quadratic": schedules.quadratic(T),
    "cosine": schedules.cosine(T),
    "sigmoid_jabri": schedules.sigmoid_jabri(T),
    "sigmoid_geodiff": schedules.sigmoid_geodiff(T),
    "constant": schedules.constant(T),
    "inverse": schedules.inverse(T),
    "exponential": schedules.exponential(T),
    "laplace": schedules.laplace(T),
    "custom": schedules.custom(torch.linspace(0.001, 0.2, T, dtype=torch.float64).tolist()),
    "shifted": schedules.snr_shift(schedules.cosine(T), 0.5),
}
SAMPLERS = {
    "ancestral": samplers.ancestral,
    "ddim": samplers.ddim,
    "dpmpp_2m": samplers.dpmpp_2m,
    "heun": samplers.heun,
    "euler": partial(diffusers, scheduler="EulerDiscreteScheduler"),
}


class Case(NamedTuple):
    """A model and its sampler."""

    schedule: Any
    diffusion: GaussianDiffusion
    sampler: Callable[..., Any]
    spacing: str = "trailing"
    steps: int = 5
    model: dict[str, Any] = {}
    classes: int | None = None
    guidance: Guidance = Guidance()

    def network(self) -> UNet:
        condition = None if self.classes is None else partial(ClassEmbedding, num_classes=self.classes)
        torch.manual_seed(0)
        net = randomize(UNet(**MODEL | self.model, condition=condition, outputs=self.diffusion.outputs)).eval()
        net.conv_out.weight.data.mul_(0.3)
        return net

    def pipeline(self, net: Any = None) -> Any:
        names = None if self.classes is None else [f"class {k}" for k in range(self.classes)]
        return make_pipeline(
            self.network() if net is None else net,
            MODEL | self.model,
            self.diffusion,
            self.schedule,
            self.sampler,
            self.steps,
            self.spacing,
            names,
            self.guidance,
        )


def case(table="cosine", prediction="x0", variance="fixed_small", sampler="ancestral", clip_x0=1.0, **further):
    schedule = NoiseSchedule(TABLES[table]) if isinstance(table, str) else table
    fn = SAMPLERS[sampler] if isinstance(sampler, str) else sampler
    settings = {name: further.pop(name) for name in ("dynamic_threshold",) if name in further}
    return Case(schedule, GaussianDiffusion(prediction, variance, clip_x0, **settings), fn, **further)


def matrix() -> dict[str, Case]:
    cases = {}
    for table, prediction, sampler in itertools.product(TABLES, ("eps", "x0", "v"), SAMPLERS):
        clip = None if sampler == "euler" else 1.0
        for variance in ("fixed_small", "fixed_large") if sampler == "ancestral" else ("fixed_small",):
            cases[f"{table} {prediction} {variance} {sampler}"] = case(table, prediction, variance, sampler, clip)
    return cases


def our_samples(each: Case, net: UNet, batch: int = 2) -> torch.Tensor:
    """Sample with the noise of a generator of seed 0, which the pipeline draws in the same order."""
    generator = torch.Generator().manual_seed(0)

    def denoise(x, t, cond):
        inputs = [] if cond is None else [cond]
        return net(x, torch.full((len(x),), t.time.item()), *inputs)

    def noise(x):
        return torch.randn(x.shape, generator=generator)

    cond = None if each.classes is None else torch.arange(batch) % each.classes
    null = None if each.classes is None else torch.tensor([each.classes])
    predict = samplers.predictor(each.diffusion, guided(denoise, cond, null, each.guidance, 1))
    grid = make_time_grid(each.schedule, each.steps, each.spacing)
    size = (MODEL | each.model)["image_size"]
    x = grid[0].norm * noise(torch.empty(batch, 1, size, size))
    with torch.no_grad():
        *_, out = each.sampler(each.diffusion, predict, x, grid, noise=noise)
    return (out / 2 + 0.5).clamp(0, 1)
