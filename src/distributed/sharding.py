"""Weights that lie in shares on several devices (FSDP2), and plain ones alike."""

from collections.abc import Mapping

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Deal the weights of each block of `net`, and of what is left, out over a one-dimensional mesh of devices.

    A block is gathered while it computes and let go after it (Zhao et al. 2023, arXiv 2304.11277).
    """
    if isinstance(net, FSDPModule):
        return
    net.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other
    for child in net.children():
        for block in child if isinstance(child, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def local(weight: Tensor) -> Tensor:
    """This process's share of a weight, in place; all of it if it is not sharded."""
    return weight.to_local() if isinstance(weight, DTensor) else weight.data


def whole(part: Tensor, like: Tensor) -> Tensor:
    """A copy on the CPU of the weight of which each process has a share, as `like` is dealt out. All must take part."""
    if isinstance(like, DTensor):
        dealt = DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        part = dealt.full_tensor()
    return part.detach().to("cpu", copy=True)


def share(value: Tensor, like: Tensor) -> Tensor:
    """A copy of this process's share of a whole weight, as `like` is dealt out."""
    value = value.detach().to(like.device, copy=True)
    return (
        distribute_tensor(value, like.device_mesh, like.placements).to_local() if isinstance(like, DTensor) else value
    )


def total_norm(norm: Tensor) -> Tensor:
    """The norm of all shares together, from what `clip_grad_norm_` gives. All must take part."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy whole weights and buffers, of the module's own names and shapes, into a module that may be sharded."""
    for name, target in module.state_dict().items():
        local(target).copy_(share(state[name], target))


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's model-parallel strategy with all processes on the data axis, and checkpoints in one file.

    They are those of an unsharded run, put together on the first process.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
