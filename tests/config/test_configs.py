"""Configurations are code: each YAML composes, fits its target's signature, and names every argument of it."""

import inspect
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf

from src.config.arguments import check_arguments
from src.config.overrides import check_overrides
from src.config.rules import RECIPE, check_value
from src.config.search_path import CONF, config_groups
from src.errors import UsageError
from src.runs.autoencoder import build_autoencoder
from src.runs.components import build_module, build_sampler
from src.runs.nodes import inline_aliases
from src.runs.resolve import resolve
from tests.conftest import compose

CSV = Path(__file__).parents[1] / "measurements.csv"

# Options that need further overrides.
ALSO = {
    ("schedule", "custom"): ["schedule.betas=[" + ",".join(["0.1"] * 20) + "]"],
    ("data", "array"): ["data.root=x", "data.channels=2", "data.image_size=[32]"],
    ("data", "captions"): ["data.root=x"],
    ("data", "folder"): ["data.root=x"],
    ("data", "hub"): ["data.name=x"],
    ("data", "webdataset"): ["data.urls=x"],
    ("data", "table"): [
        f"data.path='{Path(__file__).parents[1] / 'measurements.csv'}'",
        "data.columns=[height,weight]",
    ],
    ("experiment", "folder_64"): ["data.root=x"],
    ("experiment", "folder_256"): ["data.root=x"],
}
SEPARATE = ("conditioning", "data", "experiment", "model", "trainer", "logger")
"""Groups whose choices do not train the digits by themselves."""
CHOICES = [(group, option) for group, options in config_groups().items() for option in options if group != "analytic"]
# Arguments that the program gives and no configuration should.
GIVEN = {
    *("decoder_scale", "num_values"),  # GaussianDiffusion, from the schedule and the data
    *("outputs", "condition", "dim", "augment_labels"),  # networks, from the process, the conditions and the data
    *("diffusion", "denoise", "x0", "transition", "t", "eps", "schedule"),  # objectives and weightings
    *("u", "shared_u", "position", "v"),  # timestep samplers, curves and warps
    *("predict", "x", "time_grid", "noise"),  # samplers
    *("n", "generator"),  # distributions of points
    *("optimizer", "num_steps"),  # learning-rate schedules
    "params",  # optimizers
    *("prepare", "download"),
    "repeats",  # of FolderDataModule, which only some of its options have
}


def chosen(group: str, option: str) -> DictConfig:
    cfg = compose("train", f"{group}={option}", "run_dir=runs/x", *ALSO.get((group, option), []))
    cfg.data = inline_aliases(cfg.data, "data")
    return cfg


def targets(cfg: DictConfig) -> list[DictConfig]:
    """Every node with a `_target_`."""
    found = [cfg] if "_target_" in cfg else []
    for key in cfg:
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none():
            found += targets(node)
    return found


@pytest.mark.parametrize(("group", "option"), CHOICES)
def test_every_choice_composes_and_fits_its_target(group, option):
    cfg = chosen(group, option)
    check_arguments(cfg)
    for node in targets(cfg):
        if not str(node._target_).startswith("src."):
            continue
        signature = inspect.signature(get_method(node._target_))
        # A partial of a data source has these from its data module.
        given = {"root", "image_size", "channels", "value_range", "skip_unreadable", "cache", "cache_dir", "val_root"}
        elsewhere = given if str(node._target_).startswith("src.data") else set()
        listed = {str(k) for k in node if not str(k).startswith("_")}
        missing = set(signature.parameters) - listed - GIVEN - elsewhere
        if "num_steps" in signature.parameters and "schedules" in node._target_:
            missing |= {"num_steps"} - listed
        assert not missing, f"{node._target_} has arguments that its YAML does not show: {missing}"


