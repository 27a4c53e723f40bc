"""The processes that share the work of `src.sample` or `src.evaluate`, one to a device."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

import torch

from src.distributed.ranks import remember_children, signals_blocked, slurm_tasks
from src.errors import sentence

T = TypeVar("T")
_nothing: Any = object()


@dataclass(frozen=True)
class Processes:
    """This process is number `rank` of `count`, and works on `device`."""

    device: torch.device
    rank: int = 0
    count: int = 1

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every `count`-th item, from number `rank` on."""
        return items[self.rank :: self.count]

    def gather(self, part: T) -> list[T]:
        """What every process has, in their order. All must take part."""
        if self.count == 1:
            return [part]
        parts: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(parts, part)
        return parts

    def gather_in_turn(self, results: Sequence[T]) -> list[T]:
        """The results of every process for its `share` of some items, in the order of the items."""
        turns = zip_longest(*self.gather(list(results)), fillvalue=_nothing)
        return [result for turn in turns for result in turn if result is not _nothing]


def check_processes(prefix: str, device: torch.device, devices: int, num_nodes: int, environment: Any) -> None:
    """Raise ValueError for more processes than the machine can use, or nodes on which no process would be started.

    On a CPU a "device" is a process, so nothing else bounds them: one for each core, and up to 8 in any case, for
    trying out what several do. `environment` is Lightning's, or None for a single process; `prefix` is that of the
    settings' names.
    """
    most = max(8, os.cpu_count() or 1)
    if device.type == "cpu" and devices > most:
        raise ValueError(
            f"{prefix}devices={devices} is more than this machine can use: at most {most} processes on its "
            f"{os.cpu_count()} cores"
        )
    alone = environment is None or not environment.creates_processes_externally
    # By either of them a node that was started by hand says which it is.
    if num_nodes > 1 and alone and not {"NODE_RANK", "GROUP_RANK"} & os.environ.keys():
        raise ValueError(
            f"{prefix}num_nodes={num_nodes} needs the command to be started on each node, by torchrun or srun: leave "
            "it out for this machine alone"
        )


def start_quietly(strategy: Any) -> None:
    """Make Lightning start the other processes with stop signals blocked, until they ignore them."""
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
    """One process for each of `devices` devices of the kind of `device`, on each of `num_nodes` nodes.

    This command is started again for all but the first, unless torchrun or SLURM have done so already. Raises
    ValueError if there are not so many, or another number of processes runs.
    """
    if min(devices, num_nodes) < 1:
        raise ValueError(f"devices and num_nodes must be at least 1, got {devices} and {num_nodes}")
    count = devices * num_nodes
    running = int(os.environ.get("WORLD_SIZE", slurm_tasks()))
    if running not in (1, count):
        raise ValueError(
            f"{running} processes were started for devices={devices} num_nodes={num_nodes}: give devices="
            f"{running // num_nodes or 1}, the processes on each node"
        )
    if count == 1:
        return Processes(device)
    if device.index is not None:
        raise ValueError(f"device={device} is one device, devices={devices} asks for several: use device={device.type}")
    from lightning import Fabric
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        fabric = Fabric(accelerator=device.type, devices=devices, num_nodes=num_nodes, strategy="ddp")
    except MisconfigurationException as error:
        raise ValueError(f"devices={devices} is not available: {sentence(error)} (device={device.type})") from error
    check_processes("", fabric.device, devices, num_nodes, getattr(fabric.strategy, "cluster_environment", None))
    start_quietly(fabric.strategy)
    fabric.launch()
    return Processes(fabric.device, fabric.global_rank, fabric.world_size)
