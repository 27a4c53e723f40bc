"""The parts of a run, each from its piece of the configuration. What is heavy is imported only when built."""

import functools
import inspect
import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from src.arguments import GRID_SETTINGS
from src.errors import sentence
from src.overrides import config_groups, nearest
from src.trust import CONF, check_texts

if TYPE_CHECKING:
    import lightning as L
    import torch
    from lightning.pytorch.loggers import Logger

    from src.data.batch import StreamDataModule
    from src.data.conditions import Condition
    from src.diffusion.guidance import Guidance
    from src.diffusion.noise import ContinuousSchedule, NoiseSchedule, Schedule
    from src.module import Conditioning, DiffusionModule, Objective, Sampler


def build_module(
    cfg: DictConfig, shape: tuple[int, ...], levels: int | None, condition: "Condition | None" = None
) -> "DiffusionModule":
    """The LightningModule for samples of `shape` with so many `levels`, with freshly initialised weights.

    `condition` is what `build_condition` made of the configuration. Without an optimizer in it the module can sample
    but not train.
    """
    import torch

    from src.models.mlp import MLP
    from src.module import DiffusionModule

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
    process = make(cfg.process, {"decoder_scale": schedule.decoder_scale, "levels": levels})
    net = make(cfg.model, {"outputs": process.outputs, **condition_network(cfg)})
    conditioning = None if condition is None else conditioning_of(condition, cfg.conditioning.drop)
    module = DiffusionModule(
        net=net,
        schedule=schedule,
        process=process,
        objective=build_objective(cfg.objective, schedule),
        timesteps=make(cfg.timesteps),
        sampler=build_sampler(cfg.sampler, cfg.get("guidance")),
        shape=shape,
        seed=cfg.seed,
        optimizer=make(cfg.optimizer) if trains else None,
        lr_scheduler=make(cfg.lr_scheduler) if trains else None,
        conditioning=conditioning,
    )
    check_network(net, shape, process.outputs, conditioning)
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


def conditioning_of(condition: "Condition", drop: float) -> "Conditioning":
    from src.module import Conditioning

    return Conditioning(condition([None]), condition(condition.examples or [None]), drop)


def settle_data(cfg: DictConfig, data: "StreamDataModule") -> None:
    """What only the data tell of themselves as settings, and of the network how many numbers make a point."""
    check_texts(dict(data.found), "the data")
    cfg.data.update(data.found)
    if len(data.shape) == 1 and "features" in cfg.model:
        cfg.model.features = data.shape[0]


def settle_condition(cfg: DictConfig, data: "StreamDataModule") -> None:
    """What only the data tell of conditions, such as the names of classes, as settings; of a resumed run they did.

    Raises ValueError if the data have no such conditions.
    """
    if cfg.get("conditioning") is None or cfg.resume is not None:
        return
    data.prepare_together()
    assert data.source is not None
    node = cfg.conditioning.encode
    found = dict(get_class(node._target_).found_in(data.source, plain(node)))  # type: ignore[attr-defined]
    check_texts(found, "the data")
    node.update(found)


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


def build_objective(cfg: DictConfig, schedule: "Schedule") -> "Objective":
    """An objective from its YAML; a weighting that has an argument `schedule` is given it."""
    objective = make(cfg)
    weighting = getattr(objective, "keywords", {}).get("weighting")
    if weighting is not None and "schedule" in inspect.signature(weighting).parameters:
        objective = functools.partial(objective, weighting=functools.partial(weighting, schedule=schedule))
    built: Objective = objective
    return built


def build_sampler(cfg: DictConfig, guidance: DictConfig | None = None) -> "Sampler":
    """A sampler from its YAML: the function's own arguments, the grid that it walks, and what guides it."""
    from src.diffusion.noise import DefaultSpacing
    from src.module import Sampler

    walk = make(OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k not in GRID_SETTINGS]))
    spacing = DefaultSpacing(**plain(cfg.spacing)) if isinstance(cfg.spacing, DictConfig) else cfg.spacing
    return Sampler(walk, cfg.steps, spacing, build_guidance(guidance))


def build_guidance(cfg: DictConfig | None) -> "Guidance":
    """Guidance from its settings, without the weaker model, which `runs.weaker_model` opens."""
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