@pytest.mark.parametrize(
    ("group", "option"),
    [c for c in CHOICES if c[0] not in SEPARATE and c[1] != "autoencoder"],
)
def test_every_choice_builds_a_module_that_learns_and_samples(group, option):
    cfg = compose(
        "train", f"{group}={option}", "run_dir=runs/x", "model.model_channels=8", "model.num_res_blocks=1",
        "model.num_head_channels=8", *ALSO.get((group, option), []),
    )  # fmt: skip
    module = build_module(cfg, (1, 8, 8), num_values=17)
    out = module.training_step({"x": torch.zeros(4, 1, 8, 8), "start": 0, "total": 4}, 0)
    out["loss"].backward()
    assert out["terms"]["loss"].isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    sampler = build_sampler(cfg.sampler)._replace(steps=2)
    *_, x = module.sample(range(3), seed=0, sampler=sampler)
    assert x.shape == (3, 1, 8, 8) and x.isfinite().all()


def test_autoencoder_choices_build_a_module_that_learns():
    cfg = compose("train", "task=autoencoder", "run_dir=runs/x", "model.model_channels=8")
    module = build_autoencoder(cfg, (1, 8, 8))
    out = module.training_step({"x": torch.zeros(4, 1, 8, 8), "start": 0, "total": 4}, 0)
    out["loss"].backward()
    assert out["terms"]["loss"].isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_every_optimizer_has_plain_values_to_save():
    """Adam copies its betas, NAdam keeps what it is given, which goes into the checkpoint."""
    cfg = compose(
        "train", "optimizer._target_=torch.optim.NAdam", "~optimizer.fused", "run_dir=runs/x", "model.model_channels=8"
    )
    optimizer, _ = build_module(cfg, (1, 8, 8), num_values=17).prepare_optimizer(1)
    assert all(type(group["betas"]) is list for group in optimizer.param_groups)


@pytest.mark.parametrize("option", config_groups()["data"])
def test_every_dataset_goes_with_its_default_network(option):
    cfg = chosen("data", option)
    data = instantiate(cfg.data)
    net = instantiate(cfg.model)
    out = net(torch.zeros(2, *data.shape), torch.zeros(2))
    assert out.shape == (2, *data.shape)


@pytest.mark.parametrize("option", config_groups()["model"])
def test_every_network_has_a_learning_rate_length_and_averaging_of_its_own(option):
    node = chosen("model", option)
    if option == "mlp":
        node = compose("train", "data=points", "run_dir=runs/x")
    with torch.device("meta"):
        net = instantiate(node.model)
    assert sum(p.numel() for p in net.parameters()) > 0
    assert node.trainer.max_steps >= node.validate_every
    assert 0 < node.optimizer.lr <= 0.01


def test_aliases_become_the_settings_that_refer_to_them():
    cfg = compose("train", "data=webdataset", "data.urls=[a.tar,b.tar]", "run_dir=runs/x")
    resolved = resolve(cfg, None, None).data
    assert (resolved.root, resolved.val_root) == (["a.tar", "b.tar"], None)
    assert not {"urls", "val_urls"} & set(resolved)
    assert resolve(compose("train", "data=hub", "data.name=user/set", "run_dir=x"), None, None).data.root == "user/set"


@pytest.mark.parametrize("option", config_groups()["model"])
def test_models_set_only_network_and_recipe(option):
    assert set(OmegaConf.load(CONF / "model" / f"{option}.yaml")) <= {"defaults", "model", "recipe"}


@pytest.mark.parametrize("other", ["model=unet_adm", "experiment=cifar10_ddpm", "data=points"])
def test_typed_groups_keep_their_own_values(other):
    cfg = compose("train", other, "optimizer=sgd", "run_dir=runs/x")
    assert cfg.optimizer.lr == OmegaConf.load(CONF / "optimizer" / "sgd.yaml").lr
    assert compose("train", other, "callbacks=none", "run_dir=runs/x").callbacks.get("ema") is None


def test_settings_of_the_recipe_are_read():
    values = {
        "lr": 0.5,
        "warmup_steps": 3,
        "ema_decay": 0.25,
        "max_steps": 4,
        "validate_every": 5,
        "checkpoint_every": 6,
        "decay_matrices_only": True,
    }
    cfg = compose("train", *(f"recipe.{name}={value}" for name, value in values.items()), "run_dir=runs/x")
    assert set(cfg.recipe) == set(values) == {name.removeprefix("recipe.") for name in RECIPE}
    assert {name: OmegaConf.select(cfg, reader) for name, reader in RECIPE.items()} == {
        f"recipe.{name}": value for name, value in values.items()
    }


