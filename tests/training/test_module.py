"""The module: how a learned curve is trained beside the network, how a compiled network is called."""

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
    """Import what takes seconds here, since every collection of the tests would pay for it above."""
    global DiffusionModule, Sampler, warmup
    from src.training.module import DiffusionModule, Sampler
    from src.training.optim import warmup


DEVIATION = 0.1


class Ideal(nn.Module):
    """E[x_0 | x_t] for x_0 ~ N(0, DEVIATION^2), times `factor`."""

    def __init__(self, curve: curves.Learned) -> None:
        super().__init__()
        self.curve = [curve]  # in a list, so that it is not a part of this
        self.factor = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        with torch.no_grad():
            alpha, sigma = (field[:, None] for field in self.curve[0](time))
        return self.factor * alpha * DEVIATION**2 / ((alpha * DEVIATION) ** 2 + sigma**2) * x


def learning(timestep_sampler=uniform) -> DiffusionModule:
    schedule = ContinuousSchedule(curves.Learned(width=16), 100)
    diffusion = GaussianDiffusion("x0", decoder_scale=schedule.decoder_scale)
    return DiffusionModule(
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
    x = DEVIATION * torch.randn(size, 2, generator=torch.Generator().manual_seed(step))
    return {"x": x, "start": 0, "total": size}


def test_network_descends_the_loss_and_the_curve_its_square():
    """One backward pass gives each the gradient that plain autograd gives of its own objective.

    In which the curve's cleanest row, of 100, is a constant.
    """
    module = learning()
    module.net.factor.data.fill_(1.5)  # at the optimum nothing but rounding would be left
    _, terms = module._train_terms(batch(0), 0)
    terms["loss"].mean().backward()
    ours = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()

    x0, rng = module._step_rng(batch(0), 0)
    transition = module.schedule.transition(rng.uniform("t"), x0)
    loss = losses.vlb(module.diffusion, module.denoise, x0, transition, rng.normal("eps", x0.shape[1:]))["loss"]
    assert_close(terms["loss"], loss, rtol=0, atol=0)
    ends = (NoiseLevel(*(torch.where(a.time > 0.015, x, x.detach()) for x in a)) for a in (transition.t, transition.s))
    held = losses.vlb(module.diffusion, module.denoise, x0, Transition(*ends, 100), rng.normal("eps", x0.shape[1:]))[
        "loss"
    ]
    for parameters, loss_fn in ((module.weights, loss.mean()), (module.curve_weights, held.square().mean())):
        expected = torch.autograd.grad(loss_fn, parameters, retain_graph=True)
        got = [g for p, g in zip(module.parameters(), ours, strict=True) if any(p is q for q in parameters)]
        assert_close(got, list(expected), rtol=1e-3, atol=1e-6)
    assert len(module.weights) + len(module.curve_weights) == len(ours)


@pytest.mark.parametrize("large", ["weights", "curve_weights"])
def test_curve_and_network_are_clipped_apart(large, monkeypatch):
    """The norm of each is 1 at most, and the smaller gradient stays as it is, however large the other."""
    module = learning()
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
    count = sum(p.numel() for p in module.weights)
    assert logged["train/grad_norm"] == pytest.approx(
        math.sqrt(count) * (1e6 if large == "weights" else 1e-3), rel=1e-4
    )


def test_decay_does_not_pull_on_the_curve():
    """With gradients of 0 the network shrinks by lr times weight_decay, and the curve stays."""
    module = learning()
    before = [p.detach().clone() for p in module.curve_weights]
    optimizer, _ = module.prepare_optimizer(10)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_close(list(module.curve_weights), before, rtol=0, atol=0)
    assert module.net.factor.item() == pytest.approx(1 - 1e-2 * 0.5)


def test_learned_curve_makes_the_bound_vary_less():
    """With the ideal network, on fresh data: the divergences' variance falls, their mean stays the same."""
    module = learning(stratified)
    optimizer = torch.optim.Adam(module.curve_weights, lr=2e-2)

    def moments() -> tuple[float, float]:
        with torch.no_grad():
            drawn = [module._train_terms(batch(k, 1024), k) for k in range(1000, 1010)]
        # The decoder's link, 1 of 100, is what it is whatever the curve.
        loss = torch.cat([terms["loss"][v > 0.01] for v, terms in drawn])
        return loss.mean().item(), loss.std().item()

    mean, std = moments()
    for step in range(400):
        optimizer.zero_grad()
        module._train_terms(batch(step), step)[1]["loss"].mean().backward()
        optimizer.step()
    new_mean, new_deviation = moments()
    assert new_deviation < 0.75 * std
    assert new_mean == pytest.approx(mean, abs=0.1 * abs(mean) + 0.1)


@torch.no_grad()
def test_what_a_compiled_network_puts_out_is_kept_and_its_batches_are_of_one_size():
    """CUDA graphs write each output over the last one."""
    module, memory, sizes = learning(), torch.zeros(3, 2), []
    x = batch(0, 7)["x"]
    t = make_time_grid(module.schedule, 4, "trailing")[1]
    plain = module.denoise_for_sampling(x, t, microbatch_size=3)

    def replay(x, time):
        sizes.append(len(x))
        return memory.copy_(module.net(x, time))

    module.compiled_sampling = replay
    assert torch.equal(module.denoise_for_sampling(x, t, microbatch_size=3), plain)
    assert sizes == [3, 3, 3]
