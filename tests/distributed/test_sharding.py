"""Weights sharded over two processes by FSDP."""

from tests.fork_server import run_ranks

AFTER_VALIDATION = """
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from src.distributed.sharding import local_shard, shard

distributed.init_process_group("gloo")
net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ModuleList([nn.Linear(3, 3)]))
net.forward = lambda x: net[1][0](net[0](x))
shard(net, init_device_mesh("cpu", (2,)))
weights, x = [*net.parameters()], torch.ones(2, 4)
with torch.no_grad():
    assert net(x).any()
    for weight in weights:
        local_shard(weight).zero_()
assert not net(x).any()
"""


def test_training_uses_weights_changed_after_a_validation(tmp_path):
    for done in run_ranks(2, "-c", AFTER_VALIDATION, cwd=tmp_path):
        assert done.returncode == 0, done.stderr[-3000:]