def test_model_without_a_recipe_trains_with_defaults(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("_target_: mine.Network\n")
    defaults = OmegaConf.load(CONF / "train.yaml").recipe
    cfg = check_overrides("train", ["model=mine"], added=[f"file://{tmp_path}"])
    assert {name: OmegaConf.select(cfg, reader) for name, reader in RECIPE.items()} == {
        f"recipe.{name}": value for name, value in defaults.items()
    }


@pytest.mark.parametrize("option", config_groups()["trainer"])
def test_trainer_presets_differ_only_where_they_say(option):
    default, preset = (compose("train", f"trainer={o}", "run_dir=runs/x").trainer for o in ("default", option))
    differing = {k for k in preset if preset[k] != default[k]}
    assert differing <= {"accelerator", "devices", "strategy", "precision"}


@pytest.mark.parametrize("data", ["digits", "points"])
def test_schedules_bring_their_own_target_whatever_the_data(data):
    for schedule, prediction in (("edm_lognormal", "edm"), ("rectified_flow", "velocity")):
        cfg = compose("train", f"data={data}", f"schedule={schedule}", "run_dir=runs/x")
        assert cfg.diffusion.prediction == prediction
        assert cfg.timestep_sampler.warp is not None
    assert cfg.weighting._target_.endswith("uniform_weighting")


@pytest.mark.parametrize("option", config_groups()["analytic"])
def test_analytic_data_are_built(option):
    cfg = compose("evaluate", f"analytic={option}", "run_dir=runs/x").analytic
    check_arguments(cfg, "analytic")
    assert not cfg or instantiate(cfg)(3, torch.Generator()).shape == (3, 2)


@pytest.mark.parametrize(
    "case",
    [
        "schedule.num_steps",
        "schedule.num_steps schedule=edm_lognormal",
        "diffusion.clip_x0",
        "diffusion.dynamic_threshold",
        "diffusion.sigma_data",
        "callbacks.ema.decay",
        "callbacks.nan_guard.lr_factor",
        "callbacks.power_ema.max_snapshots",
        "data.num_samples data=points",
        "data.val_fraction data=points",
        "data.batch_size data=points",
    ],
)
def test_ranges_equal_those_of_the_constructors(case, tmp_path):
    name, *chosen_options = case.split()
    cfg = compose("train", f"run_dir='{tmp_path}'", *chosen_options)
    parent, _, key = name.rpartition(".")
    node = OmegaConf.select(cfg, parent)
    whole = isinstance(node[key], int)
    for value in (-1, 0, 1, 2, 9, 10, 10_000, 10_001) if whole else (-0.5, 0.0, 0.5, 1.0, 1.5):
        node[key] = value
        refused = []
        for check in (lambda: check_value(name, node[key], f"{node._target_}.{key}"), lambda: instantiate(node)):
            try:
                check()
            except (ValueError, InstantiationException):
                refused.append(check)
        assert len(refused) != 1, (name, value)


@pytest.mark.parametrize("command", ["train", "sample", "schedules", "evaluate", "compare"])
def test_commands_compose_by_themselves(command):
    assert {"run_dir", "seed"} <= set(compose(command))


def test_optimizers_of_other_packages_may_have_three_betas():
    check_value("optimizer.betas", [0.98, 0.92, 0.99], "adan.Adan.betas")
    with pytest.raises(UsageError, match=r"optimizer\.betas"):
        check_value("optimizer.betas", [0.98, 0.92, 0.99], "torch.optim.AdamW.betas")


def test_cached_compositions_notice_changes():
    from hydra.core.config_store import ConfigStore

    for lr in (0.5, 0.25):
        ConfigStore.instance().store(group="optimizer", name="stored", node={"_target_": "torch.optim.SGD", "lr": lr})
        cfg = compose("train", "optimizer=stored")
        assert cfg.optimizer.lr == lr
        cfg.optimizer.lr = 7  # of this copy only
    assert compose("train", "optimizer=stored").optimizer.lr == 0.25
    del ConfigStore.instance().repo["optimizer"]
