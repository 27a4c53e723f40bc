"""Build a run from its configuration, and open it again from its folder: with `checkpoints`, all that reads those.

A run folder, or one checkpoint alone, is all that a later command needs. What is heavy is imported only when built.
"""

import functools
import json
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from src.arguments import GRID_SETTINGS, check_arguments
from src.checkpoints import (
    BUILT,
    changed_settings,
    check_accumulation,
    check_fit,
    find_checkpoint,
    read_checkpoint,
    weights_of,
)
from src.errors import sentence
from src.overrides import config_groups, nearest
from src.trust import CONF, check_targets, check_texts, known_targets

if TYPE_CHECKING:
    import lightning as L
    import torch

    from src.data.batch import StreamDataModule
    from src.diffusion.noise import ContinuousSchedule, NoiseSchedule
    from src.memory import Estimate
    from src.module import DiffusionModule, Sampler


class Run(NamedTuple):
    """A run that is ready to train."""

    directory: Path
    module: "DiffusionModule"
    data: "StreamDataModule"
    trainer: "L.Trainer"
    resume_from: Path | None

    @property
    def last_checkpoint(self) -> Path:
        return self.directory / "checkpoints" / "last.ckpt"

    def save(self) -> None:
        """Save the last checkpoint, however long it takes until there is room for it."""
        from src.disk import WholeCheckpoints

        while True:
            self.trainer.save_checkpoint(self.last_checkpoint)
            written = self.trainer.strategy.checkpoint_io
            failed = isinstance(written, WholeCheckpoints) and written.failed
            if not self.trainer.strategy.broadcast(failed):
                return
            if self.trainer.is_global_zero:
                warnings.warn(
                    f"training is over and waits for room at {self.directory}: make some, or stop it; what the last "
                    "whole checkpoint has stays",
                    stacklevel=2,
                )
            time.sleep(10)

    @property
    def stop_signal(self) -> int:
        """The signal that ended training; 0 if no callback was there to say."""
        from src.stopping import CleanStop

        asked = [c.signal for c in self.trainer.callbacks if isinstance(c, CleanStop)]  # type: ignore[attr-defined]
        return max(asked, default=0)

    @property
    def diagnosis(self) -> str:
        """Why training was given up; empty if it was not."""
        from src.callbacks import NonFiniteGuard

        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return "".join(c.diagnosis for c in callbacks if isinstance(c, NonFiniteGuard))


class OpenedRun(NamedTuple):
    """A trained run: its module with the weights in place, and its data, not loaded yet."""

    config: DictConfig
    checkpoint: Path
    module: "DiffusionModule"
    data: "StreamDataModule"


