"""Memory: gradient checkpointing, the estimate of a step, microbatches, and messages on out of memory."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from src.errors import UsageError
from src.models.unet import UNet
from src.training.checkpoints import read_checkpoint
from tests.conftest import HANG_SECONDS, train_tiny
from tests.distributed.test_devices import environment
from tests.runs.test_runs import assert_equal_bits, weights


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global estimate
    from src.training.memory import estimate


CPU = torch.device("cpu")
ADAMW = functools.partial(torch.optim.AdamW, fused=True)


def network(gradient_checkpointing: bool, resblock_updown: bool = False, stages: int = 2) -> UNet:
    torch.manual_seed(0)
    net = UNet(
        channels=1, image_size=8, model_channels=16, channel_mult=(1, 2)[:stages], num_res_blocks=1,
        attention_resolutions=(4,), dropout=0.2, resblock_updown=resblock_updown,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    for p in net.parameters():
        nn.init.normal_(p, std=0.05)  # no weight is zero
    return net.to(memory_format=torch.channels_last)


def backward(net: UNet, precision: torch.dtype | None) -> tuple[Tensor, list[Tensor], int]:
    """Return the loss, the gradients, and the bytes saved for the backward pass, each storage counted once."""
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(1)  # for dropout
    x, time = torch.randn(4, 1, 8, 8), torch.rand(4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):  # noqa: SIM117
        with torch.autocast("cpu", precision, enabled=precision is not None):
            loss = net(x, time).float().square().mean()
    loss.backward()
    return loss.detach(), [p.grad for p in net.parameters()], sum(saved.values())


@pytest.mark.parametrize("resblock_updown", [False, True])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_checkpointing_halves_memory_and_changes_no_bit(resblock_updown, precision):
    plain, checkpointed = (network(c, resblock_updown) for c in (False, True))
    assert plain.state_dict().keys() == checkpointed.state_dict().keys()
    (loss, grads, size), (same_loss, same_grads, smaller) = (backward(net, precision) for net in (plain, checkpointed))
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(grads, same_grads, strict=True))
    assert smaller < size / 2


def test_sampling_does_not_checkpoint(monkeypatch):
    monkeypatch.setattr("src.models.unet.checkpoint", lambda *_, **__: pytest.fail("sampling recomputes"))
    with torch.no_grad():
        network(True)(torch.zeros(1, 1, 8, 8), torch.zeros(1))


def measured(net: nn.Module, shape: tuple[int, ...], batch: int) -> int:
    """Return the allocator's peak bytes of a step, with gradients and moments allocated before."""
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


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_estimate_equals_the_allocators_peak(gradient_checkpointing):
    net = UNet(
        channels=1, image_size=16, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
        attention_resolutions=(8,), gradient_checkpointing=gradient_checkpointing,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    step = measured(net, (1, 16, 16), 16)
    estimated = estimate(net.to("meta"), (1, 16, 16), 16, CPU, "32-true", ADAMW, averages=0)
    assert estimated == pytest.approx(step, rel=0.1)


def test_estimate_has_every_part():
    """Adam keeps two moments per weight; the average is float32; half precision halves activations."""
    size = sum(p.nbytes for p in network(False, stages=1).parameters())

    def bytes_of(precision: str, batch: int = 64, optimizer=ADAMW, **settings) -> int:
        return estimate(network(False, stages=1).to("meta"), (1, 8, 8), batch, CPU, precision, optimizer, **settings)

    whole = bytes_of("32-true")
    assert whole - bytes_of("32-true", averages=0) == size
    assert bytes_of("32-true", buckets=True) - whole == size
    assert whole - bytes_of("32-true", shards=2) == 5 * size / 2  # weights, gradients, two moments, average
    activations = whole - 5 * size
    half = bytes_of("bf16-true") - 3 * size  # the average is float32
    assert half == pytest.approx(activations / 2, rel=0.1)
    assert bytes_of("bf16-mixed") - 5 * size < 0.75 * activations
    assert bytes_of("32-true", optimizer=None) - size < activations / 3


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        (["data.microbatch_size=24"], r"microbatch_size=24"),
        (["data.microbatch_size=65"], r"microbatch_size.*65"),
        (["data.microbatch_size=16", "trainer.accumulate_grad_batches=2"], r"accumulate_grad_batches"),
        (["data.microbatch_size=auto", "trainer.accumulate_grad_batches=2"], r"accumulate_grad_batches"),
        (["data.microbatch_size=most"], r"microbatch_size"),
        (["data.microbatch_size=auto", "trainer=fsdp", "trainer.accelerator=cpu"], r"microbatch_size=auto"),
    ],
)
def test_impossible_microbatches_are_refused(tmp_path, settings, rule):
    with pytest.raises(UsageError, match=rule):
        train_tiny(tmp_path / "run", *settings)


