"""Resolve a configuration: infer every setting that depends on the data, on a checkpoint or on the machine.

`resolve` is the only writer of a configuration of a run, and it writes to a copy.
"""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from src.distributed.ranks import fresh_folder
from src.errors import absence, format_override, sentence
from src.runs.checkpoints import changed_settings, find_checkpoint, read_metrics
from src.runs.components import check_settings_of_network
from src.runs.imported import read_model
from src.runs.latents import SETTINGS, check_same_latents, has_autoencoder, infer_latents, measure_latents
from src.runs.nodes import inline_aliases, is_typed, to_plain
from src.runs.trainer import world_size
from src.runs.trust import check_texts
from src.training.checkpoints import read_checkpoint

if TYPE_CHECKING:
    from src.data.module import BaseDataModule


def resolve(cfg: DictConfig, data: "BaseDataModule | None", checkpoint: Mapping[str, Any] | None) -> DictConfig:
    """Return a copy of `cfg` in which every inferred setting has its value.

    `checkpoint` belongs to the run that is resumed; None starts a new run. `data=None` skips the settings that depend
    on the data. Resolving twice changes nothing.

    Raises ValueError for contradictory settings, and FileNotFoundError if the file in `schedule.betas` does not exist.
    """
    cfg = copy.deepcopy(cfg)
    cfg.data = inline_aliases(cfg.data, "data")
    if not isinstance(cfg.init_from, DictConfig):  # composed without the command line, which writes init_from.path
        cfg.init_from = {"path": cfg.init_from, "weights": None, "flags": None}
    if not isinstance(cfg.autoencoder, DictConfig):
        cfg.autoencoder = dict.fromkeys(SETTINGS) | {"path": cfg.autoencoder}
    _infer_folders(cfg)
    if data is None and has_autoencoder(cfg):
        infer_latents(cfg, checkpoint)
    if checkpoint is None and data is None and cfg.init_from.path is not None:
        _adopt_model(cfg)
    _inline_betas(cfg, checkpoint)
    _restore_settings(cfg, checkpoint)
    if str(cfg.trainer.precision).startswith("16") and cfg.optimizer.get("fused"):
        # A fused step unscales gradients itself, after Lightning has clipped them.
        warnings.warn(f"trainer.precision={cfg.trainer.precision} sets optimizer.fused=false", stacklevel=3)
        cfg.optimizer.fused = False
    if str(cfg.optimizer.get("_target_")).endswith(".adamw_schedule_free") and cfg.callbacks:
        _leave_average_to_optimizer(cfg.callbacks)
    if (node := (cfg.logger or {}).get("wandb")) and node.id is None:
        from src.training.loggers import wandb_id

        node.id = wandb_id(Path(cfg.run_dir))
    if data is not None:
        _infer_data_settings(cfg, data, checkpoint is None)
        _infer_accumulation(cfg)
    return cfg


def _leave_average_to_optimizer(callbacks: DictConfig) -> None:
    """Remove the EMA. Raises ValueError for typed settings of an average."""
    if lengths := (callbacks.get("power_ema") or {}).get("lengths"):
        raise ValueError(
            f"{format_override('callbacks.power_ema.lengths', list(lengths))} averages the weights of each step, and "
            "optimizer=schedule_free evaluates its own average instead; leave it out, or choose optimizer=adamw"
        )
    if callbacks.get("ema") is not None:
        if is_typed("callbacks.ema.decay"):
            raise ValueError(
                f"callbacks.ema.decay={callbacks.ema.decay} has no effect with optimizer=schedule_free, which "
                "averages the weights itself; leave it out"
            )
        callbacks.ema = None


def resumed_folder(cfg: DictConfig) -> Path | None:
    """Return the folder of the run that `resume` names, or None for a new run.

    `resume=auto` means the run folder itself if it holds checkpoints.
    """
    if cfg.resume != "auto":
        return None if cfg.resume is None else Path(str(cfg.resume))  # A folder named 5 arrives as an integer.
    folder = Path(cfg.run_dir)
    return folder if any((folder / "checkpoints").glob("*.ckpt")) else None


