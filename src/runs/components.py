"""Build the parts of a run, each from its node of the configuration."""

import functools
import inspect
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from src.config.arguments import GRID_SETTINGS
from src.config.overrides import CONF, config_groups, nearest
from src.errors import sentence

if TYPE_CHECKING:
    import lightning as L
    import torch

    from src.data.conditions import Condition
    from src.diffusion.guidance import Guidance
    from src.diffusion.noise import ContinuousSchedule, NoiseSchedule, Schedule
    from src.training.module import ConditionSpec, DiffusionModule, LossFn, Sampler


def build_module(
    cfg: DictConfig, shape: tuple[int, ...], num_values: int | None, condition: "Condition | None" = None
) -> "DiffusionModule":
    """The LightningModule for samples of `shape` with so many `num_values`, with freshly initialised weights.

    `condition` is what `build_condition` made of the configuration. Without an optimizer in it the module can sample
    but not train.
    """
    import torch

    from src.models.mlp import MLP
    from src.training.learned_schedule import module_class

    if len(shape) == 3 and get_class(cfg.model._target_) is MLP:
        raise ValueError(
            f"the model is for points, the data are images of shape {shape}: choose model=unet_tiny or larger"
        )
    trains = "optimizer" in cfg
    if trains and str(cfg.trainer.precision).startswith("16") and cfg.optimizer.get("fused"):
        # The fused step unscales fp16 gradients itself, too late for clipping.
        warnings.warn("with fp16 the optimizer's step is not fused (optimizer.fused=false)", stacklevel=2)
        cfg.optimizer.fused = False
    schedule = build_schedule(cfg.schedule, cfg.snr_shift, cfg.zero_terminal_snr)
    diffusion = make(cfg.diffusion, {"decoder_scale": schedule.decoder_scale, "num_values": num_values})
    net = make(cfg.model, {"outputs": diffusion.outputs, **condition_network(cfg)})
    conditioning = None if condition is None else conditioning_of(condition, cfg.conditioning.cond_drop_prob)
    module = module_class(schedule)(
        net=net,
        schedule=schedule,
        diffusion=diffusion,
        loss_fn=build_loss(cfg.loss, schedule),
        timestep_sampler=make(cfg.timestep_sampler),
        sampler=build_sampler(cfg.sampler, cfg.get("guidance")),
        shape=shape,
        seed=cfg.seed,
        optimizer=make(cfg.optimizer) if trains else None,
        lr_scheduler=make(cfg.lr_scheduler) if trains else None,
        conditioning=conditioning,
    )
    check_network(net, shape, diffusion.outputs, conditioning)
    if trains:  # made once for nothing, so that values which they refuse are refused now
        module.prepare_optimizer(1)
    if len(shape) == 3:
        net.to(memory_format=torch.channels_last)
    return module


def build_condition(cfg: DictConfig) -> "Condition | None":
    """What turns what is asked for into what the network takes; None for a network that takes no conditions."""
    return None if cfg.get("conditioning") is None else make(cfg.conditioning.encode)


def condition_network(cfg: DictConfig) -> dict[str, Any]:
    """The argument of a network's constructor that makes it take conditions, if it is to."""
    return {} if cfg.get("conditioning") is None else {"condition": make(cfg.conditioning.embed)}


def conditioning_of(condition: "Condition", cond_drop_prob: float) -> "ConditionSpec":
    from src.training.module import ConditionSpec

    return ConditionSpec(condition([None]), condition(condition.examples or [None]), cond_drop_prob)


