"""Weights sharded over devices (FSDP2); the same functions accept weights that are not sharded."""

from collections.abc import Mapping

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the weights of each block of `net`, and the remaining ones, over a one-dimensional device mesh.

    FSDP gathers a block while it computes and frees it afterwards.

    Source: Zhao et al. 2023 (arXiv 2304.11277).
    """
    if isinstance(net, FSDPModule):
        return
    net.to(memory_format=torch.contiguous_format)  # FSDP2 supports no other layout
    for child in net.children():
        for block in child if isinstance(child, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    # By default FSDP keeps the gathered weights of the outermost module after a forward pass: the step after a
    # validation, during which the shards hold the average, would compute with the average.
    fully_shard(net, mesh=mesh, reshard_after_forward=True)


def local_shard(weight: Tensor) -> Tensor:
    """Return this process's shard of a weight, without a copy; a weight that is not sharded is its own shard."""
    return weight.to_local() if isinstance(weight, DTensor) else weight.data


def gather_full(part: Tensor, like: Tensor) -> Tensor:
    """Return a copy on the CPU of the weight whose shards have the layout of `like`. A collective call."""
    if isinstance(like, DTensor):
        sharded = DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        part = sharded.full_tensor()
    return part.detach().to("cpu", copy=True)


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a copy of this process's shard of a full weight, in the layout of `like`."""
    value = value.detach().to(like.device, copy=True)
    return (
        distribute_tensor(value, like.device_mesh, like.placements).to_local() if isinstance(like, DTensor) else value
    )


def unsharded(value: Tensor) -> Tensor:
    """Return the full tensor on the device of its shards; a tensor that is not sharded is returned itself.

    A collective call.
    """
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy full weights and buffers, with the names and shapes of the module, into a module that may be sharded."""
    for name, target in module.state_dict().items():
        local_shard(target).copy_(shard_like(state[name], target))


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's model-parallel strategy with all processes on the data axis, and checkpoints in one file.

    Checkpoints equal those of an unsharded run, gathered on the first process.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
