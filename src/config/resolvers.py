"""What `${name:...}` in conf/ stands for: importing this registers it with OmegaConf."""

import os
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from src.config import sweeps
from src.distributed.ranks import fresh_folder


def length(items: Sequence[object] | None) -> int:
    """How many there are; 0 before it is known which."""
    return len(items or ())


def wandb_offline() -> bool:
    """Whether W&B has no account to log to: no key in the environment or where `wandb login` leaves it."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    logged_in = netrc.is_file() and "wandb" in netrc.read_text(errors="ignore")
    return not (os.environ.get("WANDB_API_KEY") or logged_in)


def sweep_name(folder: str) -> str | None:
    """The sweep that a run is a job of, by the name of its folder; None for a run by itself."""
    path = Path(folder).resolve().parent
    of_sweep = any((path / name).is_file() for name in ("multirun.yaml", "optimization_results.yaml"))
    # A search writes its file when it is over.
    of_sweep = of_sweep or (HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN)
    return path.name if of_sweep else None


def run_name(folder: str) -> str:
    """A run by what distinguishes it: of a sweep's job what was typed for it and not for all, else its folder."""
    path = Path(folder).resolve()
    if sweep_name(folder) is None:
        return path.name
    if HydraConfig.initialized() and Path(HydraConfig.get().runtime.output_dir) == path:
        typed_overrides = list(HydraConfig.get().overrides.task)  # the files are not written yet
    else:
        typed_overrides = _overrides(path / ".hydra" / "overrides.yaml")
    common = _overrides(path.parent / "multirun.yaml")
    own = [override for override in typed_overrides if override not in common and not override.startswith("resume=")]
    return " ".join(own) or path.name


def _overrides(file: Path) -> list[str]:
    """Those that Hydra wrote down, of a run or of a sweep; none if it did not."""
    if not file.is_file():
        return []
    written = yaml.safe_load(file.read_text())
    return list(written if isinstance(written, list) else written["hydra"]["overrides"]["task"])


OmegaConf.register_new_resolver("fresh_folder", fresh_folder, replace=True)
OmegaConf.register_new_resolver("gpus_per_job", lambda: min(1, len(sweeps.gpus())), replace=True)
OmegaConf.register_new_resolver("length", length, replace=True)
OmegaConf.register_new_resolver("parallel_jobs", sweeps.parallel_jobs, replace=True)
OmegaConf.register_new_resolver("run_name", run_name, replace=True)
OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True)
OmegaConf.register_new_resolver("wandb_offline", wandb_offline, replace=True)