def build_trainer(cfg: DictConfig, directory: Path) -> "L.Trainer":
    """Lightning's Trainer with the configured callbacks and loggers.

    Of its arguments null stands for Lightning's default. Raises ValueError for those that are to be set in another way.
    """
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.pytorch.plugins import CheckpointIO, Precision

    from src.disk import NoCheckpoints, WholeCheckpoints
    from src.memory import MicroBatch
    from src.trainer_settings import check_built, check_settings, explained, kept, validation_interval
    from src.watching import LearningRate

    settings = {str(name): value for name, value in plain(cfg.trainer).items() if value is not None}
    check_settings(settings, cfg.resume is not None, bool(cfg.logger))
    for name in ("validate_every", "checkpoint_every"):
        if cfg[name] < 1:
            raise ValueError(f"{name} must be at least 1 step, got {cfg[name]}")
    interval = validation_interval(settings, cfg.validate_every)
    tries = bool(settings.get("fast_dev_run"))
    logs = settings.get("logger", True) and not tries
    loggers = [build_logger(name, node, directory) for name, node in (cfg.logger or {}).items() if node and logs]
    # A model brings settings along for callbacks that perhaps were not chosen: these have no _target_.
    callbacks = [make(node) for node in (cfg.callbacks or {}).values() if node and "_target_" in node]
    if cfg.data.get("micro_batch") == "auto" and cfg.resume is None:
        callbacks.append(MicroBatch())
    if loggers:
        callbacks.append(LearningRate())
    limit = settings.get("overfit_batches") or settings.get("limit_val_batches", 1.0)
    if limit == 0 and not tries:
        warnings.warn(
            "trainer.limit_val_batches=0 turns validation off: there will be no val/loss, no best checkpoint and no "
            "samples while training",
            stacklevel=2,
        )
    plugins = [make(node) for node in cfg.trainer.get("plugins") or []]
    if tries or settings.get("enable_checkpointing") is False:
        plugins = [*[plugin for plugin in plugins if not isinstance(plugin, CheckpointIO)], NoCheckpoints()]
    elif not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(WholeCheckpoints())
    if "precision" in settings and any(isinstance(plugin, Precision) for plugin in plugins):
        raise ValueError("one of trainer.plugins says the precision too; set trainer.precision=null")
    try:
        given = {
            "callbacks": kept(callbacks, {**settings, "limit_val_batches": limit}),
            "logger": loggers or False,
            "plugins": plugins,
            "default_root_dir": str(directory),
            "val_check_interval": interval,
            "check_val_every_n_epoch": None,
            "limit_val_batches": limit,
            "min_epochs": 0,  # else Lightning takes min_steps for a whole epoch, which is all steps
            "overfit_batches": 0,  # which stream of batches it is, is the data's affair
            "deterministic": settings.get("deterministic", False),  # else it stays as a job before this one had it
            "use_distributed_sampler": False,  # the stream is distributed, and such a one Lightning leaves alone
        }
        trainer: L.Trainer = make(OmegaConf.masked_copy(cfg.trainer, [*settings]), given)
    except Exception as error:
        cause = error.__cause__
        raise ValueError(explained(cause if isinstance(cause, Exception) else error, settings)) from error
    check_built(trainer)
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        # Else SIGUSR1 before and after training saves a checkpoint that is none of the run's, and requeues the job.
        environment.auto_requeue = False
    return trainer


def build_logger(name: str, node: DictConfig, directory: Path) -> "Logger":
    """A logger from its YAML, which has written nothing yet; W&B's keeps the id of a resumed run."""
    from src.loggers import wandb_id

    if name == "wandb" and node.id is None:
        node.id = wandb_id(directory)
    try:
        logger: Logger = instantiate(node)
        if name == "wandb":
            import wandb  # noqa: F401 - whether it is there
    except Exception as error:
        if isinstance(error.__cause__ or error, ImportError):
            raise ValueError(
                f"logger={name} needs a package that is not installed ({sentence(error.__cause__ or error)}): "
                f"pip install {name}"
            ) from error
        raise
    return logger


def start_wandb(cfg: DictConfig, trainer: "L.Trainer", directory: Path) -> None:
    """Start W&B's run, if it is among the loggers, and keep its id. It goes offline, and says so, if it cannot online.

    Raises ValueError if it cannot start at all.
    """
    from lightning.pytorch.loggers import WandbLogger

    from src.loggers import write_wandb_id

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


