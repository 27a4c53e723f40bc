"""The LightningModule: a learned schedule trained with the network, and a compiled network."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from src.diffusion import curves, losses, samplers
from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.noise import ContinuousSchedule, NoiseLevel, Transition, make_time_grid
from src.diffusion.timestep_samplers import stratified, uniform


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global LearnedScheduleModule, Sampler, warmup
    from src.training.learned_schedule import LearnedScheduleModule
    from src.training.optim import warmup
    from src.training.sampling import Sampler


STD = 0.1


class Ideal(nn.Module):
    """E[x_0 | x_t] for x_0 ~ N(0, STD^2), times `factor`."""

    def __init__(self, curve: curves.Learned) -> None:
        super().__init__()
        self.curve = [curve]  # in a list, so that it is not a submodule
        self.factor = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        with torch.no_grad():
            alpha, sigma = (field[:, None] for field in self.curve[0](time))
        return self.factor * alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * x


def learned_module(timestep_sampler=uniform) -> LearnedScheduleModule:
    schedule = ContinuousSchedule(curves.Learned(width=16), 100)
    diffusion = GaussianDiffusion("x0", decoder_scale=schedule.decoder_scale)
    return LearnedScheduleModule(
        Ideal(schedule.curve),
        schedule,
        diffusion,
        losses.vlb,
        timestep_sampler,
        Sampler(samplers.ddim, 2, "trailing"),
        shape=(2,),
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.5),
        lr_scheduler=functools.partial(warmup, warmup_steps=0),
    )


def batch(step: int, size: int = 64) -> dict[str, Tensor | int]:
    x = STD * torch.randn(size, 2, generator=torch.Generator().manual_seed(step))
    return {"x": x, "start": 0, "total": size}


def test_network_descends_the_loss_and_schedule_its_square():
    """One backward pass gives each the gradient that autograd computes for its own loss.

    In the schedule's loss, the cleanest of the 100 steps is constant.
    """
    module = learned_module()
    module.net.factor.data.fill_(1.5)  # at the optimum only rounding would remain
    out = module.training_step(batch(0), 0)
    out["loss"].backward()
    ours = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()

    x0, rng = batch(0)["x"], module.step_rng(batch(0), 0)
    transition, eps = module.schedule.transition(rng.uniform("t"), x0), rng.normal("eps", x0.shape[1:])

    def loss_of(transition: Transition) -> Tensor:
        return losses.vlb(module.diffusion, module.denoise, x0, transition, eps)["loss"]

    loss = loss_of(transition)
    assert_close(out["terms"]["loss"], loss.detach(), rtol=0, atol=0)
    ends = (NoiseLevel(*(torch.where(a.time > 0.015, x, x.detach()) for x in a)) for a in (transition.t, transition.s))
    squared = loss_of(Transition(*ends, 100)).square()
    for parameters, value in ((module.weights, loss.mean()), (module.curve_weights, squared.mean())):
        expected = torch.autograd.grad(value, parameters, retain_graph=True)
        got = [g for p, g in zip(module.parameters(), ours, strict=True) if any(p is q for q in parameters)]
        assert_close(got, list(expected), rtol=1e-3, atol=1e-6)
    assert len(module.weights) + len(module.curve_weights) == len(ours)


@pytest.mark.parametrize("large", ["weights", "curve_weights"])
def test_schedule_and_network_are_clipped_apart(large, monkeypatch):
    """The norm of each is at most 1, and a small gradient stays, however large the other is."""
    module = learned_module()
    logged = {}
    monkeypatch.setattr(module, "_is_logged", lambda step: True)
    monkeypatch.setattr(module, "log", lambda name, value: logged.update({name: value.item()}))
    small = "curve_weights" if large == "weights" else "weights"
    for parts, scale in ((large, 1e6), (small, 1e-3)):
        for p in getattr(module, parts):
            p.grad = torch.full_like(p, scale)
    optimizer, _ = module.prepare_optimizer(10)
    module.configure_gradient_clipping(optimizer, 1.0)
    assert torch.cat([p.grad.flatten() for p in getattr(module, large)]).norm().item() == pytest.approx(1, abs=1e-4)
    assert all((p.grad == 1e-3).all() for p in getattr(module, small))
    norm = math.sqrt(sum(p.numel() for p in module.weights)) * (1e6 if large == "weights" else 1e-3)
    assert logged["train/grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_weight_decay_does_not_apply_to_the_schedule():
    """With zero gradients the network shrinks by lr times weight_decay, and the schedule stays."""
    module = learned_module()
    before = [p.detach().clone() for p in module.curve_weights]
    optimizer, _ = module.prepare_optimizer(10)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_close(list(module.curve_weights), before, rtol=0, atol=0)
    assert module.net.factor.item() == pytest.approx(1 - 1e-2 * 0.5)


def test_learned_schedule_lowers_the_variance_of_the_bound():
    """With the ideal network and fresh data, the variance of the KL terms falls and their mean stays."""
    module = learned_module(stratified)
    optimizer = torch.optim.Adam(module.curve_weights, lr=2e-2)

    def moments() -> tuple[float, float]:
        with torch.no_grad():
            outs = [module.training_step(batch(k, 1024), 0) for k in range(1000, 1010)]
        # The decoder's term, 1 of 100, does not depend on the schedule.
        loss = torch.cat([out["terms"]["loss"][out["v"] > 0.01] for out in outs])
        return loss.mean().item(), loss.std().item()

    mean, std = moments()
    with pytest.MonkeyPatch.context() as patch:
        for step in range(400):
            patch.setattr(LearnedScheduleModule, "global_step", step)
            optimizer.zero_grad()
            module.training_step(batch(step), 0)["loss"].backward()
            optimizer.step()
    new_mean, new_std = moments()
    assert new_std < 0.75 * std
    assert new_mean == pytest.approx(mean, abs=0.1 * abs(mean) + 0.1)


@torch.no_grad()
def test_compiled_outputs_are_copied_and_batches_padded():
    """CUDA graphs overwrite each output by the next."""
    module, memory, sizes = learned_module(), torch.zeros(3, 2), []
    x = batch(0, 7)["x"]
    t = make_time_grid(module.schedule, 4, "trailing")[1]
    plain = module.denoise_for_sampling(x, t, microbatch_size=3)

    def replay(x, time):
        sizes.append(len(x))
        return memory.copy_(module.net(x, time))

    module.compiled_sampling = replay
    assert torch.equal(module.denoise_for_sampling(x, t, microbatch_size=3), plain)
    assert sizes == [3, 3, 3]