def build_schedule(cfg: DictConfig, snr_shift: float, zero_terminal_snr: bool) -> "NoiseSchedule | ContinuousSchedule":
    """A schedule from its YAML with the transforms that were asked for. Raises ValueError if they do not fit."""
    from torch import Tensor

    from src.diffusion import curves, schedules
    from src.diffusion.noise import ContinuousSchedule, NoiseSchedule, terminal_alpha_bar

    made = make(cfg)
    if not isinstance(made, Tensor):
        assert isinstance(made, ContinuousSchedule)
        if zero_terminal_snr and terminal_alpha_bar(made) > 0:
            raise ValueError(
                "zero_terminal_snr=true is for tables of betas, and a continuous schedule ends where its curve does: "
                "leave it out and lower schedule.curve.min_log_snr, or choose schedule=rectified_flow, which ends at 0"
            )
        if snr_shift != 1:
            made.curve = curves.shifted(made.curve, snr_shift)
        return made
    if snr_shift != 1:
        made = schedules.snr_shift(made, snr_shift)
    if zero_terminal_snr:
        made = schedules.zero_terminal_snr(made)
    return NoiseSchedule(made)


def build_loss(cfg: DictConfig, schedule: "Schedule") -> "LossFn":
    """An objective from its YAML; a weighting that has an argument `schedule` is given it."""
    loss_fn = make(cfg)
    weighting = getattr(loss_fn, "keywords", {}).get("weighting")
    if weighting is not None and "schedule" in inspect.signature(weighting).parameters:
        loss_fn = functools.partial(loss_fn, weighting=functools.partial(weighting, schedule=schedule))
    built: LossFn = loss_fn
    return built


def build_sampler(cfg: DictConfig, guidance: DictConfig | None = None) -> "Sampler":
    """A sampler from its YAML: the function's own arguments, the grid that it walks, and what guides it."""
    from src.diffusion.noise import DefaultSpacing
    from src.training.module import Sampler

    fn = make(OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k not in GRID_SETTINGS]))
    spacing = DefaultSpacing(**plain(cfg.spacing)) if isinstance(cfg.spacing, DictConfig) else cfg.spacing
    return Sampler(fn, cfg.steps, spacing, build_guidance(guidance))


def build_guidance(cfg: DictConfig | None) -> "Guidance":
    """Guidance from its settings, without the weaker model, which `runs.open_guidance_model` opens."""
    from src.diffusion.guidance import Guidance

    if cfg is None:
        return Guidance()
    for name in ("scale", "rescale"):
        if not isinstance(cfg[name], int | float):
            raise ValueError(f"guidance.{name}={cfg[name]} is of the wrong type: it must be a number")
    ends = [0.0, math.inf] if cfg.interval is None else list(cfg.interval)
    if len(ends) != 2 or not all(isinstance(end, int | float) for end in ends):
        raise ValueError(f"guidance.interval must be two levels of noise sigma / alpha, got {ends}: such as [0.2, 5]")
    made = Guidance(float(cfg.scale), (float(ends[0]), float(ends[1])), float(cfg.rescale))
    made.check()
    return made


def sampler_settings(asked: DictConfig, of_run: DictConfig) -> DictConfig:
    """The sampler that was asked for; without a choice, the run's own with what was given beside it."""
    if asked.get("_target_") is not None:
        return asked
    merged = OmegaConf.merge(of_run, {k: v for k, v in asked.items() if v is not None})
    assert isinstance(merged, DictConfig)
    return merged


def named_sampler(settings: Mapping[str, Any], of_run: DictConfig) -> DictConfig:
    """The file under conf/sampler that `sampler` among the settings names, or the run's own, with the others.

    Raises ValueError if there is no such file.
    """
    others = {k: v for k, v in settings.items() if k != "sampler"}
    if "sampler" not in settings:
        return sampler_settings(OmegaConf.create(others), of_run)
    name, known = str(settings["sampler"]), config_groups()["sampler"]
    if name not in known:
        raise ValueError(f"unknown sampler '{name}'{nearest(name, known) or f': choose from {known}'}")
    merged = OmegaConf.merge(OmegaConf.load(CONF / "sampler" / f"{name}.yaml"), others)
    assert isinstance(merged, DictConfig)
    return merged


def names_of(given: Any) -> list[str] | None:
    """One name or a list of them as a list; None for none."""
    return [given] if isinstance(given, str) else list(given) if given else None