def settle_micro_batch(cfg: DictConfig, trainer: "L.Trainer", saved: dict[str, Any] | None) -> None:
    """`data.micro_batch` as `trainer.accumulate_grad_batches`; auto takes that of the checkpoint `saved`, if resumed.

    Without a checkpoint auto is left to the callback `MicroBatch`. Raises ValueError for contradictions.
    """
    from src.memory import accumulate, divisors
    from src.sharding import FullySharded

    micro, given = cfg.data.get("micro_batch"), cfg.trainer.accumulate_grad_batches
    share, rest = divmod(cfg.data.batch_size, trainer.world_size)
    if micro is None or rest:  # TrainingStream refuses the rest
        return
    if micro == "auto":
        if isinstance(trainer.strategy, FullySharded):
            raise ValueError(
                "data.micro_batch=auto tries a step on each device alone, which sharded weights do not allow: give a "
                "number, such as data.micro_batch=1, and double it while it fits"
            )
        if given != 1:
            raise ValueError(
                f"data.micro_batch=auto finds trainer.accumulate_grad_batches, given as {given}: leave one of them out"
            )
        if saved is None:
            return
        batches = saved["hyper_parameters"]["trainer"]["accumulate_grad_batches"]
    else:
        if share % micro:
            fitting = divisors(share)
            near = [max(n for n in fitting if n < micro), *[n for n in fitting if n > micro][-1:]]
            raise ValueError(
                f"data.micro_batch={micro} does not divide the {share} samples of a step on each of "
                f"{trainer.world_size} processes (data.batch_size={cfg.data.batch_size}): choose "
                f"{' or '.join(map(str, near))}"
            )
        batches = share // micro
        if given not in (1, batches):
            raise ValueError(
                f"data.micro_batch={micro} makes trainer.accumulate_grad_batches {batches}, given as {given}: "
                "leave one of them out"
            )
    accumulate(trainer, batches)
    cfg.trainer.accumulate_grad_batches = batches


def inline_betas(cfg: DictConfig, before: Mapping[str, Any] | None) -> None:
    """Replace the file name that `schedule=custom` may give by the numbers in it, or those of the run `before`."""
    betas = OmegaConf.select(cfg, "schedule.betas")
    if isinstance(betas, str) and before is not None:
        cfg.schedule.betas = betas = [float(beta) for beta in before["schedule"].get("betas") or []]
    if not isinstance(betas, str):
        return
    import numpy as np

    path = Path(betas)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path.resolve()}: schedule.betas takes a list, or a .npy or .csv file")
    try:
        if path.suffix == ".npy":
            table: Any = np.lib.format.open_memmap(path, mode="r")  # unpickles nothing, and is no larger than the file
        else:
            with path.open() as lines:  # given the name, numpy would unpack an archive
                table = np.loadtxt(lines, delimiter=",")
        cfg.schedule.betas = np.asarray(table, dtype=np.float64).ravel().tolist()
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a table of numbers ({sentence(error)}): one beta per step, .npy or .csv"
        ) from error


def check_network(
    net: "torch.nn.Module", shape: tuple[int, ...], outputs: int, conditioning: "Conditioning | None" = None
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
    terms = module.check_objective()
    if terms["loss"].item() < 1e-12 * terms["mse"].item():
        warnings.warn(
            "the weighting gives the schedule's last step, where sampling starts, no weight at all: use "
            "weighting=uniform (min-SNR is 0 at zero SNR)",
            stacklevel=2,
        )


def hollow_network(cfg: DictConfig, outputs: int) -> "torch.nn.Module":
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


def quiet_libraries() -> None:
    """Silence what Lightning says of itself, advertisements among it, and have it say the rest once under Hydra."""
    import lightning  # noqa: F401 - sets the levels that are changed below

    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("callbacks.model_summary", "profilers.profiler"):  # which say only what they were asked for
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.INFO)
    if logging.getLogger().handlers:  # Hydra's, which say it too
        for name in ("lightning", "lightning.pytorch"):
            logging.getLogger(name).handlers.clear()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    # The stream of batches starts at the step where the checkpoint left it.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*functional.all_gather is deprecated.*")
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated.*")
    warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
