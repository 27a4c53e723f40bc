"""Shared by the tests: configurations composed as on the command line, and one small trained run."""

import os
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import hydra
import pytest
import torch
from omegaconf import DictConfig

from src.config import resolvers  # noqa: F401 - conf/ needs what it registers
from src.config.search_path import CONF
from src.diffusion.noise import NoiseLevel, NoiseSchedule, per_sample
from tests.speed import speed_up

# Tiny convolutions gain nothing from a second thread and become much slower beside other processes.
torch.set_num_threads(1)

speed_up()

CACHE = os.environ["DIFFUSION_CACHE"] = tempfile.mkdtemp(prefix="diffusion-cache-")  # not the user's


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE)


HANG_SECONDS = 3600
"""A test that waits longer for something is hanging; no machine is this slow."""

TINY = [
    "model.model_channels=8",
    "model.num_res_blocks=1",
    "model.num_head_channels=8",
    "diffusion.prediction=v",  # an untrained network already changes the samples
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "callbacks.samples.num_samples=4",
    "callbacks.bits_per_dim.num_samples=3",
    "neighbors.num_samples=3",
    "sampler.steps=3",
    "callbacks.progress.refresh_rate=0",
    "callbacks.loss_by_noise=null",  # draws a chart
]
"""Overrides for a network that trains in milliseconds per step."""

LOSS_BY_NOISE = (
    "callbacks.loss_by_noise={_target_:src.training.callbacks.loss_by_noise.LossByNoise,"
    "directory:'${run_dir}',num_bins:20}"
)
"""Restores a callback that `TINY` removes."""


def once(*overrides: str) -> list[str]:
    """Return the last override of each key, since the command line refuses repeated keys."""
    return list({override.partition("=")[0]: override for override in overrides}.values())


def compose(config_name: str, *overrides: str) -> DictConfig:
    """Return the configuration of a command as Hydra composes it."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return hydra.compose(config_name, list(overrides))


def train_tiny(folder: Path, *overrides: str, curves: bool = False) -> dict[str, float]:
    """Run `src.train` in this process on the digits, with a tiny network, into `folder`.

    Without `curves` it does not draw curves.png, which takes a fifth of the time.
    """
    from src.train import train

    settings = [*TINY, "trainer.max_steps=6", "validate_every=3", "checkpoint_every=100", f"run_dir='{folder}'"]
    cfg = compose("train", *settings, *overrides)
    with nullcontext() if curves else patch("src.viz.line_plots.loss_curves", lambda logs: None):
        return train(cfg)


def exact_level(schedule: NoiseSchedule, t: torch.Tensor, like: torch.Tensor) -> NoiseLevel:
    """Return `schedule.level` in float64."""
    return NoiseLevel(*(per_sample(table[t], like) for table in schedule.rows))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of six steps."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    train_tiny(folder, curves=True)
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_network(monkeypatch)


def cut_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every attempt to open a connection fail as on a machine without a network."""
    import socket

    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX and not str(address).startswith("('127."):
            raise OSError("Network is unreachable")
        connect(self, address)  # type: ignore[arg-type]

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", local_only)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
