"""Build a run from its configuration, and open it again from its folder: with `checkpoints`, all that reads those.

A run folder, or one checkpoint alone, is all that a later command needs. What is heavy is imported only when built.
"""

import json
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from src.arguments import check_arguments, check_seeds
from src.building import (
    build_condition,
    build_module,
    build_sampler,
    build_trainer,
    inline_betas,
    make,
    plain,
    quiet_libraries,
    settle_condition,
    settle_data,
    settle_micro_batch,
    start_wandb,
    warn_of_schedule,
)
from src.checkpoints import (
    ASKED,
    BUILT,
    changed_settings,
    check_accumulation,
    check_fit,
    check_optimizer,
    check_steps,
    find_checkpoint,
    read_checkpoint,
    weights_of,
)
from src.errors import sentence
from src.output import begin
from src.overrides import typed
from src.resuming import restore_found
from src.trust import check_targets, check_texts, known_targets

if TYPE_CHECKING:
    import lightning as L
    import torch

    from src.data.batch import StreamDataModule
    from src.diffusion.guidance import Conditional
    from src.diffusion.noise import Level
    from src.module import DiffusionModule, Sampler


class Run(NamedTuple):
    """A run that is ready to train."""

    directory: Path
    module: "DiffusionModule"
    data: "StreamDataModule"
    trainer: "L.Trainer"
    resume_from: Path | None
    steps: int = 0
    """How many it has taken."""
    changes: Sequence[str] = ()
    """The settings of a resumed run that are not those of its checkpoint, as "name: old -> new"."""

    @property
    def averages(self) -> bool:
        """Whether its checkpoints hold averaged weights."""
        from src.callbacks import EMA

        return any(isinstance(c, EMA) for c in self.trainer.callbacks)  # type: ignore[attr-defined]

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
    def finished(self) -> dict[str, Any] | None:
        """The metrics of a run that has taken all its steps and ended well; else None."""
        path = self.directory / "metrics.json"
        if self.steps < self.trainer.max_steps or not path.is_file():
            return None
        metrics: dict[str, Any] = json.loads(path.read_text())
        ended = metrics.get("steps") == self.steps and metrics.get("val/loss", 0.0) is not None
        return metrics if ended else None

    @property
    def saves(self) -> bool:
        """Whether checkpoints are written."""
        from src.disk import NoCheckpoints

        return not isinstance(self.trainer.strategy.checkpoint_io, NoCheckpoints)

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
    """Everything that a training run consists of, of which nothing is written yet.

    Raises ValueError for settings that cannot work together.
    """
    if cfg.resume is not None and not cfg.trust:
        check_targets(plain(cfg, resolve=False), known_targets(training=True), typed("resume", cfg.resume))
    resume_from = None if cfg.resume is None else find_checkpoint(cfg.resume, None)
    saved = read_checkpoint(resume_from) if resume_from else None
    before = saved and saved["hyper_parameters"]
    inline_betas(cfg, before)
    if before is not None:
        restore_found(cfg, before)
    if (cfg.data.get("num_samples") or cfg.data.get("path")) and str(cfg.trainer.precision) in ("bf16-true", "16-true"):
        raise ValueError(
            f"trainer.precision={cfg.trainer.precision} would round the points themselves: use 32-true or bf16-mixed"
        )
    check_arguments(cfg)
    if not 0 < cfg.optimizer.get("lr", 1) < math.inf:
        raise ValueError(f"optimizer.lr={cfg.optimizer.lr} must be positive and finite: 1e-3 is usual")
    check_seeds(cfg)
    for name, least in (("keep_checkpoints", -1), ("neighbours.samples", 0), ("neighbours.among", 0)):
        if (number := OmegaConf.select(cfg, name)) < least:
            raise ValueError(f"{name}={number} must be at least {least}")
    quiet_libraries()
    import lightning as L

    directory = Path(cfg.run_dir)
    L.seed_everything(cfg.seed, verbose=False)
    data = make(cfg.data)
    settle_data(cfg, data)
    settle_condition(cfg, data)
    data.record_path = resume_from and record_path(resume_from)
    data.condition = build_condition(cfg)
    module = build_module(cfg, data.shape, data.levels, data.condition)
    warn_of_schedule(module)
    from src.speed import check_graphs, compiled

    module.compiled_training = compiled(module.net, cfg.compile)
    if saved is not None:  # what cannot be resumed is refused before loggers write
        assert resume_from is not None
        check_fit(saved["state_dict"], module, resume_from)
        changed_settings(saved["hyper_parameters"], plain(cfg))
        check_steps(saved, cfg)
    elif any((directory / "checkpoints").glob("*.ckpt")):
        raise ValueError(
            f"{directory} already holds a run: go on with {typed('resume', directory)}, or choose another run_dir"
        )
    trainer = build_trainer(cfg, directory)
    from src.processes import check_processes, start_quietly

    environment = getattr(trainer.strategy, "cluster_environment", None)  # of several processes
    check_processes("trainer.", trainer.strategy.root_device, trainer.num_devices, trainer.num_nodes, environment)
    start_quietly(trainer.strategy)
    data.overfit_batches, data.limit_val_batches = cfg.trainer.get("overfit_batches") or 0, trainer.limit_val_batches
    from src.memory import MicroBatch, keep_freed_memory

    if not any(isinstance(callback, MicroBatch) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        keep_freed_memory(trainer.strategy.root_device)
    from src.sharding import FullySharded

    if isinstance(trainer.strategy, FullySharded) and module.curve_weights:
        raise ValueError("trainer=fsdp deals out the network alone, and a learned schedule learns too: use trainer=ddp")
    settle_micro_batch(cfg, trainer, saved)
    check_graphs(cfg.compile, "auto" if cfg.data.get("micro_batch") == "auto" else trainer.accumulate_grad_batches)
    module.hparams.update({str(k): v for k, v in plain(cfg).items()})
    if saved is not None:
        check_accumulation(saved, cfg)
        check_optimizer(saved, module)
    changes = changed_settings(saved["hyper_parameters"], module.hparams) if saved is not None else []
    return Run(directory, module, data, trainer, resume_from, saved["global_step"] if saved else 0, changes)


def start(cfg: DictConfig, run: Run) -> None:
    """Lock the folder of a run that nothing can be said against any more, start its loggers, and write its record.

    Before this nothing is written into the folder, and if this fails nothing stays. Raises ValueError if another
    process trains there, or W&B cannot start.
    """
    from src.loggers import folder_of, left_as_found

    lock = run.directory / ".lock"
    found = lock.exists()
    if run.trainer.is_global_zero:
        hold(run.directory)
    try:
        loggers = run.trainer.loggers if run.trainer.is_global_zero else []
        folders = [folder for logger in loggers if (folder := folder_of(logger, run.directory))]
        with left_as_found(folders):
            start_wandb(cfg, run.trainer, run.directory)
            for logger in run.trainer.loggers if run.trainer.enable_autolog_hparams else ():
                logger.log_hyperparams(dict(run.module.hparams))
            begin(run.directory)
        for line in run.changes:  # not before: a refused command resumes nothing
            warnings.warn(f"resumed with another setting: {line}", stacklevel=2)
    except BaseException:
        if run.trainer.is_global_zero and not found:
            lock.unlink(missing_ok=True)
        if held := _held.pop(run.directory.resolve(), None):
            held.close()
        raise


def record_path(checkpoint: Path) -> Path | None:
    """Where the record of the data is, of a checkpoint in a run's folder."""
    from src.data.split import RECORD

    return checkpoint.parent.parent / RECORD if checkpoint.parent.name == "checkpoints" else None


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
    path = directory / ".lock"
    for _ in range(30):  # seconds: one that was stopped may still be on its way out
        file = path.open("a")  # which changes nothing of a file that is there
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which processes that load data do not inherit
        except BlockingIOError:
            file.close()
            time.sleep(1)
        except OSError:  # a file system without locks
            return
        else:
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                _held[directory.resolve()] = file
                return
            file.close()  # its process was refused, and has removed it
    raise ValueError(f"another process trains in {directory}: wait for it or stop it, or choose another run_dir")


def open_run(
    run: str | None,
    ckpt: str | None = None,
    ema: bool = True,
    trust: bool = False,
    data_root: str | None = None,
    encoder: str | None = None,
) -> OpenedRun:
    """A trained run from its folder or from one file, with the averaged weights (or the raw ones).

    The data lie in `data_root`, and a pretrained encoder of texts in `encoder`, or where they lay. Of what the file
    names, only what conf/ has is built, unless with `trust`. From then on the process keeps the memory that it frees.
    Raises FileNotFoundError or ValueError if there is no such run or it cannot be read.
    """
    path = find_checkpoint(run, ckpt)
    quiet_libraries()
    checkpoint = read_checkpoint(path)
    settings = checkpoint["hyper_parameters"]
    if not trust:
        check_texts(settings, path)
        check_targets({name: settings.get(name) for name in (*BUILT, "conditioning")}, known_targets(), path)
    config = OmegaConf.create(settings)
    assert isinstance(config, DictConfig)
    if data_root is not None:
        setting = "path" if "path" in config.data else "root"  # a table is one file
        if setting not in config.data:
            raise ValueError(
                f"{typed('data.root', data_root)} is for images, and {path} was trained on points: leave it out"
            )
        config.data[setting] = data_root
    settle_encoder(config, encoder, path)
    built = OmegaConf.masked_copy(config, [*BUILT, *ASKED, "seed", "snr_shift", "zero_terminal_snr"])
    check_arguments(built)
    try:
        data = make(config.data)
        data.record_path = record_path(path)
        data.condition = build_condition(built)
        module = build_module(built, data.shape, data.levels, data.condition)
        weights = weights_of(checkpoint, ema, path)
        check_fit(weights, module, path)
        module.load_state_dict(weights)
    except (AssertionError, AttributeError, LookupError, RuntimeError) as error:  # kinds of things in others' places
        raise ValueError(f"{path} describes no model of this project ({sentence(error)}): use another one") from error
    import torch

    from src.memory import keep_freed_memory

    keep_freed_memory(torch.device("cpu"))  # for samples; what a GPU draws needs next to nothing there
    return OpenedRun(config, path, module.eval(), data)


def speed_up(opened: OpenedRun, precision: str, compile_mode: str | bool | None) -> None:
    """Have an opened run sample in a precision, and by a compiled network. Raises ValueError for unknown ones."""
    from src.speed import compiled, product_dtype

    opened.module.sampling_dtype = product_dtype(precision)
    opened.module.compiled_sampling = compiled(opened.module.net, compile_mode)


def settle_encoder(config: DictConfig, encoder: str | None, path: Path) -> None:
    """Where a pretrained encoder is looked for, and its answers are kept: never where the file says."""
    node = OmegaConf.select(config, "conditioning.encode")
    if node is None or "fingerprint" not in node:
        if encoder is not None:
            raise ValueError(
                f"{typed('encoder', encoder)} is for runs with conditioning=pretrained, as {path} is not: leave it out"
            )
        return
    node.cache, node.device = "outputs/cache", "auto"
    node.model = encoder or node.model
    if node.model is None:
        raise ValueError(f"{path} does not say where its text encoder lies: give its folder or hub name by encoder=...")


def sampler_of(opened: OpenedRun, settings: DictConfig, guidance: DictConfig) -> "Sampler":
    """A sampler by its settings and those of its guidance, for which null means what the run was trained with."""
    own = OmegaConf.create({"scale": 1.0, "interval": None, "rescale": 0.0})
    asked = {k: v for k, v in guidance.items() if v is not None and k != "weak"}
    merged = OmegaConf.merge(own, opened.config.get("guidance") or {}, asked)
    assert isinstance(merged, DictConfig)
    check_arguments(settings, "sampler")
    sampler = build_sampler(settings, merged)
    if guidance.weak is not None:
        sampler = sampler._replace(guidance=sampler.guidance._replace(weak=weaker_model(opened, guidance.weak)))
    opened.module.check_sampler(sampler)
    return sampler


def weaker_model(opened: OpenedRun, where: str) -> "Conditional":
    """The network to lead away from: that of another run's folder, or of another checkpoint.

    Raises ValueError if its output means something else than the run's, or it is asked in another way.
    """
    path = Path(where)
    encoder = OmegaConf.select(opened.config, "conditioning.encode.model")
    weak = open_run(None if path.is_file() else where, where if path.is_file() else None, encoder=encoder)
    remedy = "choose an earlier checkpoint, or a smaller network that was trained with the same"
    own, other = (meaning(each.config) for each in (opened, weak))
    if changed := next((name for name in {**own, **other} if own.get(name) != other.get(name)), None):
        raise ValueError(
            f"{typed('guidance.weak', where)} has another {changed} than the run, so its outputs differ: {remedy}"
        )
    if weak.module.shape != opened.module.shape:
        raise ValueError(
            f"{typed('guidance.weak', where)} makes samples of shape {weak.module.shape}, the run "
            f"{opened.module.shape}: {remedy}"
        )

    weak.module.sampling_dtype = opened.module.sampling_dtype

    def denoise(x: "torch.Tensor", t: "Level", cond: "torch.Tensor | None") -> "torch.Tensor":
        return weak.module.to(x.device).denoise_in_sampling(x, t, cond)

    return denoise


def meaning(config: DictConfig) -> dict[str, Any]:
    """The settings on which it depends what a network is given, and what its outputs mean."""
    names = ("process.prediction", "process.variance", "process.sigma_data", "schedule", "snr_shift")
    settings = {name: OmegaConf.select(config, name) for name in (*names, "zero_terminal_snr")}
    for name, value in (OmegaConf.select(config, "conditioning.encode") or {}).items():
        if name not in ("examples", "cache", "device", "model"):  # of an encoder its fingerprint tells
            settings[f"conditioning.encode.{name}"] = value
    return settings


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
