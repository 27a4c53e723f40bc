"""Recipes, conf/experiment: each says where it is from, composes, trains on tiny data, and is what its paper says."""

import copy
import functools
import math
import re
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch.testing import assert_close

from src.config.overrides import CONF, check_overrides, config_groups
from src.config.resume import check_saved, saved_overrides
from src.diffusion.gaussian_diffusion import Prediction
from src.diffusion.noise import make_time_grid
from src.errors import UsageError
from src.runs.build import build, close
from src.runs.components import build_module, build_sampler, build_schedule, make, meta_network
from src.training.checkpoints import read_checkpoint
from tests.conftest import compose
from tests.data.test_images import noise, write_cifar, write_mnist
from tests.models.test_models import count, expected_count


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import what takes seconds here, since every collection of the tests would pay for it above."""
    global torchvision_utils
    from torchvision.datasets import utils as torchvision_utils


RECIPES = config_groups()["experiment"]
STATED = ["source", "hardware", "time", "figure", "measured"]
RESULTS = CONF.parent / "docs" / "results.md"


@functools.cache
def composed(name: str, *overrides: str) -> DictConfig:
    root = ["data.root=x"] if name.startswith("folder") else []
    return compose("train", f"experiment={name}", "run_dir=runs/x", *root, *overrides)


def recipe(name: str, *overrides: str) -> DictConfig:
    """A copy, since composing takes a second."""
    return copy.deepcopy(composed(name, *overrides))


def statements(name: str) -> dict[str, str]:
    """What the first comments of a recipe say, by their keys."""
    package, *lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert package == "# @package _global_"
    said = [re.fullmatch(r"# (\w+): (\S.*)", line) for line in lines[: len(STATED)]]
    assert all(said), lines[: len(STATED)]
    return dict(match.groups() for match in said if match)


def rows() -> dict[str, list[str]]:
    """The table of recipes in docs/results.md: the cells of each, by its name."""
    section = re.search(r"^## Recipes\n(.*?)(?=^##+ |\Z)", RESULTS.read_text(), re.MULTILINE | re.DOTALL)
    assert section
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in section[1].splitlines() if "|" in line]
    return {row[0].strip("` "): row for row in cells[2:]}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_states_where_it_is_from_and_whether_it_was_measured(name):
    said = statements(name)
    assert list(said) == STATED
    headings = re.findall(r"^##+ (.+)$", RESULTS.read_text(), re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    if said["measured"] != "no":
        where = re.fullmatch(r"yes, docs/results\.md(#\S+)", said["measured"])
        assert where
        assert where[1] in anchors
    row = rows()[name]
    assert (row[3] == "no") == (said["measured"] == "no")
    assert f"experiment={name}" in row[4]


def test_results_name_no_recipe_that_is_not_there():
    assert set(rows()) == set(RECIPES)


def tiny_data(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A handful of data of the recipe's kind in `folder`, and the settings that read them."""
    images = [f"data.root={folder}", "data.batch_size=4", "data.num_workers=0", "data.val_fraction=0.2"]
    if name.startswith("cifar10"):
        monkeypatch.setattr(torchvision_utils, "check_md5", lambda *args, **kwargs: True)
        write_cifar(folder, "cifar10", noise(10, 32, 32, 3))
        return [*images, "data.image_size=16"]
    if name == "fashion_mnist":
        write_mnist(folder, "FashionMNIST", noise(10, 28, 28))
        return images
    if name.startswith("folder"):
        for i, picture in enumerate(noise(10, 40, 50, 3)):
            Image.fromarray(picture).save(folder / f"{i}.png")
        return [*images, f"data.image_size={32 if name == 'folder_256' else 16}"]
    if name == "shapes_text":
        return ["data.source.num_samples=100", "data.batch_size=4", "data.val_fraction=0.2"]
    return {"digits": [], "digits_class": [], "moons": ["data.num_samples=600"]}[name]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_two_steps_on_tiny_data(name, tmp_path, monkeypatch):
    """All of it but the size of the network and of the data: its target, losses, optimizer, precision and sampler."""
    full = recipe(name)
    small = ["model.model_channels=8", "model.num_res_blocks=1"]
    small += ["model.num_head_channels=8"] if full.model.get("head_channels") else []
    folder = tmp_path / "run"
    cfg = compose(
        "train", f"experiment={name}", f"run_dir='{folder}'", *small, *tiny_data(name, tmp_path, monkeypatch),
        "trainer.max_steps=2", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "sampler.steps=2",
        "callbacks.samples.num_samples=2", "callbacks.progress.refresh_rate=0",
    )  # fmt: skip
    run = build(cfg)
    run.trainer.fit(run.module, datamodule=run.data)
    close(run)
    assert run.trainer.global_step == 2
    assert run.trainer.callback_metrics["val/loss"].isfinite()
    assert (folder / "samples" / "step_000002.png").exists()
    assert not (folder / "nonfinite.jsonl").exists()
    saved = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    assert saved["hyper_parameters"]["diffusion"] == OmegaConf.to_container(full.diffusion, resolve=True)
    assert saved["state_dict"]["net.linear_out.weight" if name == "moons" else "net.conv_out.weight"].any()  # was 0


