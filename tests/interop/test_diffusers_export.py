"""Exported pipelines, opened in a process that has diffusers but not this project, against our samplers."""

import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from src.data.text import Tokens, _train_tokenizer
from src.diffusion import curves, samplers, schedules
from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.guidance import Guidance, guided
from src.diffusion.noise import ContinuousSchedule, NoiseSchedule, make_time_grid
from src.errors import UsageError
from src.interop.diffusers_export import make_pipeline, write_pipeline
from src.interop.diffusers_samplers import diffusers
from src.interop.diffusers_schedulers import MAX_STORED_RATIO
from src.models.conditioning import ClassEmbedding, ContinuousEmbedding, TextTransformer
from src.models.dit import DiT
from src.models.mlp import MLP
from src.models.unet import UNet
from tests.conftest import compose
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
PAPER_DIT = {"hidden_size": 16, "depth": 1, "num_heads": 2, "activation": "gelu", "norm": "layer", "qk_norm": False}
PAPER_DIT |= {"positions": "sincos", "freq_shift": 1}
"""Arguments of a transformer of diffusers."""
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
TOKENIZER = _train_tokenizer(["a red circle", "two blue squares"], 290)
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
    model: Mapping[str, Any] = MappingProxyType({})
    classes: int | None = None
    prompts: tuple[str, ...] = ()
    guidance: Guidance = Guidance()
    dit: Mapping[str, Any] = MappingProxyType({})
    """Arguments of a DiT in place of the U-Net."""

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the network."""
        common = {name: MODEL[name] for name in ("channels", "image_size", "time_scale")}
        return common | dict(self.dit) if self.dit else MODEL | dict(self.model)

    def encode(self) -> dict[str, Any] | None:
        if self.prompts:
            return {"tokenizer": TOKENIZER, "max_length": 24, "examples": list(self.prompts)}
        return None if self.classes is None else {"names": [f"class {k}" for k in range(self.classes)]}

    def network(self) -> UNet | DiT:
        condition = None if self.classes is None else partial(ClassEmbedding, num_classes=self.classes)
        if self.prompts:
            condition = partial(TextTransformer, vocab_size=300, max_length=24, hidden_size=8, num_layers=1)
        if self.dit:
            return scale_output(DiT(**self.settings(), condition=condition, outputs=self.diffusion.outputs))
        return scale_noise(UNet(**self.settings(), condition=condition, outputs=self.diffusion.outputs))

    def pipeline(self, net: Any = None) -> Any:
        return make_pipeline(
            self.network() if net is None else net,
            self.settings(),
            self.diffusion,
            self.schedule,
            self.sampler,
            self.steps,
            self.spacing,
            self.encode(),
            self.guidance,
        )

    def conditions(self, batch: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the conditions of a batch, which cycles through the examples, and the null condition."""
        if self.prompts:
            tokens = Tokens(TOKENIZER, 24, 300, self.prompts)
            return tokens([self.prompts[k % len(self.prompts)] for k in range(batch)]), tokens([None])
        if self.classes is None:
            return None, None
        return torch.arange(batch) % self.classes, torch.tensor([self.classes])


