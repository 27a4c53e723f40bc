"""Build the components of a run, each from its node of the configuration."""

import copy
import functools
import inspect
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from src.config.arguments import GRID_SETTINGS
from src.errors import format_override, sentence
from src.runs.latents import has_autoencoder
from src.runs.nodes import instantiate_node, is_typed, to_plain

if TYPE_CHECKING:
    import torch

    from src.data.conditions import Condition
    from src.data.module import Coupling
    from src.diffusion.guidance import Guidance
    from src.diffusion.noise import ContinuousSchedule, NoiseSchedule, Schedule
    from src.training.module import ConditionSpec, DiffusionModule, LossFn, Sampler


def build_module(
    cfg: DictConfig,
    shape: tuple[int, ...],
    num_values: int | None,
    condition: "Condition | None" = None,
    augment_labels: int = 0,
) -> "DiffusionModule":
    """Return the LightningModule for samples of `shape` (C, *size) or (D,), with newly initialized weights.

    `num_values` is the number of values of a pixel; None means continuous data. `condition` comes from
    `build_condition`. `augment_labels` is the number of augmentation labels that the network receives in training. If
    `cfg` has no optimizer, the module cannot train. Raises ValueError for settings that do not suit the data.
    """
    import torch

    from src.models.mlp import MLP
    from src.training.learned_schedule import module_class

    if len(shape) > 1 and get_class(cfg.model._target_) is MLP:
        raise ValueError(f"model=mlp needs points or rows, and the data have shape {shape}; choose model=unet_tiny")
    trains = "optimizer" in cfg
    schedule = build_schedule(cfg.schedule, cfg.snr_shift, cfg.zero_terminal_snr)
    diffusion = instantiate_node(cfg.diffusion, {"decoder_scale": schedule.decoder_scale, "num_values": num_values})
    coupling: Coupling = cfg.data.get("coupling") or "independent"
    if coupling == "ot" and augment_labels:
        raise ValueError(
            "data.coupling=ot needs data.edm_augment=0: the noise would depend on the labels of the augmentation"
        )
    net = build_network(cfg, diffusion.outputs, augment_labels)
    spec = _condition_spec(cfg, condition)
    make_module: Callable[..., DiffusionModule] = module_class(schedule)
    if trains and cfg.get("repa"):
        make_module = aligned(make_module, cfg)
    module = make_module(
        net=net,
        schedule=schedule,
        diffusion=diffusion,
        loss_fn=build_loss(cfg.loss, schedule),
        timestep_sampler=instantiate_node(cfg.timestep_sampler),
        sampler=build_sampler(cfg.sampler, cfg.get("guidance")),
        shape=shape,
        seed=cfg.seed,
        optimizer=instantiate_node(cfg.optimizer) if trains else None,
        lr_scheduler=instantiate_node(cfg.lr_scheduler) if trains else None,
        conditioning=spec,
        lr_multipliers=cfg.get("lr_multipliers"),
        decay_matrices_only=bool(cfg.get("decay_matrices_only")),
        coupling=coupling,
    )
    check_network(net, shape, diffusion.outputs, spec)
    if trains:  # The optimizer and the scheduler reject invalid values here, before training.
        module.prepare_optimizer(1)
    if len(shape) == 3:
        net.to(memory_format=torch.channels_last)
    return module


def build_network(cfg: DictConfig, outputs: int, augment_labels: int) -> "torch.nn.Module":
    """Return the network of a configuration, with its adapters, without gradients of the weights in `freeze`.

    `outputs` is the number of outputs per channel. Raises ValueError for a network without augmentation labels.
    """
    from src.training.finetuning import add_adapters, freeze

    arguments = {"outputs": outputs, **_network_condition(cfg)}
    if augment_labels:
        if "augment_labels" not in inspect.signature(get_class(cfg.model._target_)).parameters:
            raise ValueError(
                f"data.edm_augment={cfg.data.get('edm_augment')} needs a network with the argument augment_labels, and "
                f"{cfg.model._target_} has none; choose model=unet_*, or set data.edm_augment=0"
            )
        arguments["augment_labels"] = augment_labels
    with warnings.catch_warnings():
        if not is_typed("model.attention_resolutions"):  # a default for larger images
            warnings.filterwarnings("ignore", message=r"model\.attention_resolutions")
        net: torch.nn.Module = instantiate_node(cfg.model, arguments)
    if cfg.get("lora"):
        add_adapters(net, **to_plain(cfg.lora))
    freeze(net, cfg.get("freeze") or [])
    return net


