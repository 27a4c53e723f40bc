"""Exported networks compute what the network does, and sample without this project."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from src.config.overrides import check_overrides
from src.diffusion import curves, schedules
from src.diffusion.gaussian_diffusion import GaussianDiffusion, Target
from src.diffusion.noise import ContinuousSchedule, NoiseSchedule
from src.errors import UsageError
from src.models.conditioning import ClassEmbedding, ContinuousEmbedding, TextProjection, TextTransformer
from src.models.dit import DiT
from src.models.mlp import MLP
from src.models.unet import UNet
from src.rng import SampleNoise
from tests.conftest import compose, train_tiny
from tests.docs.test_links import FENCE, ROOT
from tests.loops import for_each
from tests.models.test_models import randomize

DOCS = ROOT / "docs" / "export.md"
SMALL = {"channels": 1, "model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": ()}
TOKENS = partial(TextTransformer, vocab_size=9, max_length=4, hidden_size=8, num_layers=1, num_heads=2)
NETWORKS = {
    "patched and cropped": ((1, 10, 7), {"patch_size": 2, "conv_backend": "winograd"}, None),
    "ADM with classes": (
        (1, 8, 8),
        {
            "resblock_updown": True,
            "time_conditioning": "scale_shift",
            "num_head_channels": 4,
            "outputs": 2,
            "gradient_checkpointing": True,
            "condition": partial(ClassEmbedding, num_classes=3),
        },
        torch.tensor([0, 3, 1]),
    ),
    "signals with covariates": (
        (1, 12),
        {"condition": partial(ContinuousEmbedding, num_covariates=2)},
        torch.tensor([[0.3, -1.0], [torch.nan, torch.nan]]),
    ),
    "volumes": ((1, 4, 4, 4), {"downsample_padding": 0}, None),
    "tokens": ((1, 8, 8), {"condition": TOKENS}, torch.tensor([[1, 5, 2, 0], [1, 2, 0, 0]])),
    "features": (
        (1, 8, 8),
        {"condition": partial(TextProjection, features=6, hidden_size=8)},
        torch.cat([torch.ones(2, 2, 6), torch.zeros(2, 3, 6)], dim=1),
    ),
    "transformer": (
        (1, 8, 8),
        {"hidden_size": 16, "depth": 1, "num_heads": 2, "registers": 2, "text": "joint", "condition": TOKENS},
        torch.tensor([[1, 5, 2, 0], [1, 2, 0, 0]]),
    ),
    "points": ((2,), {"condition": partial(ClassEmbedding, num_classes=3)}, torch.tensor([0, 3, 1])),
}


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow packages only when tests run, not when they are collected."""
    global torch_export
    from src.interop import torch_export


def network(shape: tuple[int, ...], settings: dict[str, object]) -> nn.Module:
    if len(shape) == 1:
        return randomize(MLP(*shape, **{"hidden_size": 8, "num_res_blocks": 1, **settings})).eval()
    if "hidden_size" in settings:
        return randomize(DiT(1, list(shape[1:]), **settings)).eval()
    return randomize(UNet(image_size=list(shape[1:]), **{**SMALL, **settings})).eval()


def sampler_of(steps: int):
    from src.diffusion.samplers import ddim
    from src.training.sampling import Sampler

    return Sampler(ddim, steps, "trailing")


# Networks


@for_each("shape, settings, conditions", NETWORKS)
@torch.no_grad()
def test_program_equals_the_network(shape, settings, conditions):
    net = network(shape, settings)
    program = torch_export.trace(net, torch_export.example_inputs(shape, conditions, 2)).module()
    for batch in (1, 3):
        inputs = torch_export.example_inputs(shape, conditions, batch)
        expected = net(*inputs)
        assert expected.std() > 0.1
        assert_close(program(*inputs), expected, rtol=1e-5, atol=1e-5)


def test_trace_keeps_the_network():
    net = network((1, 8, 8), {"conv_backend": "winograd"})
    torch_export.trace(net, torch_export.example_inputs((1, 8, 8), None, 2))
    assert {m.backend for m in net.modules() if hasattr(m, "backend")} == {"winograd"}


def test_onnx_equals_the_network(tmp_path):
    """With text; `test_onnx_samples_equal_ours` has classes."""
    import onnxruntime

    shape, settings, conditions = NETWORKS["tokens"]
    net = network(shape, settings)
    program = torch_export.trace(net, torch_export.example_inputs(shape, conditions, 2))
    path = torch_export.write_network(tmp_path, "onnx", program, net, [])
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 3):
        inputs = torch_export.example_inputs(shape, conditions, batch)
        (out,) = session.run(["output"], {n: x.numpy() for n, x in zip(("x", "time", "cond"), inputs, strict=True)})
        with torch.no_grad():
            assert_close(torch.from_numpy(out), net(*inputs), rtol=1e-4, atol=1e-4)


class Branching(nn.Module):
    def forward(self, x, time):
        return x if x.sum() > 0 else -x


def test_data_dependent_network_is_refused():
    with pytest.raises(ValueError, match="Branching") as error:
        torch_export.trace(Branching(), torch_export.example_inputs((2,), None, 2))
    assert "\n" not in str(error.value)


def test_wrong_program_is_refused_and_removed(tmp_path):
    net, other = network((2,), {}), network((2,), {"num_res_blocks": 2})
    inputs = torch_export.example_inputs((2,), None, 2)
    with pytest.raises(ValueError, match="format=torch_export"):
        torch_export.write_network(tmp_path, "torch_export", torch_export.trace(other, inputs), net, [inputs])
    assert [*tmp_path.iterdir()] == []


# The table of levels


