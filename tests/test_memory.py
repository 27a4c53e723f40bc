"""Memory: what is kept for the backward pass, what a step needs, and what happens where it does not fit."""

import pytest
import torch
from torch import Tensor, nn

from src.models.unet import UNet


def network(checkpointing: bool, resample_blocks: bool = False) -> UNet:
    torch.manual_seed(0)
    net = UNet(
        channels=1, image_size=8, width=16, multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.2,
        resample_blocks=resample_blocks, checkpointing=checkpointing,
    )  # fmt: skip
    for p in net.parameters():
        nn.init.normal_(p, std=0.05)  # none of them zero
    return net.to(memory_format=torch.channels_last)


def backward(net: UNet, precision: torch.dtype | None) -> tuple[Tensor, list[Tensor], int]:
    """The loss, the gradients, and the bytes that were kept in between, whose storages are counted once."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(1)  # of the dropout
    x, time = torch.randn(4, 1, 8, 8), torch.rand(4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):  # noqa: SIM117 - two thoughts
        with torch.autocast("cpu", precision, enabled=precision is not None):
            loss = net(x, time).float().square().mean()
    loss.backward()
    return loss.detach(), [p.grad for p in net.parameters()], sum(kept.values())


@pytest.mark.parametrize("resample_blocks", [False, True])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_checkpointing_keeps_less_and_changes_no_bit(resample_blocks, precision):
    plain, checkpointed = (network(c, resample_blocks) for c in (False, True))
    assert plain.state_dict().keys() == checkpointed.state_dict().keys()
    (loss, grads, kept), (same_loss, same_grads, less) = (backward(net, precision) for net in (plain, checkpointed))
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(grads, same_grads, strict=True))
    assert less < kept / 2


def test_checkpointing_is_for_training_alone(monkeypatch):
    """Sampling would pay for it and have nothing of it."""
    monkeypatch.setattr("src.models.unet.checkpoint", lambda *_, **__: pytest.fail("sampling recomputes"))
    with torch.no_grad():
        network(True)(torch.zeros(1, 1, 8, 8), torch.zeros(1))
