"""Memory: what is kept for the backward pass, what a step needs, and what happens where it does not fit."""

import functools

import pytest
import torch
from torch import Tensor, nn

from src.memory import estimate
from src.models.unet import UNet

CPU = torch.device("cpu")
ADAMW = functools.partial(torch.optim.AdamW, fused=True)


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


def measured(net: nn.Module, shape: tuple[int, ...], batch: int) -> int:
    """The most bytes that the allocator had given out at once in a step, gradients and moments being there before."""
    optimizer = ADAMW(net.parameters())
    x, time = torch.randn(batch, *shape).contiguous(memory_format=torch.channels_last), torch.rand(batch)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        (net(x, time) - x).square().mean().backward()
        optimizer.step()
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    state = [v for values in optimizer.state.values() for v in values.values()]
    return peak + sum(t.nbytes for t in [*net.parameters(), *(p.grad for p in net.parameters()), *state])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_estimate_is_what_the_allocator_gives_out(checkpointing):
    net = UNet(
        channels=1, image_size=16, width=32, multipliers=(1, 2), blocks=1, attention=(8,), checkpointing=checkpointing
    ).to(memory_format=torch.channels_last)  # fmt: skip
    told = estimate(net, (1, 16, 16), 16, CPU, "32-true", ADAMW, average=False)
    assert told.activations > 2 * told.weights or checkpointing
    assert sum(told) == pytest.approx(measured(net, (1, 16, 16), 16), rel=0.1)


def test_estimate_has_every_part():
    """Adam keeps two moments for each weight; the average is float32; half precision halves what is kept."""
    net = network(False)
    size = sum(p.nbytes for p in net.parameters())
    whole = estimate(net, (1, 8, 8), 64, CPU, "32-true", ADAMW)
    assert whole[:4] == (size, size, 2 * size, size)
    half = estimate(net, (1, 8, 8), 64, CPU, "bf16-true", ADAMW, shards=2)
    assert half[:4] == (size // 4, size // 4, size // 2, size // 2)
    assert half.activations == pytest.approx(whole.activations / 2, rel=0.1)
    mixed = estimate(net, (1, 8, 8), 64, CPU, "bf16-mixed", ADAMW, buckets=True)
    assert mixed[:4] == (size, 2 * size, 2 * size, size) and mixed.activations < 0.75 * whole.activations
    sampling = estimate(net, (1, 8, 8), 64, CPU, "32-true", None)
    assert sampling[:4] == (size, 0, 0, 0) and sampling.activations < whole.activations / 3
    assert next(net.parameters()).device == CPU and not any(p.grad is not None for p in net.parameters())