@torch.no_grad()
def scale_noise(net: UNet) -> UNet:
    """Give a network random weights and a path that returns its input, so that samples stay in [-1, 1].

    The input passes the first skip connection as x and -x, and SiLU(x) - SiLU(-x) = x.
    """
    randomize(net).eval()
    shortcut = net.up[-1].residual.shortcut.weight
    net.conv_in.weight[:2] = 0
    net.conv_in.bias[:2] = 0
    shortcut[:2] = 0
    for channel, sign in ((0, 1.0), (1, -1.0)):
        net.conv_in.weight[channel, 0, 1, 1] = sign
        shortcut[channel, shortcut.shape[1] // 2 + channel] = 1
    net.up[-1].residual.conv2.weight.mul_(0.1)
    net.conv_out.weight.mul_(0.1)
    net.conv_out.weight[0, 0, 1, 1], net.conv_out.weight[0, 1, 1, 1] = 0.35, -0.35
    return net


@torch.no_grad()
def scale_output(net: DiT) -> DiT:
    """Give a network random weights and small outputs, so that samples stay in [-1, 1]."""
    randomize(net).eval()
    net.linear_out.weight.mul_(0.2)
    return net


def case(table="cosine", prediction="x0", variance="fixed_small", sampler="ancestral", clip_x0=1.0, **further):
    schedule = NoiseSchedule(TABLES[table]) if isinstance(table, str) else table
    fn = SAMPLERS[sampler] if isinstance(sampler, str) else sampler
    settings = {name: further.pop(name) for name in ("dynamic_threshold",) if name in further}
    return Case(schedule, GaussianDiffusion(prediction, variance, clip_x0, **settings), fn, **further)


def matrix() -> dict[str, Case]:
    """Return cases of each table with each sampler, and in turn each prediction, so that every pair of these occurs."""
    cases = {}
    kinds = [("ancestral", "fixed_large"), *((sampler, "fixed_small") for sampler in SAMPLERS)]
    for (i, table), (j, (sampler, variance)) in itertools.product(enumerate(TABLES), enumerate(kinds)):
        prediction = ("eps", "x0", "v")[(i + j) % 3]
        ratio = NoiseSchedule(TABLES[table]).row(T - 1).ratio
        if sampler in ("euler", "heun") and ratio > MAX_STORED_RATIO:
            continue  # refused
        if (prediction, sampler) == ("eps", "euler") and ratio > 100:
            continue  # without a bound on x_0, the samples of an untrained network exceed [-1, 1]
        clip = None if sampler == "euler" else 1.0
        cases[f"{table} {prediction} {variance} {sampler}"] = case(table, prediction, variance, sampler, clip)
    return cases


def our_samples(each: Case, net: UNet | DiT, batch: int = 2) -> torch.Tensor:
    """Sample with the noise of a generator of seed 0, which the pipeline draws in the same order."""
    generator, patch = torch.Generator().manual_seed(0), each.model.get("patch_size", 1)

    def denoise(x, t, cond):
        return net(
            each.diffusion.scale_input(x, t), torch.full((len(x),), t.time.item()), *([] if cond is None else [cond])
        )

    def noise(x):
        patches = F.pixel_unshuffle(x, patch)
        return F.pixel_shuffle(torch.randn(patches.shape, generator=generator), patch)

    cond, null = each.conditions(batch)
    predict = samplers.predictor(each.diffusion, guided(denoise, cond, null, each.guidance, 1))
    grid = make_time_grid(each.schedule, each.steps, each.spacing)
    size = each.settings()["image_size"]
    x = grid[0].norm * noise(torch.empty(batch, 1, size, size))
    with torch.no_grad():
        *_, out = each.sampler(each.diffusion, predict, x, grid, noise=noise)
    return (out / 2 + 0.5).clamp(0, 1)


def others() -> dict[str, Case]:
    """Return cases of further samplers, noise levels, networks and conditions."""
    cosine, zero = "cosine", ZERO_TERMINAL
    flow = ContinuousSchedule(curves.rectified_flow, 1000)
    sde = samplers.dpmpp_2m_sde
    guidance = Guidance(scale=2.5)
    return {
        "ddim eta": case(sampler=partial(samplers.ddim, eta=0.6)),
        "dpmpp_2m_sde": case(sampler=sde),
        "learned_range": case(prediction="eps", variance="learned_range"),
        "learned_range with ddim": case(variance="learned_range", sampler="ddim"),
        "dynamic threshold": case(prediction="eps", dynamic_threshold=0.9),
        "dynamic threshold with dpmpp_2m": case(prediction="eps", sampler="dpmpp_2m", dynamic_threshold=0.9),
        "no bound": case("linear", "v", sampler="ddim", clip_x0=None),
        "other bound": case(prediction="eps", sampler="ddim", clip_x0=0.5),
        "zero terminal SNR": case(zero, "v"),
        "zero terminal SNR with ddim": case(zero, "x0", sampler="ddim"),
        "many steps": case(steps=20, sampler="dpmpp_2m"),
        "all steps": case("linear", variance="fixed_large", steps=T),
        "one step": case(steps=1, sampler="dpmpp_2m"),
        "karras": case(sampler="heun", spacing="karras"),
        "log-SNR": case(prediction="v", sampler="dpmpp_2m", spacing="log_snr"),
        "log-SNR with noise": case(sampler=sde, spacing="log_snr"),
        "karras ancestral": case(spacing="karras"),
        "karras ddim": case(sampler="ddim", spacing="karras"),
        "leading": case(sampler=partial(samplers.ddim, eta=1.0), spacing="leading"),
        "steps that do not divide": case(sampler="ddim", steps=7),
        "other time scale": case(sampler="dpmpp_2m", model={"time_scale": 1000.0}),
        "continuous": case(ContinuousSchedule(curves.cosine_log_snr), "v", spacing="karras", sampler="heun"),
        "continuous ancestral": case(ContinuousSchedule(curves.linear_log_snr)),
        "flow": case(flow, "velocity", sampler="ddim", clip_x0=None),
        "flow with a bound": case(flow, "velocity", sampler="ddim"),
        "flow ancestral": case(flow, "velocity"),
        "flow with dpmpp_2m": case(flow, "velocity", sampler="dpmpp_2m"),
        "shifted flow": case(
            ContinuousSchedule(curves.shifted(curves.rectified_flow, 0.5)), "velocity", sampler="ddim", clip_x0=None
        ),
        "EDM": case(EDM, "edm", sampler="heun", spacing="karras"),
        "EDM ancestral": case(EDM, "edm", clip_x0=None),
        "EDM with dpmpp_2m": case(EDM, "edm", "learned", sampler="dpmpp_2m", spacing="log_snr"),
        "EDM on a table": case(cosine, "edm", sampler="ddim"),
        "classes": case(cosine, classes=3),
        "guidance": case(cosine, "eps", classes=3, sampler="ddim", guidance=guidance),
        "guidance of learned_range": case(cosine, "eps", "learned_range", classes=3, guidance=guidance),
        "patches": case(model={"patch_size": 2, "image_size": 16}),
        "patches with learned_range": case(variance="learned_range", model={"patch_size": 2, "image_size": 16}),
        "patches, classes and karras": case(
            sampler="heun", spacing="karras", classes=2, model={"patch_size": 2, "image_size": 16}
        ),
        "text with guidance": case(prompts=("a red circle", "Two  blue squares"), guidance=guidance, sampler="ddim"),
        "text of any size": case(prompts=("a red circle",), model={"image_size": 9, "time_scale": 1000.0}, sampler=sde),
        "DiT": case(dit=PAPER_DIT),
        "DiT with classes and guidance": case(
            variance="learned_range", classes=3, guidance=guidance, dit=PAPER_DIT | {"patch_size": 4}
        ),
        "DiT as a flow": case(flow, "velocity", sampler="ddim", clip_x0=None, dit=PAPER_DIT),
        "DiT with text": case(
            prompts=("a red circle",),
            sampler="ddim",
            guidance=guidance,
            dit={"hidden_size": 16, "num_heads": 2, "depth": 1},
        ),
        "ADM": case(model={"time_conditioning": "scale_shift", "resblock_updown": True, "num_head_channels": 8}),
    }


def export_default(root: Path) -> tuple[torch.Tensor, str]:
    """Export a run of src.train with default settings and few steps; return its samples, and the printed lines."""
    from src.export import export
    from src.runs.open import open_run
    from src.train import train

    few = ["trainer.max_steps=1", "validate_every=1", "trainer.accelerator=cpu", "callbacks.progress=null"]
    few += [
        "sampler.steps=10",
        "callbacks.samples=null",
        "callbacks.bits_per_dim=null",
        "callbacks.loss_by_noise=null",
        "neighbors=null",
    ]
    train(compose("train", f"run_dir='{root / 'run'}'", *few))
    folder = root / "default"
    with redirect_stdout(io.StringIO()) as printed:
        export(compose("export", f"run='{root / 'run'}'", f"run_dir='{folder}'", "format=diffusers"))
    lines = printed.getvalue().partition("\n\n")[2]
    module = open_run(str(root / "run")).module
    each = Case(module.schedule, module.diffusion, module.sampler.fn, "trailing", module.sampler.steps)
    (folder / "call.json").write_text(json.dumps({"batch_size": 2, "num_inference_steps": each.steps}))
    return our_samples(each, module.net), lines


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the samples of all cases, ours and those of a process with diffusers only."""
    root = tmp_path_factory.mktemp("pipelines")
    ours = {}
    for name, each in {**matrix(), **others()}.items():
        net = each.network()
        pipeline, folder = each.pipeline(net), root / name
        write_pipeline(folder, pipeline)
        (folder / "call.json").write_text(json.dumps({"batch_size": 2, **pipeline.call}))
        ours[name] = our_samples(each, net)
    ours["default"], lines = export_default(root)
    (root / "lines.py").write_text(lines)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(root / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("open_pipelines.py")
    done = subprocess.run(
        [sys.executable, script, root], env=environment, cwd=root, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not [line for line in done.stderr.splitlines() if "ignored" in line or "xpected" in line]
    assert len(list(root.glob("sample*.png"))) == 16
    theirs = load_file(root / "results.safetensors")
    return {name: (ours[name], theirs[name]) for name in ours}


def test_pipelines_sample_as_ours(samples):
    errors = {name: (ours - theirs).abs().max().item() for name, (ours, theirs) in samples.items()}
    assert [f"{name}: {error:.1e}" for name, error in errors.items() if not error <= 1e-4] == []


def test_compared_samples_are_not_saturated(samples):
    inside = {name: ((ours > 0) & (ours < 1)).float().mean().item() for name, (ours, _) in samples.items()}
    assert [f"{name}: {share:.2f}" for name, share in inside.items() if share < 0.05] == []


ZERO_TERMINAL = NoiseSchedule(schedules.zero_terminal_snr(TABLES["linear"]))
EDM = ContinuousSchedule(curves.exploding)
REFUSED = {
    "diffusion.prediction": [
        lambda: case(prediction="velocity"),
        lambda: case(ContinuousSchedule(curves.rectified_flow), "x0"),
    ],
    "schedule": [lambda: case(EDM, "x0")],
    "diffusion.variance": [
        lambda: case(variance="learned"),
        lambda: case(variance="fixed_large", spacing="karras"),
        lambda: case(ContinuousSchedule(curves.cosine_log_snr), variance="learned_range"),
        lambda: case(EDM, "edm", "fixed_large"),
    ],
    "diffusion.clip_x0": [
        lambda: case("linear", sampler="euler"),
        lambda: case(sampler="dpmpp_2m", clip_x0=0.5),
        lambda: case(clip_x0=0.5, dynamic_threshold=0.9),
    ],
    "diffusion.dynamic_threshold": [lambda: case("linear", sampler="heun", dynamic_threshold=0.9)],
    "sampler.eta": [
        lambda: case(sampler=partial(samplers.ddim, eta=0.5), spacing="karras"),
        lambda: case(sampler=partial(samplers.dpmpp_2m_sde, eta=0.5)),
    ],
    "sampler.s_churn": [lambda: case(sampler=partial(samplers.heun, s_churn=10.0))],
    "sampler.scheduler": [lambda: case(sampler=partial(diffusers, scheduler="UniPCMultistepScheduler"))],
    "sampler=our_own": [lambda: case(sampler=our_own)],
    "sampler.spacing": [
        lambda: case(sampler="heun"),
        lambda: case(sampler="euler", clip_x0=None),
        lambda: case(variance="fixed_large", spacing="log_snr"),
    ],
    "sampler.steps": [lambda: case(variance="fixed_large", steps=7)],
    "model.time_scale": [lambda: case(variance="fixed_large", model={"time_scale": 1000.0})],
    "zero_terminal_snr": [
        lambda: case(ZERO_TERMINAL, "v", sampler="dpmpp_2m"),
        lambda: case(ZERO_TERMINAL, "v", sampler="heun"),
    ],
    "model.image_size": [
        lambda: case(model={"image_size": 9}),
        lambda: case(model={"image_size": 10, "patch_size": 2}),
    ],
    "model.positions=rope": [lambda: case(dit=PAPER_DIT | {"positions": "rope"})],
    "model.activation=swiglu model.norm=rms model.qk_norm=true must be model.activation=gelu model.norm=layer": [
        lambda: case(dit=PAPER_DIT | {"activation": "swiglu", "norm": "rms", "qk_norm": True})
    ],
    "model.num_heads": [lambda: case(model={"num_heads": 2})],
    "guidance.interval": [lambda: case(classes=2, guidance=Guidance(2.0, (0.1, 5.0)))],
    "guidance.rescale": [lambda: case(classes=2, guidance=Guidance(2.0, rescale=0.7))],
}


def our_own(diffusion, predict, x, time_grid, *, noise):
    yield x


@pytest.mark.parametrize("setting", REFUSED)
def test_what_diffusers_lacks_is_refused_by_name(setting):
    for make in REFUSED[setting]:
        with pytest.raises(ValueError, match=setting) as raised:
            make().pipeline()
        assert "\n" not in str(raised.value)
        assert ";" in str(raised.value)


def test_command_refuses_before_it_writes(trained, tmp_path):
    from src.export import export

    folder = tmp_path / "e"
    settings = [
        "format=diffusers",
        "sampler=heun",
        "sampler.spacing=trailing",
        f"run='{trained}'",
        f"run_dir='{folder}'",
    ]
    with pytest.raises(UsageError, match=r"sampler.spacing=trailing .*sampler.spacing=karras"):
        export(compose("export", *settings))
    assert not folder.exists()


def test_other_networks_are_refused_by_name():
    with pytest.raises(ValueError, match=r"model._target_=MLP"):
        case().pipeline(MLP(features=2))
    line = MODEL | {"image_size": [8]}
    with pytest.raises(ValueError, match=r"model.image_size"):
        case(model=line).pipeline(UNet(**line))
    net = UNet(**MODEL, condition=partial(ContinuousEmbedding, num_covariates=2))
    with pytest.raises(ValueError, match=r"conditioning.embed=ContinuousEmbedding"):
        case().pipeline(net)