PAPERS = {
    "cifar10_ddpm": {  # Ho et al. 2020, app. B, and scripts/run_cifar.py
        "data.batch_size": 128, "data.flip": True, "model.dropout": 0.1, "optimizer.lr": 2e-4,
        "callbacks.ema.decay": 0.9999, "trainer.gradient_clip_val": 1.0, "trainer.max_steps": 800_000,
        "diffusion.prediction": "eps", "diffusion.variance": "fixed_large", "sampler.steps": 1000,
        "schedule.beta_start": 1e-4, "schedule.beta_end": 0.02, "schedule.num_steps": 1000,
    },
    "cifar10_iddpm": {  # the README of openai/improved-diffusion, and its defaults
        "data.batch_size": 128, "data.flip": False, "model.dropout": 0.3, "model.num_heads": 4, "model.num_res_blocks": 3,
        "model.time_conditioning": "scale_shift", "model.attention_resolutions": [16, 8], "optimizer.lr": 1e-4,
        "callbacks.ema.decay": 0.9999, "trainer.gradient_clip_val": None, "trainer.max_steps": 500_000,
        "diffusion.prediction": "eps", "diffusion.variance": "learned_range", "sampler.steps": 4000,
        "schedule.num_steps": 4000, "loss.vlb_weight": 0.001,
    },
    "cifar10_edm": {  # Karras et al. 2022, tab. 1, and train.py of NVlabs/edm
        "data.batch_size": 512, "model.dropout": 0.13, "model.model_channels": 128, "model.channel_mult": [2, 2, 2],
        "model.attention_resolutions": [16], "optimizer.lr": 1e-3, "trainer.gradient_clip_val": None, "diffusion.sigma_data": 0.5,
        "schedule.curve.sigma_min": 0.002, "schedule.curve.sigma_max": 80, "timestep_sampler.warp.mean": -1.2,
        "timestep_sampler.warp.std": 1.2, "sampler.steps": 18, "sampler.spacing": "karras", "sampler.s_churn": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PAPERS)
def test_recipes_have_the_settings_of_their_papers(name):
    cfg = recipe(name)
    OmegaConf.resolve(cfg)
    assert {key: OmegaConf.select(cfg, key) for key in PAPERS[name]} == PAPERS[name]
    assert cfg.optimizer.betas == [0.9, 0.999]
    assert cfg.optimizer.weight_decay == 0


def parameters(name: str) -> int:
    cfg = recipe(name)
    return count(meta_network(cfg, make(cfg.diffusion).outputs))


def test_networks_have_the_parameters_of_their_papers():
    """35.7 M (Ho et al. 2020, app. B); the others added up layer by layer."""
    assert round(parameters("cifar10_ddpm") / 1e6, 1) == 35.7
    # Of two outputs, the second one's last convolution comes on top.
    second = 9 * 128 * 3 + 3
    assert parameters("cifar10_iddpm") == expected_count(3, 128, (1, 2, 2, 2), 3, {1, 2}, modulations=2) + second
    # NVIDIA's network has 4 attentions fewer, and in each of 4 resamplings a 1x1 convolution more; in float32 its
    # file has 223 MB.
    attention, convolution = 2 * 256 + 4 * (256 * 256 + 256), 256 * 256 + 256
    theirs = parameters("cifar10_edm") - 4 * attention + 4 * convolution
    assert theirs == pytest.approx(223e6 / 4, rel=2e-3)


def test_edm_counts_in_images():
    """Half-life of the average 0.5 million, warm-up 10 million, 200 million in all, batches of 512."""
    cfg = recipe("cifar10_edm")
    half_life = math.log(0.5) / math.log(cfg.callbacks.ema.decay)
    for steps, millions in ((half_life, 0.5), (cfg.lr_scheduler.warmup_steps, 10), (cfg.trainer.max_steps, 200)):
        assert steps * 512 / 1e6 == pytest.approx(millions, rel=2e-3)


def test_learning_rates_stay_where_the_warm_up_led():
    for name, at_first in (("cifar10_ddpm", 1 / 5000), ("cifar10_iddpm", 1), ("cifar10_edm", 1 / 19531)):
        cfg = recipe(name)
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = make(cfg.optimizer)([weight])
        (factor,) = make(cfg.lr_scheduler)(optimizer, cfg.trainer.max_steps).lr_lambdas
        steps = 0, cfg.lr_scheduler.warmup_steps, cfg.trainer.max_steps - 1
        assert [factor(step) for step in steps] == [pytest.approx(at_first), 1, 1]


def test_edm_sampler_calls_the_network_as_often_as_theirs():
    """NFE 35 (tab. 2), from sigma 80 to 0.002 (tab. 1)."""
    cfg = recipe("cifar10_edm", "model.model_channels=16", "model.num_res_blocks=1")
    module = build_module(cfg, (3, 32, 32), num_values=256)
    fn, steps, spacing, _ = build_sampler(cfg.sampler)
    seen = []

    def predict(x, t):
        seen.append(t.ratio.item())
        return Prediction(torch.zeros_like(x), x / t.sigma)

    x = torch.full((1, 3, 2, 2), 80.0)
    *_, x = fn(module.diffusion, predict, x, make_time_grid(module.schedule, steps, spacing), noise=torch.zeros_like)
    assert len(seen) == 35
    assert (max(seen), min(seen)) == (pytest.approx(80), pytest.approx(0.002))
    assert x.abs().max() < 1e-5  # where all data are 0


@pytest.mark.parametrize("name", ["cifar10_ddpm", "cifar10_iddpm"])
def test_chains_are_walked_step_by_step(name):
    """Alg. 2 of Ho et al.: every row of the table, the noisiest first."""
    cfg = recipe(name)
    schedule = build_schedule(cfg.schedule, cfg.snr_shift, cfg.zero_terminal_snr)
    _, steps, spacing, _ = build_sampler(cfg.sampler)
    walked = [level.alpha.item() for level in make_time_grid(schedule, steps, spacing)]
    assert walked == pytest.approx([schedule.row(t).alpha.item() for t in range(cfg.schedule.num_steps - 1, -2, -1)])


def terms(name: str):
    """The loss (8,) of a recipe with a shrunk network whose output is one constant, and what it is made of."""
    cfg = recipe(name, "model.model_channels=16", "model.num_res_blocks=1")
    module = build_module(cfg, (3, 32, 32), num_values=256)
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(8, 3, 32, 32, generator=generator) / 2 for _ in range(2))
    transition = module.schedule.transition(torch.linspace(0.05, 0.95, 8), x0)
    outputs = module.diffusion.outputs
    constant = functools.partial(torch.full, (8, 3 * outputs, 32, 32), 0.3)
    loss = module.loss_fn(module.diffusion, lambda x, t: constant(), x0, transition, eps)["loss"]
    return module, x0, eps, transition, loss