def aligned(make_module: "Callable[..., DiffusionModule]", cfg: DictConfig) -> "Callable[..., DiffusionModule]":
    """Return the constructor of a module with the alignment of `cfg.repa`, instead of the module of the schedule.

    Raises ValueError for settings with which it does not work.
    """
    from src.data.fit import height_and_width
    from src.training.module import DiffusionModule
    from src.training.repa import AlignedModule, make_encoder

    if make_module is not DiffusionModule:
        raise ValueError("repa=default excludes schedule=learned; choose another schedule, or leave repa out")
    if cfg.get("compile") and cfg.model.get("gradient_checkpointing"):  # The compiler leaves out hooks in it.
        override = format_override("compile", cfg.compile)
        raise ValueError(f"{override} excludes model.gradient_checkpointing=true with repa=default; leave one out")
    settings = to_plain(cfg.repa)
    if has_autoencoder(cfg):
        settings["image_shape"] = (cfg.data.channels, *height_and_width(cfg.data.image_size))
    return functools.partial(AlignedModule, encoder=make_encoder(str(settings.pop("encoder"))), **settings)


def build_condition(cfg: DictConfig) -> "Condition | None":
    """Return the encoder of prompts, classes or covariates for the network; None for an unconditional run."""
    return None if cfg.get("conditioning") is None else instantiate_node(cfg.conditioning.encode)


def _condition_spec(cfg: DictConfig, condition: "Condition | None") -> "ConditionSpec | None":
    """Return the encoded empty condition and examples, and how often training drops conditions; None without them."""
    if condition is None:
        return None
    from src.training.module import ConditionSpec

    null, examples = condition([None]), condition(condition.examples or [None])
    return ConditionSpec(null, examples, cfg.conditioning.cond_drop_prob)


def _network_condition(cfg: DictConfig) -> dict[str, Any]:
    """Return the argument `condition` of a conditional network's constructor."""
    return {} if cfg.get("conditioning") is None else {"condition": instantiate_node(cfg.conditioning.embed)}


def build_schedule(cfg: DictConfig, snr_shift: float, zero_terminal_snr: bool) -> "NoiseSchedule | ContinuousSchedule":
    """Return the schedule of a node after both transforms. Raises ValueError for a transform that does not apply."""
    from torch import Tensor

    from src.diffusion import curves, schedules
    from src.diffusion.noise import NoiseSchedule, terminal_alpha_bar

    schedule = instantiate_node(cfg)
    if isinstance(schedule, Tensor):
        betas = schedules.snr_shift(schedule, snr_shift) if snr_shift != 1 else schedule
        return NoiseSchedule(schedules.zero_terminal_snr(betas) if zero_terminal_snr else betas)
    if zero_terminal_snr and terminal_alpha_bar(schedule) > 0:
        raise ValueError(
            "zero_terminal_snr=true needs a table of betas, and this schedule is continuous: leave it out and "
            "lower schedule.curve.min_log_snr, or choose schedule=rectified_flow, which ends at SNR 0"
        )
    if snr_shift != 1:
        schedule.curve = curves.shifted(schedule.curve, snr_shift)
    continuous: ContinuousSchedule = schedule
    return continuous


def build_loss(cfg: DictConfig, schedule: "Schedule") -> "LossFn":
    """Return the loss of a node. A weighting with an argument `schedule` receives the run's schedule.

    The schedule is bound here because Hydra would deep-copy it, and with it the weights of a learned schedule.
    """
    loss_fn = instantiate_node(cfg)
    weighting = getattr(loss_fn, "keywords", {}).get("weighting")
    if weighting is not None and "schedule" in inspect.signature(weighting).parameters:
        loss_fn = functools.partial(loss_fn, weighting=functools.partial(weighting, schedule=schedule))
    built: LossFn = loss_fn
    return built


