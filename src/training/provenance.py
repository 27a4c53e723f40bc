"""Record the code version and environment of a run, without host names or paths."""

import platform
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "lightning", "numpy", "hydra-core", "wandb", "tensorboard")


def code_version(root: Path = ROOT) -> dict[str, Any]:
    """Return the git commit of `root` and whether tracked files differ from it; None for both without git."""
    unknown = {"commit": None, "dirty": None}
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():  # not in a repository, or inside another one
        return unknown
    commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no")
    return unknown if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": installed(PACKAGES),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": device_name(device),
        "processes": processes,
    }


def installed(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    versions = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def device_name(device: torch.device) -> str:
    """Return the model of a GPU or CPU, or the device type if it is unknown."""
    if device.type in ("cuda", "xpu"):
        return str(torch.get_device_module(device).get_device_name(device))
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="ignore") if device.type == "cpu" and info.is_file() else ""
    model = re.search(r"^model name\s*: *(.+)", text, re.MULTILINE)
    return model[1].strip() if model else device.type