def test_ddpm_recipe_has_the_simple_loss():
    """Ho et al. 2020, eq. 14: the plain squared error of eps at every step."""
    _, _, eps, _, loss = terms("cifar10_ddpm")
    assert_close(loss, (eps - 0.3).square().mean((1, 2, 3)))


def test_edm_recipe_has_the_loss_of_karras_et_al():
    """Eq. 2 and tab. 1: lambda |D(x_0 + sigma eps) - x_0|^2, D = c_skip x + c_out F, written out."""
    _, x0, eps, transition, loss = terms("cifar10_edm")
    sigma, d = transition.t.sigma, 0.5
    x = x0 + sigma * eps
    denoised = d**2 / (sigma**2 + d**2) * x + sigma * d / (sigma**2 + d**2).sqrt() * 0.3
    weight = (sigma**2 + d**2) / (sigma * d) ** 2
    assert_close(loss, (weight * (denoised - x0).square()).mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_edm_network_sees_the_papers_noise_level():
    """Tab. 1: c_noise = log(sigma) / 4, on whose scale our u lies between the ends of the curve."""
    assert recipe("cifar10_edm").model.time_scale == pytest.approx((math.log(80) - math.log(0.002)) / 4, rel=1e-3)


@pytest.mark.parametrize(("name", "size"), [("folder_64", 64), ("folder_256", 256)])
def test_own_images_are_shifted_by_their_size_and_attended_at_16_and_8(name, size):
    """Hoogeboom et al. 2023, 2301.11093: alpha / sigma times 64 / size."""
    cfg = recipe(name)
    OmegaConf.resolve(cfg)
    assert cfg.data.image_size == size
    assert cfg.snr_shift == 64 / size
    assert cfg.model.attention == [16, 8]


def test_the_digits_and_the_moons_are_the_defaults_by_name():
    for name, same in (("digits", []), ("moons", ["data=points"])):
        by_name = compose("train", f"experiment={name}", "run_dir=runs/x")
        assert by_name == compose("train", *same, "run_dir=runs/x")


def test_the_moons_have_the_bits_that_their_recipe_says():
    """Of the held-out points, under the density of two half circles with noise, summed over the angle."""
    data = make(recipe("moons").data)
    data.setup()
    angle = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000 * math.pi
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)
    circles, std = 1.5 * torch.cat([upper, -upper]), 1.5 * 0.05  # the lower one is the upper one turned
    squares = torch.cdist(data.examples(len(data.val_indices)).double(), circles).square()
    log_p = (-squares / (2 * std**2)).logsumexp(1) - math.log(len(circles) * 2 * math.pi * std**2)
    exact = re.search(r"exact density gives ([\d.]+)", statements("moons")["figure"])
    assert exact
    assert (-log_p / math.log(2) / 2).mean().item() == pytest.approx(float(exact[1]), abs=1e-4)