def build(cfg: DictConfig) -> Run:
    """Everything that a training run consists of. Raises ValueError for settings that cannot work together."""
    if cfg.resume is not None and not cfg.trust:
        check_targets(plain(cfg, resolve=False), known_targets(training=True), f"resume={cfg.resume}")
    inline_betas(cfg)
    if cfg.data.get("num_samples") and str(cfg.trainer.precision) in ("bf16-true", "16-true"):
        raise ValueError(
            f"trainer.precision={cfg.trainer.precision} would round the points themselves: use 32-true or bf16-mixed"
        )
    check_arguments(cfg)
    if cfg.optimizer.get("lr", 1) <= 0:
        raise ValueError(f"optimizer.lr must be positive, got {cfg.optimizer.lr}: 1e-3 is usual")
    if not 0 <= cfg.seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2^32), got {cfg.seed}: 0 is usual")
    quiet_libraries()
    import lightning as L

    directory = Path(cfg.run_dir)
    L.seed_everything(cfg.seed, verbose=False)
    data = make(cfg.data)
    module = build_module(cfg, data.shape, data.levels)
    warn_of_schedule(module)
    if cfg.compile:
        if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
            raise ValueError("compile=true needs a C++ compiler and there is none: install g++, or leave it out")
        module.net.compile()
    resume_from = None if cfg.resume is None else find_checkpoint(cfg.resume, None)
    saved = read_checkpoint(resume_from) if resume_from else None
    if saved is not None:  # what cannot be resumed is refused before loggers write
        assert resume_from is not None
        check_fit(saved["state_dict"], module, resume_from)
        changed_settings(saved["hyper_parameters"], plain(cfg))
    elif any((directory / "checkpoints").glob("*.ckpt")):
        raise ValueError(f"{directory} already holds a run: go on with resume={directory}, or choose another run_dir")
    trainer = build_trainer(cfg, directory)
    from src.memory import MicroBatch, keep_freed_memory

    if not any(isinstance(callback, MicroBatch) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        keep_freed_memory(trainer.strategy.root_device)
    from src.sharding import FullySharded

    if isinstance(trainer.strategy, FullySharded) and module.curve_weights:
        raise ValueError("trainer=fsdp deals out the network alone, and a learned schedule learns too: use trainer=ddp")
    settle_micro_batch(cfg, trainer, saved)
    module.hparams.update({str(k): v for k, v in plain(cfg).items()})
    if saved is not None:
        check_accumulation(saved, cfg)
        for line in changed_settings(saved["hyper_parameters"], module.hparams):
            warnings.warn(f"resumed with another setting: {line}", stacklevel=2)
    if trainer.is_global_zero:
        hold(directory)
    for logger in trainer.loggers:
        logger.log_hyperparams(dict(module.hparams))
    return Run(directory, module, data, trainer, resume_from)


_held: dict[Path, IO[str]] = {}


def hold(directory: Path) -> None:
    """Keep a run's folder for this process until it ends. Raises ValueError if another trains there."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    directory.mkdir(parents=True, exist_ok=True)
    if before := _held.pop(directory.resolve(), None):
        before.close()
    file = (directory / ".lock").open("w")
    for _ in range(30):  # seconds: one that was stopped may still be on its way out
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which processes that load data do not inherit
        except BlockingIOError:
            time.sleep(1)
        except OSError:  # a file system without locks
            return
        else:
            _held[directory.resolve()] = file
            return
    file.close()
    raise ValueError(f"another process trains in {directory}: wait for it or stop it, or choose another run_dir")


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


def build_module(cfg: DictConfig, shape: tuple[int, ...], levels: int | None) -> "DiffusionModule":
    """The LightningModule for samples of `shape` with so many `levels`, with freshly initialised weights.

    Without an optimizer in the configuration it can sample but not train.
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
    net = make(cfg.model, {"outputs": process.outputs})
    module = DiffusionModule(
        net=net,
        schedule=schedule,
        process=process,
        objective=make(cfg.objective),
        timesteps=make(cfg.timesteps),
        sampler=build_sampler(cfg.sampler),
        shape=shape,
        seed=cfg.seed,
        optimizer=make(cfg.optimizer) if trains else None,
        lr_scheduler=make(cfg.lr_scheduler) if trains else None,
    )
    check_network(net, shape, process.outputs)
    if trains:  # made once for nothing, so that values which they refuse are refused now
        module.prepare_optimizer(1)
    if len(shape) == 3:
        net.to(memory_format=torch.channels_last)
    return module


def build_schedule(cfg: DictConfig, snr_shift: float, zero_terminal_snr: bool) -> "NoiseSchedule | ContinuousSchedule":
    """A schedule from its YAML, betas with the transforms that were asked for. Raises ValueError if they do not fit."""
    from torch import Tensor

    from src.diffusion import schedules
    from src.diffusion.noise import ContinuousSchedule, NoiseSchedule

    made = make(cfg)
    if not isinstance(made, Tensor):
        assert isinstance(made, ContinuousSchedule)
        asked = {f"snr_shift={snr_shift}": snr_shift != 1, "zero_terminal_snr=true": zero_terminal_snr}
        if any(asked.values()):
            raise ValueError(
                f"{' '.join(k for k, v in asked.items() if v)} is for tables of betas: with a continuous schedule, "
                "change the ends of its curve (schedule.curve)"
            )
        return made
    if snr_shift != 1:
        made = schedules.snr_shift(made, snr_shift)
    if zero_terminal_snr:
        made = schedules.zero_terminal_snr(made)
    return NoiseSchedule(made)


def check_network(net: "torch.nn.Module", shape: tuple[int, ...], outputs: int) -> None:
    """Raise ValueError if the network does not give what it should: run once, on tensors without contents."""
    import copy

    import torch

    hollow = copy.deepcopy(net).to("meta")
    try:
        with torch.no_grad():
            got = tuple(hollow(torch.zeros(1, *shape, device="meta"), torch.zeros(1, device="meta")).shape[1:])
    except RuntimeError as error:
        raise ValueError(f"the network does not take data of shape {shape} ({sentence(error)}): see model.*") from error
    if got != (outputs * shape[0], *shape[1:]):
        raise ValueError(f"the network makes {got} of data of shape {shape}: model.* must keep the shape")


def build_sampler(cfg: DictConfig) -> "Sampler":
    """A sampler from its YAML: the function's own arguments, and the grid that it walks."""
    from src.module import Sampler

    walk = make(OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k not in GRID_SETTINGS]))
    return Sampler(walk, cfg.steps, cfg.spacing)


def sampler_settings(asked: DictConfig, of_run: DictConfig) -> DictConfig:
    """The sampler that was asked for; without a choice, the run's own with what was given beside it."""
    if asked.get("_target_") is not None:
        return asked
    merged = OmegaConf.merge(of_run, {k: v for k, v in asked.items() if v is not None})
    assert isinstance(merged, DictConfig)
    return merged