@for_each("prediction", get_args(Target))
def test_levels_invert_the_target(prediction):
    """x_0 is recovered from x_t and the target of the network at every level."""
    curve = curves.rectified_flow if prediction == "velocity" else curves.cosine_log_snr
    schedule = NoiseSchedule(schedules.linear(20)) if prediction == "eps" else ContinuousSchedule(curve, 20)
    diffusion = GaussianDiffusion(prediction, "learned_range")
    levels = torch_export.describe_network(diffusion, schedule, (2,), {})["levels"]
    x0, eps = torch.tensor([0.3, -1.7], dtype=torch.float64)
    assert {len(column) for column in levels.values()} == {21}
    for t in range(20):
        level = schedule.row(t)
        x_t, target = level.alpha * x0 + level.sigma * eps, diffusion.target(x0, level, eps)
        row = {name: column[t] for name, column in levels.items()}
        assert_close(row["c_skip"] * x_t + row["c_out"] * target, x0)
        assert_close(row["c_in"] * x_t, diffusion.scale_input(x_t, level))
        assert row["time"] == level.time == (t + 1) / 20
    assert [levels[name][-1] for name in ("time", "alpha", "sigma")] == [0, 1, 0]


# The command


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with classes, a learned schedule and variance, and thresholding."""
    folder = tmp_path_factory.mktemp("runs") / "conditional"
    train_tiny(
        folder, "conditioning=class", "schedule=learned", "loss=vlb", "diffusion.variance=learned_range",
        "diffusion.clip_x0=0.5", "diffusion.dynamic_threshold=0.9", "trainer.max_steps=1", "validate_every=1",
        "callbacks.samples=null", "callbacks.bits_per_dim=null", "neighbors=null",
    )  # fmt: skip
    return folder


def exported(run: Path, folder: Path, *overrides: str) -> Path:
    from src.export import export

    return export(compose("export", f"run='{run}'", f"run_dir='{folder}'", *overrides))


def expected_samples(run: Path, count: int, steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the samples of a run by DDIM, with their noise and conditions."""
    from src.runs.open import open_run

    module = open_run(str(run)).module
    noise = SampleNoise(0, range(count), module.device).draw(module.shape)
    *_, x = module.sample(range(count), 0, sampler_of(steps))
    return x, noise, module.examples[:count]


def test_program_samples_without_this_project(conditional, tmp_path):
    """In a process of its own, by sample.py, its function, and the code of the documentation."""
    folder = tmp_path / "e"
    path = exported(conditional, folder, "format=torch_export")
    assert path == folder / "network.pt2"
    expected, noise, cond = expected_samples(conditional, 4, 10)
    torch.save((noise, cond), folder / "inputs.pt")
    blocks = [block[len("```python\n") : -3] for block in FENCE.findall(DOCS.read_text()) if "```python" in block]
    documented = "".join(blocks).replace("sample(net, info, noise, steps=50)", "None")  # for models without conditions
    code = (
        "import sys, runpy\nsys.modules['src'] = None\nrunpy.run_path('sample.py', run_name='__main__')\n"
        f"{documented}\nassert x.isfinite().all() and x.shape == noise.shape\n"
        "noise, cond = torch.load('inputs.pt')\ntorch.save(sample(net, info, noise, cond, steps=10), 'out.pt')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "samples.pt" in done.stdout
    assert_close(torch.load(folder / "out.pt"), expected, rtol=1e-4, atol=1e-4)
    assert torch.load(folder / "samples.pt").shape == (16, 1, 8, 8)
    info = json.loads((folder / "network.json").read_text())
    assert info["weights"] == "averaged" and info["value_range"] == [0, 16] and info["cond_null"] == 10
    assert info["config"]["conditioning"]["encode"]["names"] == [str(k) for k in range(10)]


def test_onnx_samples_equal_ours(conditional, tmp_path, caplog):
    import onnxruntime

    caplog.set_level("INFO")  # as Hydra does
    path = exported(conditional, tmp_path / "e", "format=onnx")
    expected, noise, cond = expected_samples(conditional, 4, 10)
    spec = importlib.util.spec_from_file_location("sample_of_export", path.with_name("sample.py"))
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    info = json.loads(path.with_name("network.json").read_text())
    x = script.sample(onnxruntime.InferenceSession(path), info, noise.numpy(), cond.numpy(), 10)
    assert_close(torch.from_numpy(x), expected, rtol=1e-4, atol=1e-4)
    assert [record.name for record in caplog.records if record.name.startswith("onnx")] == []


@for_each("name", ["network.pt2", "network.json", "sample.py"])
def test_existing_file_is_refused(name, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("used")
    (folder / name).write_text("mine")
    with pytest.raises(UsageError, match=f"already has {name}"):
        exported(trained, folder, "format=torch_export")
    assert [(file.name, file.read_text()) for file in folder.iterdir()] == [(name, "mine")]


@for_each("overrides, setting", [(["format=pickle"], "format=pickle"), (["format=onnx", "aot=true"], "aot=true")])
def test_wrong_settings_are_refused_before_imports(overrides, setting):
    with pytest.raises(UsageError, match=re.escape(setting)):
        check_overrides("export", ["run=x", *overrides], False)


def test_missing_packages_are_named_first(trained, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "onnxscript" else find(name, *a))
    monkeypatch.setattr("src.runs.open.open_run", None)
    with pytest.raises(UsageError, match=r"format=onnx.*onnxscript"):
        exported(trained, tmp_path / "e", "format=onnx")
    assert not (tmp_path / "e").exists()


def test_compilation_needs_a_compiler(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="aot=true"):
        exported(trained, tmp_path / "e", "format=torch_export", "aot=true")