def test_a_recipe_wins_over_schedule_and_model_and_the_command_line_over_it():
    """`schedule=edm_lognormal` and `model=unet_ddpm` set the weighting, the target, the rate and the length too."""
    cfg = recipe("cifar10_edm")
    assert cfg.weighting._target_ == "src.diffusion.losses.edm"  # the schedule's own, of which the recipe is silent
    assert (cfg.diffusion.prediction, cfg.sampler.spacing) == ("edm", "karras")
    model = compose("train", "model=unet_ddpm", "data=cifar10", "run_dir=runs/x")
    assert (model.optimizer.lr, cfg.optimizer.lr) == (2e-4, 1e-3)
    typed_overrides = recipe(
        "cifar10_edm", "optimizer.lr=3e-4", "weighting=uniform", "model=unet_small", "trainer.max_steps=7"
    )
    assert (typed_overrides.optimizer.lr, typed_overrides.trainer.max_steps) == (3e-4, 7)
    assert typed_overrides.weighting._target_ == "src.diffusion.losses.uniform"
    assert typed_overrides.model.width == 64
    assert recipe("cifar10_ddpm", "schedule=cosine").schedule._target_ == "src.diffusion.schedules.cosine"


@pytest.mark.parametrize(
    ("words", "multirun", "message"),
    [
        (["experiment=cifar10_ddmp"], False, r"unknown experiment 'cifar10_ddmp'; did you mean cifar10_ddpm\?"),
        (["experimnt=digits"], False, r"unknown setting 'experimnt'.*did you mean experiment\?"),
        (["experiment=folder_64"], False, r"data.root has no default: add data.root="),
        (["experiment=digits,moons"], False, "is a sweep: add -m"),
        (["experiment=digits,moonz"], True, r"did you mean moons\?"),
    ],
)
def test_a_recipe_that_is_misspelt_or_lacks_something_is_told_the_remedy(words, multirun, message):
    with pytest.raises(UsageError, match=message):
        check_overrides("train", words, multirun)


def test_recipes_are_swept_and_resumed_as_they_were_typed(tmp_path):
    check_overrides("train", ["experiment=digits,folder_64", "data.root=x", "seed=0,1"], multirun=True)
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- experiment=cifar10_ddpm\n- trainer.devices=4\n")
    before = saved_overrides(tmp_path)
    check_saved(tmp_path, before)
    check_overrides("train", [*before, f"resume={tmp_path}"])