def finished_job(cfg: DictConfig) -> dict[str, Any] | None:
    """Return the metrics of a sweep job that is already finished under `resume=auto`; None if it is not.

    Raises ValueError if a job with other settings trained in its folder.
    """
    if cfg.resume != "auto" or (folder := resumed_folder(cfg)) is None:
        return None
    checkpoint = read_checkpoint(find_checkpoint(str(folder), None))
    if changed := changed_settings(checkpoint["hyper_parameters"], to_plain(resolve(cfg, None, checkpoint))):
        raise ValueError(
            f"run_dir={folder} belongs to another job ({changed[0]}); keep the settings of the sweep, or start "
            "a new one"
        )
    return read_metrics(folder)


def relocate(
    config: DictConfig,
    data_root: str | None,
    encoder: str | None,
    checkpoint: Path,
    autoencoder: str | None = None,
    device: str | None = None,
) -> DictConfig:
    """Return a copy of a trained run's configuration with the paths of this machine.

    `data_root` replaces the folder or file of the data, `encoder` the pretrained text encoder, and `autoencoder` that
    of a run in latents; None keeps them, except that an exported pipeline has an autoencoder of its own. The text
    encoder runs on `device`, with None on an accelerator if there is one. The cache
    folders recorded in `checkpoint` are ignored: the file is untrusted and could name any folder. Raises ValueError if
    the run has no such path.
    """
    config = copy.deepcopy(config)
    if "cache_dir" in config.data:
        config.data.cache_dir = None
    if has_autoencoder(config):
        own = checkpoint / "vae"
        place = str(own) if own.is_dir() else config.autoencoder.path
        config.autoencoder.update({"cache_dir": None, "path": autoencoder or place})
    elif autoencoder is not None:
        raise ValueError(
            f"{format_override('autoencoder', autoencoder)} needs a run in latents, and {checkpoint} was trained on "
            "the data themselves; leave it out"
        )
    if data_root is not None:
        setting = "path" if "path" in config.data else "root"  # data=table reads one file, data.path
        is_exported = checkpoint.suffix != ".ckpt" and setting in config.data  # src.export sets paths to null
        if config.data.get(setting) is None and not is_exported:
            raise ValueError(
                f"{format_override('data.root', data_root)} needs a run trained on files, and {checkpoint} was trained "
                "on data without files; leave it out"
            )
        config.data[setting] = data_root
    node = OmegaConf.select(config, "conditioning.encode")
    if node is None or "fingerprint" not in node:
        if encoder is not None:
            raise ValueError(
                f"{format_override('encoder', encoder)} needs a run with conditioning=pretrained, and {checkpoint} "
                "is from another; leave it out"
            )
        return config
    node.update({"cache": "outputs/cache", "device": device or "auto", "model": encoder or node.model})
    if node.model is None:
        raise ValueError(f"{checkpoint} does not name its text encoder; add encoder=FOLDER or encoder=NAME of the hub")
    return config


def _adopt_model(cfg: DictConfig) -> None:
    """Take the network of the model that `init_from` names, and of another project's model its diffusion process, too.

    Typed settings win, and so do the channels and the size of the data. The same stages attend at another size.
    Raises ValueError for a model of other latents.
    """
    path = find_checkpoint(None, None, str(cfg.init_from.path))
    checkpoint = read_model(path, cfg.init_from.flags)
    check_same_latents(cfg, checkpoint["hyper_parameters"], path)
    imported = checkpoint.get("imported", False)
    if imported or HydraConfig.initialized():  # A composed configuration does not say what was typed.
        _adopt_settings(cfg, checkpoint["hyper_parameters"], with_process=imported)