def start_wandb(cfg: DictConfig, trainer: "L.Trainer", directory: Path) -> None:
    """Start W&B's run, if it is among the loggers, and keep its id. It goes offline, and says so, if it cannot online.

    Raises ValueError if it cannot start at all.
    """
    from lightning.pytorch.loggers import WandbLogger

    from src.training.loggers import write_wandb_id

    node = (cfg.logger or {}).get("wandb")
    started = list(trainer.loggers)
    for k, logger in enumerate(started):
        if not isinstance(logger, WandbLogger) or node is None:  # a logger of the user's own starts by itself
            continue
        try:
            _ = logger.experiment
        except Exception as error:
            if node.offline:
                raise ValueError(f"logger=wandb cannot start ({sentence(error)}): change logger.wandb.*") from error
            warnings.warn(f"W&B could not start online ({sentence(error)}): this run is logged offline", stacklevel=2)
            started[k] = instantiate(node, offline=True, mode="offline")
            _ = getattr(started[k], "experiment")  # noqa: B009 - of W&B's logger
        if trainer.is_global_zero:  # the only process that W&B knows
            write_wandb_id(directory, node.id)
    trainer.loggers = started


def check_network(
    net: "torch.nn.Module", shape: tuple[int, ...], outputs: int, conditioning: "ConditionSpec | None" = None
) -> None:
    """Raise ValueError if the network does not give what it should: run once, on tensors without contents."""
    import copy

    import torch

    hollow = copy.deepcopy(net).to("meta")
    try:
        with torch.no_grad():
            cond = () if conditioning is None else (conditioning.null.to("meta"),)
            got = tuple(hollow(torch.zeros(1, *shape, device="meta"), torch.zeros(1, device="meta"), *cond).shape[1:])
    except RuntimeError as error:
        raise ValueError(f"the network does not take data of shape {shape} ({sentence(error)}): see model.*") from error
    if got != (outputs * shape[0], *shape[1:]):
        raise ValueError(f"the network makes {got} of data of shape {shape}: model.* must keep the shape")


def warn_of_schedule(module: "DiffusionModule") -> None:
    """Say so if the last step, where sampling starts, is not noise, or has no weight in training."""
    from src.diffusion.noise import terminal_alpha_bar

    left = terminal_alpha_bar(module.schedule)
    if left > 0.01:
        warnings.warn(
            f"the schedule does not reach noise: alpha_bar ends at {left:.3g} (above 0.01), so sampling starts where "
            "training never was; use more steps, a larger schedule.beta_end, or zero_terminal_snr=true",
            stacklevel=2,
        )
    terms = module.check_loss()
    if terms["loss"].item() < 1e-12 * terms["mse"].item():
        warnings.warn(
            "the weighting gives the schedule's last step, where sampling starts, no weight at all: use "
            "weighting=uniform (min-SNR is 0 at zero SNR)",
            stacklevel=2,
        )


def meta_network(cfg: DictConfig, outputs: int) -> "torch.nn.Module":
    """The network without weights, laid out as it is trained."""
    import torch

    with torch.device("meta"):
        net: torch.nn.Module = make(cfg.model, {"outputs": outputs, **condition_network(cfg)})
    return net.to(memory_format=torch.channels_last)  # of images; points' weights have no such layout


def make(node: DictConfig, given: Mapping[str, Any] | None = None) -> Any:
    """What a node describes, with arguments that only the program knows.

    Partials come without Hydra's wrapper, which goes through all loaded modules at each call.
    """
    # Plain lists: an optimizer that keeps another kind has it in the checkpoint, which then is not read.
    return _unwrapped(instantiate(node, _convert_="all", **(given or {})))


def _unwrapped(made: Any) -> Any:
    if not isinstance(made, functools.partial):
        return made
    return functools.partial(made.func, *made.args, **{k: _unwrapped(v) for k, v in made.keywords.items()})


def plain(cfg: DictConfig, resolve: bool = True) -> dict[Any, Any]:
    """The configuration as nested plain values, every interpolation resolved or as it stands."""
    container = OmegaConf.to_container(cfg, resolve=resolve)
    assert isinstance(container, dict)
    return container
