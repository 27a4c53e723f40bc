"""Recipes in conf/experiment: each states its source, trains on tiny data, and has the settings of its paper."""

import copy
import functools
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch.testing import assert_close

from src.config.overrides import check_overrides
from src.config.resume import check_saved, saved_overrides
from src.config.search_path import CONF, config_groups
from src.data import emoji, kanji
from src.diffusion.gaussian_diffusion import Prediction
from src.diffusion.noise import make_time_grid
from src.errors import UsageError
from src.runs.build import build, close_run
from src.runs.components import build_module, build_sampler, build_schedule, meta_network
from src.runs.nodes import instantiate_node
from src.training.checkpoints import read_checkpoint
from tests.conftest import compose
from tests.data.test_images import noise, write_cifar, write_mnist
from tests.models.test_models import count, expected_count


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not during collection."""
    global torchvision_utils
    from torchvision.datasets import utils as torchvision_utils


RECIPES = config_groups()["experiment"]
STATED = ["source", "hardware", "time", "metric", "measured"]
RESULTS = CONF.parent / "docs" / "results.md"


@functools.cache
def composed(name: str, *overrides: str) -> DictConfig:
    root = ["data.root=x"] if name.startswith("folder") else []
    return compose("train", f"experiment={name}", "run_dir=runs/x", *root, *overrides)


def recipe(name: str, *overrides: str) -> DictConfig:
    """Return a copy of the cached configuration."""
    return copy.deepcopy(composed(name, *overrides))


def statements(name: str) -> dict[str, str]:
    """Return the first comments of a recipe by their keys."""
    package, *lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert package == "# @package _global_"
    matches = [re.fullmatch(r"# (\w+): (\S.*)", line) for line in lines[: len(STATED)]]
    assert all(matches), lines[: len(STATED)]
    return dict(match.groups() for match in matches if match)


def rows() -> dict[str, list[str]]:
    """Return the table of recipes in docs/results.md: the cells of each row by the name of its recipe."""
    section = re.search(r"^## Recipes\n(.*?)(?=^##+ |\Z)", RESULTS.read_text(), re.MULTILINE | re.DOTALL)
    assert section
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in section[1].splitlines() if "|" in line]
    return {row[0].strip("` "): row for row in cells[2:]}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_state_source_and_measurement(name):
    stated = statements(name)
    assert list(stated) == STATED
    headings = re.findall(r"^##+ (.+)$", RESULTS.read_text(), re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    if stated["measured"] != "no":
        link = re.fullmatch(r"yes, docs/results\.md(#\S+)", stated["measured"])
        assert link
        assert link[1] in anchors
    row = rows()[name]
    assert (row[3] == "no") == (stated["measured"] == "no")
    assert f"experiment={name}" in row[4]


def test_results_list_exactly_the_recipes():
    assert set(rows()) == set(RECIPES)


def tiny_data(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write a few samples for the recipe into `folder`, and return the settings that read them."""
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
    if name.startswith(("kanji", "emoji")):
        some = dict(itertools.islice(kanji.svg_files().items(), 0, None, 20))
        monkeypatch.setattr(kanji, "svg_files", lambda: some)
        few = emoji.sequences()[::20]
        monkeypatch.setattr(emoji, "sequences", lambda: few)
        encoder = []
        if name == "emoji_latent":
            from tests.runs.test_latents import save_vae

            encoder = [f"autoencoder={save_vae(folder / 'vae', channels=3)}"]
        return [*encoder, f"data.root={folder}", "data.source.held_out=0", "data.batch_size=4", "data.val_fraction=0.2"]
    if name == "shapes_text":
        return ["data.source.num_samples=100", "data.batch_size=4", "data.val_fraction=0.2"]
    return {"digits": [], "digits_class": [], "moons": ["data.num_samples=600"]}[name]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_train_two_steps_on_tiny_data(name, tmp_path, monkeypatch):
    """Only network and data are smaller: prediction, loss, optimizer, precision and sampler are the recipe's."""
    full = recipe(name)
    width = "hidden_size" if name == "moons" else "model_channels"
    small = [f"model.{width}=8", "model.num_res_blocks=1"]
    small += ["model.num_head_channels=8"] if full.model.get("num_head_channels") else []
    folder = tmp_path / "run"
    grid = "reconstructions" if full.get("task") == "autoencoder" else "samples"
    cfg = compose(
        "train", f"experiment={name}", f"run_dir='{folder}'", *small, *tiny_data(name, tmp_path, monkeypatch),
        "trainer.max_steps=2", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "sampler.steps=2",
        f"callbacks.{grid}.num_samples=2", "callbacks.progress.refresh_rate=0",
    )  # fmt: skip
    run = build(cfg)
    run.trainer.fit(run.module, datamodule=run.data)
    close_run(run)
    assert run.trainer.global_step == 2
    assert run.trainer.callback_metrics["val/loss"].isfinite()
    assert (folder / "samples" / "step_000002.png").exists()
    assert not (folder / "nonfinite.jsonl").exists()
    saved = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    of_latents = {"clip_x0": None, "sigma_data": 1.0} if name == "emoji_latent" else {}
    assert saved["hyper_parameters"]["diffusion"] == {**OmegaConf.to_container(full.diffusion), **of_latents}
    output = {"moons": "linear_out", "emoji_autoencoder": "decoder.1.conv2"}.get(name, "conv_out")
    assert saved["state_dict"][f"net.{output}.weight"].any()  # It starts at 0.