def _adopt_settings(cfg: DictConfig, settings: Mapping[str, Any], with_process: bool) -> None:
    """Take the network from `settings`, and the diffusion process `with_process`, except where `cfg` has typed ones."""
    same = settings["model"]["_target_"] == cfg.model._target_
    if not is_typed("model") and (same or {"channels", "image_size"} <= settings["model"].keys() & cfg.model.keys()):
        network = {k: v for k, v in settings["model"].items() if k not in ("channels", "image_size", "features")}
        before, now = settings["model"].get("image_size"), cfg.model.get("image_size")
        if "attention_resolutions" in network and now is not None:  # otherwise the data of this run determine the size
            factor = mean_side(now) / mean_side(before)
            network["attention_resolutions"] = [max(1, round(r * factor)) for r in network["attention_resolutions"]]
        if not same:
            cfg.model = OmegaConf.masked_copy(cfg.model, ["channels", "image_size"])
        for name, value in network.items():
            if not is_typed(f"model.{name}"):
                OmegaConf.update(cfg.model, name, value, force_add=True)
    if not with_process:
        return
    for group in ("schedule", "sampler"):
        if not is_typed(group):
            typed = {key: cfg[group][key] for key in map(str, cfg[group]) if is_typed(f"{group}.{key}")}
            cfg[group] = settings[group] | typed
    if not is_typed("zero_terminal_snr") and not is_typed("schedule"):
        cfg.zero_terminal_snr = settings["zero_terminal_snr"]
    for name, value in settings["diffusion"].items():
        if not is_typed(f"diffusion.{name}"):
            cfg.diffusion[name] = value


def mean_side(size: int | Sequence[int]) -> float:
    """Return the geometric mean of the sides of samples."""
    return size if isinstance(size, int) else math.prod(size) ** (1 / len(size))


def _infer_folders(cfg: DictConfig) -> None:
    """Replace `resume=auto` by the run folder or null; set the run folder if Hydra's main function has not done so."""
    if "${hydra:" in str(to_plain(cfg, resolve=False)["run_dir"]) and not HydraConfig.initialized():
        resumed = cfg.resume not in (None, "auto")
        cfg.run_dir = str(cfg.resume) if resumed else fresh_folder("outputs/train", again=True)
    if cfg.resume == "auto":
        folder = resumed_folder(cfg)
        cfg.resume = None if folder is None else str(folder)


def _inline_betas(cfg: DictConfig, checkpoint: Mapping[str, Any] | None) -> None:
    """Replace a file name in `schedule.betas` by the betas in the file, or by those of the resumed run."""
    betas = OmegaConf.select(cfg, "schedule.betas")
    if not isinstance(betas, str):
        return
    if checkpoint is not None:
        cfg.schedule.betas = [float(beta) for beta in checkpoint["hyper_parameters"]["schedule"].get("betas") or []]
        return
    import numpy as np

    path = Path(betas)
    if not path.is_file():
        raise FileNotFoundError(
            f"{format_override('schedule.betas', str(path.resolve()))} {absence(path)}; set it to a list, or to a "
            ".npy or .csv file"
        )
    try:
        if path.suffix == ".npy":
            table: Any = np.lib.format.open_memmap(path, mode="r")  # never unpickles nor allocates
        else:
            with path.open() as lines:  # given a path, numpy would decompress archives
                table = np.loadtxt(lines, delimiter=",")
        cfg.schedule.betas = np.asarray(table, dtype=np.float64).ravel().tolist()
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"schedule.betas={betas} is not a table of numbers ({sentence(error)}); give one beta per step as .npy or "
            ".csv"
        ) from error


def _restore_settings(cfg: DictConfig, checkpoint: Mapping[str, Any] | None) -> None:
    """Fill in the inferred settings of the resumed run, except where the configuration sets another value.

    The data may have grown since the run started, so settings inferred from them again could contradict the weights.
    """
    if checkpoint is None:
        return
    before = checkpoint["hyper_parameters"]
    if (before.get("init_from") or {}).get("path") is not None:  # The model in `init_from` may be gone.
        _adopt_settings(cfg, before, with_process=True)
    encode = (before.get("conditioning") or {}).get("encode") or {}
    inferred = {("conditioning.encode", name): value for name, value in encode.items()}
    names = getattr(get_class(cfg.data._target_), "inferred_settings", ())
    inferred |= {("data", name): before["data"].get(name) for name in names}
    inferred = {name: value for name, value in inferred.items() if value is not None}
    check_texts({".".join(name): value for name, value in inferred.items()}, "the run that is resumed")
    for (node, name), value in inferred.items():
        parent = OmegaConf.select(cfg, node)
        if parent is not None and name in parent and parent[name] in (None, []):
            parent[name] = value
    if ("data", "columns") in inferred and "features" in cfg.model:
        cfg.model.features = before["model"]["features"]
    if HydraConfig.initialized() and not is_typed("data.batch_size"):  # it may have been lowered
        cfg.data.batch_size = before["data"]["batch_size"]
    if cfg.data.get("microbatch_size") == "auto" and cfg.trainer.accumulate_grad_batches == 1:
        cfg.trainer.accumulate_grad_batches = before["trainer"]["accumulate_grad_batches"]