def build_sampler(cfg: DictConfig, guidance: DictConfig | None = None) -> "Sampler":
    """Return the sampler of a node, with guidance."""
    from src.diffusion.noise import DefaultSpacing
    from src.training.module import Sampler

    fn = instantiate_node(OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k not in GRID_SETTINGS]))
    spacing = DefaultSpacing(**to_plain(cfg.spacing)) if isinstance(cfg.spacing, DictConfig) else cfg.spacing
    return Sampler(fn, cfg.steps, spacing, build_guidance(guidance))


def build_guidance(cfg: DictConfig | None) -> "Guidance":
    """Return the guidance of a node; `open_guidance_model` adds its model. Raises ValueError for invalid numbers."""
    from src.diffusion.guidance import Guidance

    if cfg is None:
        return Guidance()
    for name in ("scale", "rescale"):
        if not isinstance(cfg[name], int | float):
            raise ValueError(f"guidance.{name}={cfg[name]} must be a number")
    ends = [0.0, math.inf] if cfg.interval is None else list(cfg.interval)
    if len(ends) != 2 or not all(isinstance(end, int | float) for end in ends):
        raise ValueError(f"guidance.interval={ends} must be two noise levels sigma / alpha, such as [0.2,5]")
    guidance = Guidance(float(cfg.scale), (float(ends[0]), float(ends[1])), float(cfg.rescale))
    guidance.check()
    return guidance


def sampler_settings(typed: DictConfig, trained: DictConfig) -> DictConfig:
    """Return the sampler on the command line, `typed`, or the run's own, `trained`, with the typed settings.

    `typed` has no `_target_` unless the command line chooses a sampler.
    """
    if typed.get("_target_") is not None:
        return typed
    merged = OmegaConf.merge(trained, {k: v for k, v in typed.items() if v is not None})
    assert isinstance(merged, DictConfig)
    return merged


def check_network(
    net: "torch.nn.Module", shape: tuple[int, ...], outputs: int, conditioning: "ConditionSpec | None" = None
) -> None:
    """Raise ValueError unless the network maps (B, C, ...) to (B, C * outputs, ...).

    Runs a copy of the network once, on meta tensors.
    """
    import torch

    inputs = [torch.zeros(1, *shape), torch.zeros(1), *([] if conditioning is None else [conditioning.null])]
    try:
        with torch.no_grad():
            got = tuple(copy.deepcopy(net).to("meta")(*(x.to("meta") for x in inputs)).shape[1:])
    except RuntimeError as error:
        raise ValueError(f"the network rejects data of shape {shape} ({sentence(error)}); change model.*") from error
    if got != (outputs * shape[0], *shape[1:]):
        raise ValueError(
            f"the network maps data of shape {shape} to {got}, which must have {outputs * shape[0]} channels and the "
            "same size; change model.*"
        )


def warn_about_schedule(module: "DiffusionModule") -> None:
    """Warn if the last step of the schedule, where sampling starts, is not pure noise or has no weight in the loss."""
    from src.diffusion.noise import terminal_alpha_bar

    left = terminal_alpha_bar(module.schedule)
    if left > 0.01:
        warnings.warn(
            f"the schedule does not reach noise: alpha_bar ends at {left:.3g} (above 0.01), so sampling starts at a "
            "noise level that training does not cover; use more steps, a larger schedule.beta_end, or "
            "zero_terminal_snr=true",
            stacklevel=2,
        )
    terms = module.check_loss()
    if terms["loss"].item() < 1e-12 * terms["mse"].item():
        warnings.warn(
            "the loss weighting is 0 at the last step of the schedule, where sampling starts, so training ignores that "
            "step; use weighting=uniform (min-SNR is 0 at zero SNR)",
            stacklevel=2,
        )


def check_settings_of_network(cfg: DictConfig) -> None:
    """Raise ValueError for settings of a network that it refuses, before all images are encoded."""
    import torch

    with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # `build_module` warns
        instantiate_node(cfg.model, {"outputs": 1})


def meta_network(cfg: DictConfig, outputs: int) -> "torch.nn.Module":
    """Return the network on the meta device, in the memory format of training."""
    import torch

    with torch.device("meta"):
        net: torch.nn.Module = instantiate_node(cfg.model, {"outputs": outputs, **_network_condition(cfg)})
    if any(p.ndim == 5 for p in net.parameters()):  # a network for volumes
        return net
    return net.to(memory_format=torch.channels_last)  # This leaves networks for points and signals as they are.