def names_of(given: Any) -> list[str] | None:
    """One name or a list of them as a list; None for none."""
    return [given] if isinstance(given, str) else list(given) if given else None


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


def build_trainer(cfg: DictConfig, directory: Path) -> "L.Trainer":
    """Lightning's Trainer with the configured callbacks and loggers."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import LearningRateMonitor

    from src.disk import WholeCheckpoints
    from src.loggers import build_logger
    from src.memory import MicroBatch

    if not 1 <= cfg.trainer.max_steps <= 10**9:
        raise ValueError(
            f"trainer.max_steps must lie in [1, 10^9], got {cfg.trainer.max_steps}: training is counted in steps"
        )
    if cfg.trainer.max_epochs not in (-1, None):
        raise ValueError(
            f"trainer.max_epochs={cfg.trainer.max_epochs}: training is counted in steps; set trainer.max_steps"
        )
    devices = cfg.trainer.devices
    if isinstance(devices, int) and devices < 1 and devices != -1:
        raise ValueError(f"trainer.devices must be at least 1, or auto for all that there are, got {devices}")
    loggers = [build_logger(name, node, directory) for name, node in (cfg.logger or {}).items()]
    accumulate = cfg.trainer.accumulate_grad_batches
    clip, algorithm = cfg.trainer.gradient_clip_val, cfg.trainer.get("gradient_clip_algorithm") or "norm"
    if (clip is not None and clip <= 0) or algorithm != "norm":
        raise ValueError(
            f"gradients are clipped by their norm to trainer.gradient_clip_val > 0, got {clip} by {algorithm}: "
            "1.0 is usual, null clips nothing"
        )
    callbacks = [make(node) for node in (cfg.callbacks or {}).values()]
    if cfg.data.get("micro_batch") == "auto" and cfg.resume is None:
        callbacks.append(MicroBatch())
    if loggers:
        callbacks.append(LearningRateMonitor(logging_interval="step"))
    for name in ("validate_every", "checkpoint_every", "trainer.log_every_n_steps"):
        if (steps := OmegaConf.select(cfg, name)) < 1:
            raise ValueError(f"{name} must be at least 1 step, got {steps}")
    every = min(cfg.validate_every, cfg.trainer.max_steps)
    try:
        trainer: L.Trainer = instantiate(
            cfg.trainer,
            callbacks=callbacks,
            logger=loggers or False,
            plugins=[WholeCheckpoints()],
            default_root_dir=str(directory),
            val_check_interval=every * accumulate,  # Lightning counts batches
        )
    except Exception as error:
        cause = error.__cause__ or error
        if not isinstance(cause, MisconfigurationException | RuntimeError):
            raise
        raise ValueError(
            f"{sentence(cause)} (trainer.accelerator={cfg.trainer.accelerator} trainer.devices={cfg.trainer.devices} "
            f"trainer.precision={cfg.trainer.precision} on this machine)"
        ) from error
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        # Else SIGUSR1 before and after training saves a checkpoint that is none of the run's, and requeues the job.
        environment.auto_requeue = False
    return trainer


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


def step_memory(cfg: DictConfig, run: Run) -> "Estimate":
    """What a training step needs on each device, told without running one."""
    from lightning.pytorch.strategies import DDPStrategy

    from src.memory import estimate
    from src.sharding import FullySharded

    trainer = run.trainer
    return estimate(
        hollow_network(cfg, run.module.process.outputs),
        run.module.shape,
        run.data.at_once(trainer),
        trainer.strategy.root_device,
        str(trainer.precision),
        run.module.make_optimizer,
        "ema" in (cfg.callbacks or {}),
        trainer.world_size if isinstance(trainer.strategy, FullySharded) else 1,
        isinstance(trainer.strategy, DDPStrategy),
    )


def out_of_memory(cfg: DictConfig, run: Run) -> str:
    """One line for a training that ran out of memory: what it needs, what there is, and what to set."""
    from src.sharding import FullySharded

    trainer, micro = run.trainer, run.data.at_once(run.trainer)
    try:
        needs = f"about {step_memory(cfg, run)}"
    except (RuntimeError, MemoryError):  # a process under a limit may not even start the backward pass's threads
        needs = "more than is left to estimate it with"
    saved = run.last_checkpoint.exists()
    remedies = {
        "data.micro_batch=auto": micro > 1 and not saved and not isinstance(trainer.strategy, FullySharded),
        "model.checkpointing=true": cfg.model.get("checkpointing") is False,
        "trainer.precision=bf16-mixed": str(trainer.precision) in ("32-true", "64-true"),
    }
    settings = [setting for setting, helps in remedies.items() if helps]
    advice = ", then ".join(settings) if settings else "a smaller model, or one dealt out by trainer=fsdp"
    again = f"; saved: go on with python -m src.train resume={run.directory} {' '.join(settings)}" if saved else ""
    return (
        f"out of memory at data.micro_batch {micro} (samples per device and forward pass) on "
        f"{having(trainer.strategy.root_device)}; a training step needs {needs}: set {advice}{again}"
    )


def out_of_memory_at(opened: OpenedRun, batch_size: int, device: "torch.device") -> str:
    """One line for sampling or evaluation that ran out of memory."""
    from src.memory import estimate

    net = hollow_network(opened.config, opened.module.process.outputs)
    needs = estimate(net, opened.module.shape, batch_size, device, "32-true", None)
    advice = f"set batch_size={batch_size // 2} or less" if batch_size > 1 else "use another device"
    return (
        f"out of memory at batch_size {batch_size} on {having(device)}; a pass through the network needs about "
        f"{needs}: {advice}"
    )


def hollow_network(cfg: DictConfig, outputs: int) -> "torch.nn.Module":
    """The network without weights, laid out as it is trained."""
    import torch

    with torch.device("meta"):
        net: torch.nn.Module = make(cfg.model, {"outputs": outputs})
    return net.to(memory_format=torch.channels_last)  # of images; points' weights have no such layout


def having(device: "torch.device") -> str:
    """A device and the memory that it has."""
    from src.memory import device_memory, gib

    size = device_memory(device)
    return f"{device}, which has {gib(size)} GiB" if size else str(device)


def open_run(
    run: str | None, ckpt: str | None = None, ema: bool = True, trust: bool = False, data_root: str | None = None
) -> OpenedRun:
    """A trained run from its folder or from one file, with the averaged weights (or the raw ones).

    The data lie in `data_root`, or where they lay. Of what the file names, only what conf/ has is built, unless with
    `trust`. Raises FileNotFoundError or ValueError if there is no such run or it cannot be read.
    """
    path = find_checkpoint(run, ckpt)
    quiet_libraries()
    checkpoint = read_checkpoint(path)
    settings = checkpoint["hyper_parameters"]
    if not trust:
        check_texts(settings, path)
        check_targets({name: settings[name] for name in BUILT}, known_targets(), path)
    config = OmegaConf.create(settings)
    assert isinstance(config, DictConfig)
    if data_root is not None:
        if "root" not in config.data:
            raise ValueError(f"data.root={data_root} is for images, and {path} was trained on points: leave it out")
        config.data.root = data_root
    built = OmegaConf.masked_copy(config, [*BUILT, "seed", "snr_shift", "zero_terminal_snr"])
    check_arguments(built)
    try:
        data = make(config.data)
        module = build_module(built, data.shape, data.levels)
        weights = weights_of(checkpoint, ema, path)
        check_fit(weights, module, path)
        module.load_state_dict(weights)
    except (AssertionError, AttributeError, LookupError, RuntimeError) as error:  # kinds of things in others' places
        raise ValueError(f"{path} describes no model of this project ({sentence(error)}): use another one") from error
    return OpenedRun(config, path, module.eval(), data)


def pick_device(name: str) -> "torch.device":
    """The device of that name, or for "auto" the best there is. Raises ValueError if it does not exist."""
    import torch

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={name} does not exist here ({sentence(error)}): use device=auto or cpu") from error
    return device


def plain(cfg: DictConfig, resolve: bool = True) -> dict[Any, Any]:
    """The configuration as nested plain values, every interpolation resolved or as it stands."""
    container = OmegaConf.to_container(cfg, resolve=resolve)
    assert isinstance(container, dict)
    return container


def inline_betas(cfg: DictConfig) -> None:
    """Replace the file name that `schedule=custom` may give by the numbers in it, or those that a resumed run had."""
    betas = OmegaConf.select(cfg, "schedule.betas")
    if isinstance(betas, str) and cfg.resume is not None:
        saved = read_checkpoint(find_checkpoint(cfg.resume, None))["hyper_parameters"]
        cfg.schedule.betas = betas = [float(beta) for beta in saved["schedule"].get("betas") or []]
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


def quiet_libraries() -> None:
    """Silence what Lightning says of itself: each line twice under Hydra, and advertisements among them."""
    import lightning  # noqa: F401 - sets the levels that are changed below

    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    # The stream of batches starts at the step where the checkpoint left it.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*functional.all_gather is deprecated.*")
    warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")


def close(run: Run) -> None:
    """End what would otherwise live on into the next run of the same process."""
    from src.loggers import finish

    if held := _held.pop(run.directory.resolve(), None):
        held.close()
    finish(run.trainer)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """`values` as indented JSON, replacing the file at once."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_of_json(values), indent=2) + "\n")
    os.replace(temporary, path)


def _of_json(value: Any) -> Any:
    """A value without NaN and infinities, which JSON does not know."""
    if isinstance(value, Mapping):
        return {k: _of_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_of_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
