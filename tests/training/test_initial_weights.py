"""Networks that start from the weights of others."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from src.config.words import expand_init_from
from src.models.conditioning import ClassEmbedding
from src.models.mlp import MLP
from src.models.unet import UNet
from src.runs.build import build, close_run
from src.training.checkpoints import read_checkpoint
from src.training.initial_weights import load_matching
from tests.conftest import TINY, compose, train_tiny


def random_weights(net: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return net


def unet(channels: int, seed: int = 0, **settings: Any) -> nn.Module:
    size = settings.pop("image_size", 8)
    sizes = {"model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,)}
    return random_weights(UNet(channels, size, **(sizes | settings)), seed)


def test_further_channels_leave_predictions_of_the_others():
    for patch_size in (1, 2):
        for old_outputs, new_outputs in ((1, 1), (1, 2), (2, 1), (2, 2)):
            for old, new in ((1, 3), (3, 4), (3, 3)):
                trained = unet(old, 0, patch_size=patch_size, outputs=old_outputs)
                net = unet(new, 1, patch_size=patch_size, outputs=new_outputs)
                report = load_matching(net, trained.state_dict())
                assert report.new == report.unused == []
                x, time = torch.randn(2, new, 8, 8), torch.rand(2)
                theirs, ours = trained(x[:, :old], time), net(x, time)
                assert_close(ours[:, :old], theirs[:, :old])
                if old_outputs == new_outputs == 2:
                    assert_close(ours[:, new : new + old], theirs[:, old:])


def test_further_features_leave_predictions_of_an_mlp():
    trained, net = random_weights(MLP(2), 0), random_weights(MLP(5, outputs=2), 1)
    load_matching(net, trained.state_dict())
    x, time = torch.randn(7, 5), torch.rand(7)
    assert_close(net(x, time)[:, :2], trained(x[:, :2], time))


def test_equal_networks_share_every_weight():
    trained, net = unet(3, 0), unet(3, 1, image_size=16, attention_resolutions=(8,))
    report = load_matching(net, trained.state_dict())
    assert sorted(report.loaded) == sorted(net.state_dict())
    x, time = torch.randn(2, 3, 16, 16), torch.rand(2)
    assert torch.equal(net(x, time), trained(x, time))


def test_weights_that_do_not_fit_are_named_and_stay():
    trained = unet(3, 0, condition=lambda dim: ClassEmbedding(dim, 10))
    net = unet(1, 1, condition=lambda dim: ClassEmbedding(dim, 5), num_res_blocks=2)
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    report = load_matching(net, trained.state_dict())
    missing = {name.split()[0] for name in report.new}
    assert {"condition.table.weight", "conv_in.weight", "conv_out.weight", "conv_out.bias"} <= missing
    assert all(torch.equal(before[name], net.state_dict()[name]) for name in missing)
    assert sorted([*report.loaded, *missing]) == sorted(before) and report.partial == []
    assert "condition.table.weight (6, 64), not (11, 64)" in report.new


# Whole runs.


def averages_and_weights(run: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    return checkpoint["state_dict"], checkpoint["current_model_state"]


def initial_weights(folder: Path, *overrides: str) -> tuple[dict[str, Tensor], str]:
    """Return the weights of a run before its first step, and what it says about them."""
    cfg = compose("train", *TINY, f"run_dir='{folder}'", *expand_init_from(overrides))
    run = build(cfg)
    close_run(run)
    return {name: value.clone() for name, value in run.module.state_dict().items()}, run.initial


def test_run_starts_from_averaged_or_raw_weights(trained, tmp_path):
    averages, raw = averages_and_weights(trained)
    assert not all(torch.equal(averages[name], raw[name]) for name in raw)
    others = ["seed=5", "diffusion.prediction=v", "schedule=linear", "optimizer.lr=1e-4"]
    for settings, expected in (
        ([f"init_from={trained}", *others], averages),
        ([f"init_from={trained}", "init_from.weights=raw"], raw),
        ([f"init_from={trained}/checkpoints/last.ckpt", "init_from.weights=ema"], averages),
    ):
        ours, report = initial_weights(tmp_path / "new", *settings)
        assert str(trained) in report
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_class_condition_is_added_to_a_trained_network(trained, tmp_path):
    averages, _ = averages_and_weights(trained)
    ours, report = initial_weights(tmp_path / "new", f"init_from={trained}", "conditioning=class")
    assert all(torch.equal(ours[name], averages[name]) for name in averages)
    assert "condition.table.weight" in report and "1 initialized anew" in report


def test_resumed_run_takes_the_weights_of_its_checkpoint(tmp_path):
    """Also when the model that it started from is gone; and its losses are those of a run without interruption."""
    first = tmp_path / "first"
    train_tiny(first, "trainer.max_steps=2")
    start = [f"init_from={first}", "lr_scheduler.decay=none", "logger=csv", "trainer.log_every_n_steps=1"]
    for name, steps in (("whole", 6), ("parts", 3)):
        train_tiny(tmp_path / name, *expand_init_from(start), f"trainer.max_steps={steps}")
    shutil.rmtree(first)
    train_tiny(tmp_path / "parts", *expand_init_from(start), "trainer.max_steps=6", f"resume='{tmp_path / 'parts'}'")
    for ours, theirs in zip(*(averages_and_weights(tmp_path / name) for name in ("whole", "parts")), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_unusable_weights_are_refused(trained, tmp_path):
    for settings, rule in (
        ([f"init_from={tmp_path}/none"], r"init_from"),
        ([f"init_from={trained}", "model.model_channels=24"], r"init_from="),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=rule) as error:
            initial_weights(tmp_path / "new", *settings)
        assert "\n" not in str(error.value)
