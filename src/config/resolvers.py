"""Resolvers for `${name:...}` in conf/; importing this module registers them with OmegaConf."""

import os
from pathlib import Path

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from src.config import sweeps
from src.distributed.ranks import fresh_folder


def wandb_offline() -> bool:
    """Return whether W&B has no credentials: no key in the environment or in the file of `wandb login`."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    logged_in = netrc.is_file() and "wandb" in netrc.read_text(errors="ignore")
    return not (os.environ.get("WANDB_API_KEY") or logged_in)


def sweep_name(folder: str) -> str | None:
    """Return the name of the sweep that a run belongs to; None for a single run."""
    path = Path(folder).resolve().parent
    of_sweep = any((path / name).is_file() for name in ("multirun.yaml", "optimization_results.yaml"))
    # A search writes its file when it ends.
    of_sweep = of_sweep or (HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN)
    return path.name if of_sweep else None


def run_name(folder: str) -> str:
    """Return the overrides that only this job of a sweep has, or the name of a single run's folder."""
    path = Path(folder).resolve()
    if sweep_name(folder) is None:
        return path.name
    if HydraConfig.initialized() and Path(HydraConfig.get().runtime.output_dir) == path:
        typed_overrides = list(HydraConfig.get().overrides.task)  # `start_output` has not written the file yet
    else:
        typed_overrides = _overrides(path / ".hydra" / "overrides.yaml")
    common = _overrides(path.parent / "multirun.yaml")
    own = [override for override in typed_overrides if override not in common and not override.startswith("resume=")]
    return " ".join(own) or path.name


def _overrides(file: Path) -> list[str]:
    """Return the overrides in a file of Hydra's, of a run or a sweep; empty without the file."""
    if not file.is_file():
        return []
    written = yaml.safe_load(file.read_text())
    return list(written if isinstance(written, list) else written["hydra"]["overrides"]["task"])


OmegaConf.register_new_resolver("fresh_folder", fresh_folder, replace=True)
OmegaConf.register_new_resolver("gpus_per_job", lambda: min(1, len(sweeps.gpus())), replace=True)
OmegaConf.register_new_resolver("length", lambda items: len(items or ()), replace=True)
OmegaConf.register_new_resolver("parallel_jobs", sweeps.parallel_jobs, replace=True)
OmegaConf.register_new_resolver("run_name", run_name, replace=True)
OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True)
OmegaConf.register_new_resolver("wandb_offline", wandb_offline, replace=True)
