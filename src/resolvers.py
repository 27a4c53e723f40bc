"""What `${name:...}` in conf/ stands for: importing this registers it with OmegaConf."""

import os
from pathlib import Path

from omegaconf import OmegaConf

from src import sweeps
from src.ranks import fresh_folder


def level_size(image_size: int, level: int) -> int:
    """The resolution of level `level` of a U-Net, 0 being the image's own."""
    size: int = -(-image_size // 2**level)
    return size


def wandb_offline() -> bool:
    """Whether W&B has no account to log to: no key in the environment or where `wandb login` leaves it."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    logged_in = netrc.is_file() and "wandb" in netrc.read_text(errors="ignore")
    return not (os.environ.get("WANDB_API_KEY") or logged_in)


OmegaConf.register_new_resolver("fresh_folder", fresh_folder, replace=True)
OmegaConf.register_new_resolver("gpus_per_job", lambda: min(1, len(sweeps.gpus())), replace=True)
OmegaConf.register_new_resolver("level_size", level_size, replace=True)
OmegaConf.register_new_resolver("parallel_jobs", sweeps.parallel_jobs, replace=True)
OmegaConf.register_new_resolver("wandb_offline", wandb_offline, replace=True)