def _infer_data_settings(cfg: DictConfig, data: "BaseDataModule", is_new: bool) -> None:
    """Set the settings that depend on the data: `data.inferred`, and the number of features of a network for points.

    For a new run, also set the settings of conditions, such as class names. Raises ValueError if the data have no
    conditions.
    """
    check_texts(dict(data.inferred), "the data")
    cfg.data.update(data.inferred)
    if len(data.shape) == 1 and "features" in cfg.model:
        cfg.model.features = data.shape[0]
    if is_new and has_autoencoder(cfg):
        check_settings_of_network(cfg)
        cfg.autoencoder.update(measure_latents(data))
    if is_new and cfg.get("conditioning") is not None:
        data.prepare_once_per_node()
        assert data.source is not None
        node = cfg.conditioning.encode
        inferred = dict(get_class(node._target_).infer_settings(data.source, to_plain(node)))  # type: ignore[attr-defined]
        check_texts(inferred, "the data")
        node.update(inferred)
    if is_new and HydraConfig.initialized() and not is_typed("data.batch_size"):
        _lower_batch_size(cfg, data)


def _lower_batch_size(cfg: DictConfig, data: "BaseDataModule") -> None:
    """Lower the default `data.batch_size` to the number of training samples, if the data are small.

    It stays a multiple of the number of micro-batches. A source that is not open yet is not small.
    """
    if len(data.shape) == 1:  # rows and points are in memory already
        data.prepare_once_per_node()
    count, size, micro = len(data.training_indices()), cfg.data.batch_size, cfg.data.get("microbatch_size")
    parts = world_size(cfg) * (micro if isinstance(micro, int) else cfg.trainer.accumulate_grad_batches)
    lowered = count - count % parts  # if it is 0, the sampler rejects the batch size
    if data.source is not None and lowered > 0 and count < size:
        warnings.warn(f"data.batch_size={lowered} instead of {size}: only {count} training samples", stacklevel=4)
        cfg.data.batch_size = lowered


def _infer_accumulation(cfg: DictConfig) -> None:
    """Set `trainer.accumulate_grad_batches` from `data.microbatch_size`.

    The callback `MicrobatchFinder` resolves `auto` later. Raises ValueError for contradictory settings.
    """
    from src.training.memory import divisors

    micro, typed = cfg.data.get("microbatch_size"), cfg.trainer.accumulate_grad_batches
    if micro == "auto" and cfg.resume is None and typed != 1:
        raise ValueError(
            f"data.microbatch_size=auto sets trainer.accumulate_grad_batches, but it is {typed}; leave one out"
        )
    if micro == "auto" and cfg.data.get("coupling") == "ot":
        raise ValueError(
            "data.microbatch_size=auto excludes data.coupling=ot, which assigns the noise within a micro-batch and so "
            "would depend on the memory; set a number"
        )
    if micro in (None, "auto"):
        return
    processes = world_size(cfg)
    share, rest = divmod(cfg.data.batch_size, processes)
    if rest:  # The data module rejects this batch size.
        return
    if share % micro:
        near = min(divisors(share), key=lambda n: abs(n - micro))
        raise ValueError(
            f"data.microbatch_size={micro} must divide the {share} samples per step and process "
            f"(data.batch_size={cfg.data.batch_size}, {processes} processes); choose {near}"
        )
    if typed not in (1, share // micro):
        raise ValueError(
            f"data.microbatch_size={micro} needs trainer.accumulate_grad_batches={share // micro}, but it is {typed}; "
            "leave one out"
        )
    cfg.trainer.accumulate_grad_batches = share // micro