def test_microbatches_equal_accumulation_and_survive_resume(tmp_path):
    """To the bit; the trial of `auto` does not change dropout."""
    settings = ["model.dropout=0.3", "trainer.max_steps=4", "validate_every=2", "logger=none"]
    folders = {}
    for name in ("data.microbatch_size=16", "trainer.accumulate_grad_batches=4", "data.microbatch_size=auto", "seed=0"):
        folders[name] = tmp_path / name.replace("=", "_")
        train_tiny(folders[name], *settings, name)
    by_hand, by_size, auto, plain = (
        weights(folders[name])
        for name in (
            "trainer.accumulate_grad_batches=4",
            "data.microbatch_size=16",
            "data.microbatch_size=auto",
            "seed=0",
        )
    )
    assert_equal_bits(by_hand, by_size)
    assert_equal_bits(auto, plain)
    resumed = folders["data.microbatch_size=16"]
    train_tiny(resumed, *settings, "data.microbatch_size=auto", f"resume='{resumed}'", "trainer.max_steps=6")
    saved = read_checkpoint(resumed / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 6 and saved["hyper_parameters"]["trainer"]["accumulate_grad_batches"] == 4
    with pytest.raises(UsageError, match=r"accumulate_grad_batches|microbatch_size"):
        train_tiny(resumed, *settings, "data.microbatch_size=32", f"resume='{resumed}'", "trainer.max_steps=8")


@pytest.mark.parametrize(("limit", "expected"), [(1000, 16), (10, 8), (1, 1)])
def test_auto_finds_the_largest_microbatch(tmp_path, monkeypatch, limit, expected):
    """With a network that takes at most `limit` samples at once, also in sampling and validation."""
    forward = UNet.forward

    def limited(net: UNet, x: Tensor, *rest: Tensor) -> Tensor:
        if len(x) > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return forward(net, x, *rest)

    monkeypatch.setattr(UNet, "forward", limited)
    settings = ["data.microbatch_size=auto", "trainer.max_steps=1", "validate_every=1", "logger=none"]
    train_tiny(tmp_path / "run", *settings, "data.batch_size=16", "trainer.limit_val_batches=2")
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert saved["hyper_parameters"]["trainer"]["accumulate_grad_batches"] == 16 // expected


LIMITED = """
import json, re, resource, sys, torch
from pathlib import Path
from src.training.checkpoints import read_checkpoint
from src.errors import UsageError
from src.train import train
from src.sample import sample
import src.runs.build, src.training.memory, src.runs.out_of_memory, src.viz.distributions, src.viz.line_plots
import src.training.callbacks.nan_guard, src.data.images, src.models.unet
import torch._subclasses.fake_tensor, torch.distributed._tools.mem_tracker
from tests.conftest import compose

def message(work):
    try:
        work()
    except UsageError as error:
        return str(error)

def run(folder, *settings):
    plain = ["trainer.accelerator=cpu", "trainer.max_steps=2", "validate_every=2", "sampler.steps=2", "logger=none"]
    quiet = ["callbacks.progress.refresh_rate=0", "data.batch_size=1024", "~callbacks.samples"]
    train(compose("train", *plain, *quiet, f"run_dir='{folder}'", *settings))

here = Path(sys.argv[1])
torch.ones(1, requires_grad=True).sum().backward()  # starts the autograd threads, which take memory once
used = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20, resource.RLIM_INFINITY))
auto = message(lambda: run(here / "auto", "data.microbatch_size=auto"))
full = message(lambda: run(here / "whole"))
batches = read_checkpoint(here / "auto" / "checkpoints" / "last.ckpt")["hyper_parameters"]["trainer"]
many = ["sampler.steps=2", "n=9000", "batch_size=9000", "device=cpu"]
sampled = message(lambda: sample(compose("sample", f"run='{here / 'auto'}'", f"run_dir='{here / 'drawn'}'", *many)))
print(json.dumps([full, auto, batches["accumulate_grad_batches"], sampled]))
"""


@pytest.mark.faults
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_out_of_memory_names_the_settings_to_change(tmp_path):
    """In a process limited to 400 MiB beyond its imports, where allocations really fail."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        env=environment(),
        text=True,
        capture_output=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    full, auto, batches, sampled = json.loads(done.stdout.splitlines()[-1])
    assert "\n" not in full and re.search(
        r"0\.\d+ GiB.*data\.microbatch_size=auto.*trainer\.precision=bf16-mixed", full
    ), full
    assert auto is None
    assert 1 < batches < 64 and 1024 % batches == 0
    assert re.search(r"batch_size.9000 .*batch_size=4500", sampled)
