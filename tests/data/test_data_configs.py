"""A dataset sets suitable defaults; typed overrides win over them, in any order."""

import itertools

import pytest
from omegaconf import DictConfig, OmegaConf

from tests.conftest import compose


def composed(*overrides: str) -> DictConfig:
    return compose("train", *overrides, "run_dir=x", "data.path=x" if "data=table" in overrides else "seed=0")


@pytest.mark.parametrize("data", ["points", "table"])
def test_vectors_bring_defaults_that_suit_them(data):
    cfg = composed(f"data={data}")
    assert cfg.model._target_ == "src.models.mlp.MLP"
    assert cfg.weighting._target_ == "src.diffusion.losses.uniform_weighting"
    assert cfg.sampler._target_ == "src.diffusion.samplers.ancestral"
    assert cfg.sampler.spacing == {"table": "karras", "curve": "trailing"}
    assert cfg.diffusion.prediction == "v" and cfg.diffusion.clip_x0 is None


@pytest.mark.parametrize("data", ["points", "table"])
def test_a_typed_group_wins_over_the_dataset(data):
    typed = {"sampler": "ddim", "model": "unet_tiny", "weighting": "min_snr", "schedule": "rectified_flow"}
    for group, option in typed.items():
        alone = composed(f"{group}={option}")
        for overrides in itertools.permutations([f"data={data}", f"{group}={option}"]):
            assert composed(*overrides)[group] == alone[group], overrides


def test_a_typed_setting_wins_over_the_dataset():
    for name, value in (
        ("diffusion.prediction", "eps"),
        ("diffusion.clip_x0", 2.0),
        ("sampler.spacing.table", "leading"),
    ):
        for overrides in itertools.permutations(["data=points", f"{name}={value}", "sampler=dpmpp_2m"]):
            assert OmegaConf.select(composed(*overrides), name) == value


def test_a_typed_sampler_wins_over_the_recipe():
    recipe = composed("experiment=moons")
    assert recipe.sampler.spacing.table == "karras"
    for overrides in itertools.permutations(["experiment=moons", "sampler=ddim"]):
        cfg = composed(*overrides)
        assert cfg.sampler._target_ == "src.diffusion.samplers.ddim"
        assert cfg.sampler.spacing.table == composed("sampler=ddim").sampler.spacing.table
        assert cfg.sampler.steps == recipe.sampler.steps
