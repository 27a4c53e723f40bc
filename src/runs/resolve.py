"""Resolve a configuration: every value that the data, a checkpoint or the machine infers."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from src.errors import sentence
from src.runs.checkpoints import changed_settings, find_checkpoint
from src.runs.components import plain
from src.runs.trust import check_texts
from src.training.checkpoints import read_checkpoint

if TYPE_CHECKING:
    import lightning as L

    from src.data.module import BaseDataModule

import json


def infer_data_settings(cfg: DictConfig, data: "BaseDataModule") -> None:
    """What only the data tell of themselves as settings, and of the network how many numbers make a point."""
    check_texts(dict(data.inferred), "the data")
    cfg.data.update(data.inferred)
    if len(data.shape) == 1 and "features" in cfg.model:
        cfg.model.features = data.shape[0]


def infer_condition_settings(cfg: DictConfig, data: "BaseDataModule") -> None:
    """What only the data tell of conditions, such as the names of classes, as settings; of a resumed run they did.

    Raises ValueError if the data have no such conditions.
    """
    if cfg.get("conditioning") is None or cfg.resume is not None:
        return
    data.prepare_once_per_node()
    assert data.source is not None
    node = cfg.conditioning.encode
    found = dict(get_class(node._target_).infer_settings(data.source, plain(node)))  # type: ignore[attr-defined]
    check_texts(found, "the data")
    node.update(found)


def infer_accumulation(cfg: DictConfig, trainer: "L.Trainer", saved: dict[str, Any] | None) -> None:
    """`data.microbatch_size` as `trainer.accumulate_grad_batches`; auto takes that of the checkpoint `saved`, if resumed.

    Without a checkpoint auto is left to the callback `MicrobatchFinder`. Raises ValueError for contradictions.
    """
    from src.distributed.sharding import FullyShardedStrategy
    from src.training.memory import accumulate, divisors

    micro, given = cfg.data.get("microbatch_size"), cfg.trainer.accumulate_grad_batches
    share, rest = divmod(cfg.data.batch_size, trainer.world_size)
    if micro is None or rest:  # TrainingStream refuses the rest
        return
    if micro == "auto":
        if isinstance(trainer.strategy, FullyShardedStrategy):
            raise ValueError(
                "data.microbatch_size=auto tries a step on each device alone, which sharded weights do not allow: give a "
                "number, such as data.microbatch_size=1, and double it while it fits"
            )
        if given != 1:
            raise ValueError(
                f"data.microbatch_size=auto finds trainer.accumulate_grad_batches, given as {given}: leave one of them out"
            )
        if saved is None:
            return
        batches = saved["hyper_parameters"]["trainer"]["accumulate_grad_batches"]
    else:
        if share % micro:
            fitting = divisors(share)
            near = [max(n for n in fitting if n < micro), *[n for n in fitting if n > micro][-1:]]
            raise ValueError(
                f"data.microbatch_size={micro} does not divide the {share} samples of a step on each of "
                f"{trainer.world_size} processes (data.batch_size={cfg.data.batch_size}): choose "
                f"{' or '.join(map(str, near))}"
            )
        batches = share // micro
        if given not in (1, batches):
            raise ValueError(
                f"data.microbatch_size={micro} makes trainer.accumulate_grad_batches {batches}, given as {given}: "
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


def restore_found(cfg: DictConfig, before: Mapping[str, Any]) -> None:
    """Take what only the data told from the settings `before` of a run that goes on, where nothing else is given.

    The data may have grown since, and tell something else, of which the weights know nothing.
    """
    encode = (before.get("conditioning") or {}).get("encode") or {}
    found = {f"conditioning.encode.{name}": value for name, value in encode.items()}
    found |= {f"data.{name}": before["data"].get(name) for name in ("columns", "mean", "std")}
    check_texts({name: value for name, value in found.items() if value is not None}, "the run that is resumed")
    for name, value in found.items():
        node, _, last = name.rpartition(".")
        parent = OmegaConf.select(cfg, node)
        if value is not None and parent is not None and last in parent and parent[last] in (None, []):
            parent[last] = value
    if found["data.columns"] and "features" in cfg.model:
        cfg.model.features = len(found["data.columns"])


def resume_job(cfg: DictConfig) -> dict[str, Any] | None:
    """Of a job in a sweep that goes on: its metrics if it is finished; else it resumes if it has begun.

    Raises ValueError if another job has been in its folder.
    """
    folder = Path(cfg.run_dir)
    cfg.resume = str(folder) if any((folder / "checkpoints").glob("*.ckpt")) else None
    if cfg.resume is None:
        return None
    from src.runs.components import plain

    before = read_checkpoint(find_checkpoint(cfg.resume, None))["hyper_parameters"]
    restore_found(cfg, before)
    if changed := changed_settings(before, plain(cfg)):
        raise ValueError(
            f"{folder} is of another job ({changed[0]}): go on with the sweep as it was, or start a new one"
        )
    finished = folder / "metrics.json"
    metrics: dict[str, Any] | None = json.loads(finished.read_text()) if finished.is_file() else None
    diverged = metrics is not None and metrics.get("val/loss", 0.0) is None  # it ends once more as it did
    return None if diverged else metrics
