"""Of which code a run is the result, and on what it ran: nothing that tells of the machine's name or its paths."""

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "lightning", "numpy", "hydra-core", "wandb", "tensorboard")


def code_version(root: Path = ROOT) -> dict[str, Any]:
    """The git commit of the code in `root`, and whether a tracked file differs from it; None for both without git."""
    unknown = {"commit": None, "dirty": None}
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():  # none, or the repository of something else
        return unknown
    commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no")
    return unknown if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    """What git says, None if it cannot."""
    try:
        told = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() if told.returncode == 0 else None


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Versions, and the kind and number of devices."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": installed(PACKAGES),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": device_name(device),
        "processes": processes,
    }


def installed(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those that are there."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """The model of a GPU or, where the system tells, of a CPU."""
    if device.type in ("cuda", "xpu"):
        return str(torch.get_device_module(device).get_device_name(device))
    about = Path("/proc/cpuinfo")
    lines = about.read_text(errors="ignore").splitlines() if device.type == "cpu" and about.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, device.type)