PAPERS = {
    "cifar10_ddpm": {  # Ho et al. 2020, app. B, and scripts/run_cifar.py
        "data.batch_size": 128, "data.flip": True, "model.dropout": 0.1, "optimizer.lr": 2e-4,
        "callbacks.ema.decay": 0.9999, "trainer.gradient_clip_val": 1.0, "trainer.max_steps": 800_000,
        "diffusion.prediction": "eps", "diffusion.variance": "fixed_large", "sampler.steps": 1000,
        "schedule.beta_start": 1e-4, "schedule.beta_end": 0.02, "schedule.num_steps": 1000,
    },
    "cifar10_iddpm": {  # the README of openai/improved-diffusion, and its defaults
        "data.batch_size": 128, "data.flip": False, "model.dropout": 0.3, "model.num_heads": 4,
        "model.num_res_blocks": 3, "model.time_conditioning": "scale_shift", "model.attention_resolutions": [16, 8],
        "optimizer.lr": 1e-4,
        "callbacks.ema.decay": 0.9999, "trainer.gradient_clip_val": None, "trainer.max_steps": 500_000,
        "diffusion.prediction": "eps", "diffusion.variance": "learned_range", "sampler.steps": 4000,
        "schedule.num_steps": 4000, "loss.vlb_weight": 0.001,
    },
    "cifar10_edm": {  # Karras et al. 2022, tab. 1, and train.py of NVlabs/edm
        "data.batch_size": 512, "model.dropout": 0.13, "model.model_channels": 128, "model.channel_mult": [2, 2, 2],
        "model.attention_resolutions": [16], "optimizer.lr": 1e-3, "trainer.gradient_clip_val": None,
        "diffusion.sigma_data": 0.5,
        "schedule.curve.sigma_min": 0.002, "schedule.curve.sigma_max": 80, "timestep_sampler.warp.mean": -1.2,
        "timestep_sampler.warp.std": 1.2, "sampler.steps": 18, "sampler.spacing": "karras", "sampler.s_churn": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PAPERS)
def test_recipes_match_their_papers(name):
    cfg = recipe(name)
    OmegaConf.resolve(cfg)
    assert {key: OmegaConf.select(cfg, key) for key in PAPERS[name]} == PAPERS[name]
    assert cfg.optimizer.betas == [0.9, 0.999]
    assert cfg.optimizer.weight_decay == 0


def parameters(name: str) -> int:
    cfg = recipe(name)
    return count(meta_network(cfg, instantiate_node(cfg.diffusion).outputs))


def test_networks_match_the_parameter_counts_of_their_papers():
    """35.7 M (Ho et al. 2020, app. B); the counts of the others are sums over layers."""
    assert round(parameters("cifar10_ddpm") / 1e6, 1) == 35.7
    # The second output adds channels to the last convolution.
    second = 9 * 128 * 3 + 3
    assert parameters("cifar10_iddpm") == expected_count(3, 128, (1, 2, 2, 2), 3, {1, 2}, modulations=2) + second
    # NVIDIA's network has 4 attention layers less, and 4 more 1x1 convolutions in resampling blocks. Its float32 file
    # has 223 MB.
    attention, convolution = 2 * 256 + 4 * (256 * 256 + 256), 256 * 256 + 256
    theirs = parameters("cifar10_edm") - 4 * attention + 4 * convolution
    assert theirs == pytest.approx(223e6 / 4, rel=2e-3)


def test_edm_schedule_matches_its_counts_of_images():
    """EMA half-life 0.5 million, warm-up 10 million, 200 million in total, in batches of 512."""
    cfg = recipe("cifar10_edm")
    half_life = math.log(0.5) / math.log(cfg.callbacks.ema.decay)
    for steps, millions in ((half_life, 0.5), (cfg.lr_scheduler.warmup_steps, 10), (cfg.trainer.max_steps, 200)):
        assert steps * 512 / 1e6 == pytest.approx(millions, rel=2e-3)


def test_learning_rates_are_constant_after_warmup():
    for name, initial in (("cifar10_ddpm", 1 / 5000), ("cifar10_iddpm", 1), ("cifar10_edm", 1 / 19531)):
        cfg = recipe(name)
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = instantiate_node(cfg.optimizer)([weight])
        (factor,) = instantiate_node(cfg.lr_scheduler)(optimizer, cfg.trainer.max_steps).lr_lambdas
        steps = 0, cfg.lr_scheduler.warmup_steps, cfg.trainer.max_steps - 1
        assert [factor(step) for step in steps] == [pytest.approx(initial), 1, 1]


def test_edm_sampler_has_the_nfe_of_the_paper():
    """NFE 35 (tab. 2), from sigma 80 to 0.002 (tab. 1)."""
    cfg = recipe("cifar10_edm", "model.model_channels=16", "model.num_res_blocks=1")
    module = build_module(cfg, (3, 32, 32), num_values=256)
    fn, steps, spacing, _ = build_sampler(cfg.sampler)
    ratios = []

    def predict(x, t):
        ratios.append(t.ratio.item())
        return Prediction(torch.zeros_like(x), x / t.sigma)

    x = torch.full((1, 3, 2, 2), 80.0)
    *_, x = fn(module.diffusion, predict, x, make_time_grid(module.schedule, steps, spacing), noise=torch.zeros_like)
    assert len(ratios) == 35
    assert (max(ratios), min(ratios)) == (pytest.approx(80), pytest.approx(0.002))
    assert x.abs().max() < 1e-5  # The data are all 0.


@pytest.mark.parametrize("name", ["cifar10_ddpm", "cifar10_iddpm"])
def test_ddpm_sampler_visits_every_timestep(name):
    """Ho et al. 2020, alg. 2: every row of the table, from the noisiest."""
    cfg = recipe(name)
    schedule = build_schedule(cfg.schedule, cfg.snr_shift, cfg.zero_terminal_snr)
    _, steps, spacing, _ = build_sampler(cfg.sampler)
    alphas = [level.alpha.item() for level in make_time_grid(schedule, steps, spacing)]
    assert alphas == pytest.approx([schedule.row(t).alpha.item() for t in range(cfg.schedule.num_steps - 1, -2, -1)])


def terms(name: str):
    """Return the loss (8,) of a recipe whose network outputs a constant, with the module and the inputs of the loss."""
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
    """Ho et al. 2020, eq. 14: the unweighted squared error of eps."""
    _, _, eps, _, loss = terms("cifar10_ddpm")
    assert_close(loss, (eps - 0.3).square().mean((1, 2, 3)))


def test_edm_recipe_has_the_loss_of_karras_et_al():
    """Eq. 2 and tab. 1: lambda |D(x_0 + sigma eps) - x_0|^2, D = c_skip x + c_out F."""
    _, x0, eps, transition, loss = terms("cifar10_edm")
    sigma, d = transition.t.sigma, 0.5
    x = x0 + sigma * eps
    denoised = d**2 / (sigma**2 + d**2) * x + sigma * d / (sigma**2 + d**2).sqrt() * 0.3
    weight = (sigma**2 + d**2) / (sigma * d) ** 2
    assert_close(loss, (weight * (denoised - x0).square()).mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_edm_network_input_has_the_scale_of_c_noise():
    """Karras et al. 2022, tab. 1: c_noise = log(sigma) / 4; our time in [0, 1] spans the range of log sigma."""
    assert recipe("cifar10_edm").model.time_scale == pytest.approx((math.log(80) - math.log(0.002)) / 4, rel=1e-3)


@pytest.mark.parametrize(("name", "size"), [("folder_64", 64), ("folder_256", 256)])
def test_folder_recipes_shift_snr_and_attend_at_16_and_8(name, size):
    """Hoogeboom et al. 2023 (arXiv 2301.11093): alpha / sigma times 64 / size."""
    cfg = recipe(name)
    OmegaConf.resolve(cfg)
    assert cfg.data.image_size == size
    assert cfg.snr_shift == 64 / size
    assert cfg.model.attention_resolutions == [16, 8]


def test_digits_and_moons_equal_the_defaults():
    for name, same in (("digits", []), ("moons", ["data=points"])):
        by_name = compose("train", f"experiment={name}", "run_dir=runs/x")
        assert by_name == compose("train", *same, "run_dir=runs/x")


def test_moons_have_the_exact_bits_per_dim_of_their_recipe():
    """The density is that of two half circles with Gaussian noise, as a sum over the angle."""
    data = instantiate_node(recipe("moons").data)
    data.setup()
    angle = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000 * math.pi
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)
    circles, std = 1.5 * torch.cat([upper, -upper]), 1.5 * 0.05  # The lower half circle is the upper one rotated.
    squares = torch.cdist(data.examples(len(data.val_indices)).double(), circles).square()
    log_p = (-squares / (2 * std**2)).logsumexp(1) - math.log(len(circles) * 2 * math.pi * std**2)
    exact = re.search(r"exact density gives ([\d.]+)", statements("moons")["metric"])
    assert exact
    assert (-log_p / math.log(2) / 2).mean().item() == pytest.approx(float(exact[1]), abs=1e-4)


def test_recipes_override_groups_and_overrides_win():
    """`schedule=edm_lognormal` and `model=unet_ddpm` set weighting, prediction, learning rate and steps too."""
    cfg = recipe("cifar10_edm")
    assert cfg.weighting._target_ == "src.diffusion.losses.edm"  # The recipe leaves it to the schedule.
    assert (cfg.diffusion.prediction, cfg.sampler.spacing) == ("edm", "karras")
    model = compose("train", "model=unet_ddpm", "data=cifar10", "run_dir=runs/x")
    assert (model.optimizer.lr, cfg.optimizer.lr) == (2e-4, 1e-3)
    typed = recipe("cifar10_edm", "optimizer.lr=3e-4", "weighting=uniform", "model=unet_small", "trainer.max_steps=7")
    assert (typed.optimizer.lr, typed.trainer.max_steps) == (3e-4, 7)
    assert typed.weighting._target_ == "src.diffusion.losses.uniform_weighting"
    assert typed.model.model_channels == 64
    assert recipe("cifar10_ddpm", "schedule=cosine").schedule._target_ == "src.diffusion.schedules.cosine"


@pytest.mark.parametrize(
    ("words", "multirun", "message"),
    [
        (["experiment=cifar10_ddmp"], False, r"unknown experiment 'cifar10_ddmp'; did you mean cifar10_ddpm\?"),
        (["experimnt=digits"], False, r"unknown setting 'experimnt'.*did you mean experiment\?"),
        (["experiment=folder_64"], False, r"data\.root"),
        (["experiment=digits,moons"], False, "experiment=digits,moons"),
        (["experiment=digits,moonz"], True, r"did you mean moons\?"),
    ],
)
def test_misspelled_recipes_get_a_hint(words, multirun, message):
    with pytest.raises(UsageError, match=message):
        check_overrides("train", words, multirun)


def test_recipes_can_be_swept_and_resumed(tmp_path):
    check_overrides("train", ["experiment=digits,folder_64", "data.root=x", "seed=0,1"], multirun=True)
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- experiment=cifar10_ddpm\n- trainer.devices=4\n")
    before = saved_overrides(tmp_path)
    check_saved(tmp_path, before)
    check_overrides("train", [*before, f"resume={tmp_path}"])
