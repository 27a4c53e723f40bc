"""The processes that share the work of `src.sample`, `src.evaluate` or `src.compare`, one per device."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from src.distributed.ranks import remember_children, signals_blocked, slurm_tasks

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The rank, count and device of this process."""

    device: torch.device
    rank: int = 0
    count: int = 1

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return every `count`-th item, starting at `rank`."""
        return items[self.rank :: self.count]

    def gather(self, part: T) -> list[T]:
        """Return the `part` of every process by rank. A collective call."""
        if self.count == 1:
            return [part]
        parts: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(parts, part)
        return parts

    def gather_in_turn(self, results: Sequence[T]) -> list[T]:
        """Return the results of all processes for their `share` of some items, in the order of the items."""
        parts = self.gather(results)
        return [part[turn] for turn in range(len(parts[0])) for part in parts if turn < len(part)]


def check_processes(prefix: str, device: torch.device, devices: int, num_nodes: int, environment: Any) -> None:
    """Raise ValueError for more processes than the machine supports, or for several nodes without a launcher.

    On a CPU a "device" is a process: one per core is allowed, and always 8, for tests. `environment` is Lightning's
    cluster environment, or None for a single process; `prefix` precedes the names of the settings.
    """
    most = max(8, os.cpu_count() or 1)
    if device.type == "cpu" and devices > most:
        raise ValueError(
            f"{prefix}devices={devices} must be at most {most} on this machine, which has {os.cpu_count()} cores"
        )
    alone = environment is None or not environment.creates_processes_externally
    # A manually started node has one of these variables.
    if num_nodes > 1 and alone and not {"NODE_RANK", "GROUP_RANK"} & os.environ.keys():
        raise ValueError(
            f"{prefix}num_nodes={num_nodes} needs torchrun or srun to start the command on each node; leave it out to "
            "use only this machine"
        )


def start_quietly(strategy: Any) -> None:
    """Make Lightning start the other processes with stop signals blocked until they ignore them."""
    launcher = strategy.launcher
    if launcher is None:
        return
    launch = launcher.launch

    def launch_blocked(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as blocked:
            blocked.enter_context(signals_blocked())

            def run(*args: Any, **kwargs: Any) -> Any:
                blocked.close()
                return function(*args, **kwargs)

            return launch(run, *args, **kwargs)

    launcher.launch = launch_blocked
    remember_children(launcher)


def start_processes(device: torch.device, devices: int, num_nodes: int) -> Processes:
    """Start one process for each of `devices` devices like `device`, on each of `num_nodes` nodes.

    Runs this command again for all but the first, unless torchrun or SLURM did. Raises ValueError if the devices are
    not available or another number of processes runs.
    """
    if min(devices, num_nodes) < 1:
        raise ValueError(f"devices={devices} and num_nodes={num_nodes} must be at least 1")
    count = devices * num_nodes
    running = int(os.environ.get("WORLD_SIZE", slurm_tasks()))
    if running not in (1, count):
        raise ValueError(
            f"devices={devices} num_nodes={num_nodes} needs {count} processes, but {running} run; set devices="
            f"{running // num_nodes or 1}, the number of processes on each node"
        )
    if count == 1:
        return Processes(device)
    if device.index is not None:
        raise ValueError(f"device={device} names one of devices={devices} devices; set device={device.type}")
    from lightning import Fabric
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        fabric = Fabric(accelerator=device.type, devices=devices, num_nodes=num_nodes, strategy="ddp")
    except MisconfigurationException as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"devices={devices} is not available: {reason} (device={device.type})") from error
    check_processes("", fabric.device, devices, num_nodes, getattr(fabric.strategy, "cluster_environment", None))
    start_quietly(fabric.strategy)
    fabric.launch()
    return Processes(fabric.device, fabric.global_rank, fabric.world_size)
