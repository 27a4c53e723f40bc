"""Optimal transport between the samples and the noise of a batch: data.coupling=ot."""

import functools
import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from src.diffusion import curves, losses, samplers
from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.noise import ContinuousSchedule
from src.diffusion.timestep_samplers import stratified
from src.rng import StepRng
from tests.conftest import TINY, compose
from tests.loops import for_each


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global DiffusionModule, Sampler, assign, build, coupled_noise
    from src.runs.build import build
    from src.training.coupling import assign, coupled_noise
    from src.training.module import DiffusionModule
    from src.training.sampling import Sampler


def best_permutation(x0: torch.Tensor, eps: torch.Tensor) -> list[int]:
    """Return the permutation with the least sum of squared distances among all of them."""

    def cost(order: tuple[int, ...]) -> float:
        return (x0 - eps[list(order)]).double().square().sum().item()

    return list(min(itertools.permutations(range(len(x0))), key=cost))


def rng_of(start: int, count: int, step: int = 0) -> StepRng:
    return StepRng(0, step, start, count, torch.device("cpu"))


@for_each("count, shape", [(1, (2,)), (2, (1,)), (5, (2,)), (6, (3, 2, 2))])
def test_assignment_is_the_best_of_all_permutations(count, shape):
    for seed in range(5):
        x0, eps = torch.randn(2, count, *shape, generator=torch.Generator().manual_seed(seed))
        assert assign(3 * x0 + 1, eps).tolist() == best_permutation(3 * x0 + 1, eps)


def test_assignment_of_numbers_keeps_their_order():
    """In one dimension optimal transport is monotone."""
    x0, eps = torch.randn(2, 100, 1, generator=torch.Generator().manual_seed(0))
    assigned = eps[assign(x0, eps)]
    assert torch.equal(x0.flatten().argsort(), assigned.flatten().argsort())


@for_each("dtype", [torch.bfloat16, torch.float16])
def test_assignment_does_not_depend_on_the_precision(dtype):
    x0, eps = torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype):
        assigned = assign(1e3 * x0, eps)
    assert torch.equal(assigned, assign(1e3 * x0, eps))


def test_coupled_noise_permutes_the_independent_noise():
    x0 = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    for start in (0, 6, 40):  # of a micro-batch
        independent = rng_of(start, 6).normal("eps", (2,))
        assert torch.equal(coupled_noise(x0, rng_of(start, 6)), independent[best_permutation(x0, independent)])


def module_of(coupling: str, net: nn.Module) -> "DiffusionModule":
    return DiffusionModule(
        net,
        ContinuousSchedule(functools.partial(curves.rectified_flow, start=1e-4)),
        GaussianDiffusion("velocity"),
        functools.partial(losses.simple, weighting=losses.uniform_weighting),
        stratified,
        Sampler(samplers.heun, 2, "trailing"),
        shape=(2,),
        coupling=coupling,
    )


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.cat([x, time[:, None]], dim=1))


@for_each("coupling", ["independent", "ot"])
def test_gradient_is_that_of_the_velocity_of_the_pairs(coupling):
    torch.manual_seed(0)
    module = module_of(coupling, Linear())
    x0 = torch.randn(6, 2)
    module.training_step({"x": x0, "start": 0, "total": 6}, 0)["loss"].backward()

    eps = rng_of(0, 6).normal("eps", (2,))
    if coupling == "ot":
        eps = eps[best_permutation(x0, eps)]
    v = (rng_of(0, 6).shared("t") + torch.arange(6) / 6) % 1
    u = (1e-4 + (1 - 1e-4) * v)[:, None]
    inputs = torch.cat([(1 - u) * x0 + u * eps, v[:, None], torch.ones(6, 1)], dim=1)
    weights = torch.cat([module.net.linear.weight, module.net.linear.bias[:, None]], dim=1).detach()
    residual = inputs @ weights.T - (eps - x0)
    gradient = 2 * residual.T @ inputs / residual.numel()
    assert_close(module.net.linear.weight.grad, gradient[:, :3], rtol=1e-4, atol=1e-5)
    assert_close(module.net.linear.bias.grad, gradient[:, 3], rtol=1e-4, atol=1e-5)


OT = ["data=points", "data.coupling=ot", "schedule=rectified_flow", "sampler=heun", "run_dir=unused"]


@for_each(
    "override, named",
    {
        "schedule": ("schedule=cosine", "schedule=rectified_flow"),
        "bound": ("loss=vlb", "loss=simple"),
        "condition": ("conditioning=class", "conditioning=null"),
        "sampler": ("sampler=ancestral", "sampler=heun"),
        "eta": ("sampler=euler_ancestral", "sampler=ddim"),
        "churn": ("sampler.s_churn=10", "sampler.s_churn"),
        "microbatch": ("data.microbatch_size=auto", "data.microbatch_size"),
        "augmentation": ("data=cifar10 data.edm_augment=0.1 model=unet_tiny", "data.edm_augment=0"),
    },
)
def test_refuses_what_needs_independent_noise(override, named):
    with pytest.raises(ValueError, match=r"data\.coupling=ot") as refused:
        build(compose("train", *OT, *override.split()))
    assert named in str(refused.value)


def test_run_has_a_likelihood_by_the_flow_only(tmp_path):
    """Neither training nor evaluation reports the bound, and a sampler that adds noise is refused."""
    from src.errors import UsageError
    from src.evaluate import evaluate
    from src.train import train

    tiny = [override for override in TINY if not override.startswith(("model.", "diffusion."))]
    words = ["data.num_samples=200", "data.batch_size=20", "trainer.max_steps=2", f"run_dir={tmp_path / 'run'}"]
    metrics = train(compose("train", *OT[:-1], *tiny, *words))
    assert "val/loss" in metrics and "val/bits_per_dim" not in metrics
    settings = [f"run={tmp_path / 'run'}", "quality=false", "num_val=3", f"run_dir={tmp_path / 'out'}", "device=cpu"]
    evaluated = evaluate(compose("evaluate", *settings, "ode=true", "ode_tolerance=1e-2"))
    assert evaluated["flow_bits_per_dim"] > 0 and "bits_per_dim" not in evaluated
    with pytest.raises(UsageError, match="deterministic"):
        evaluate(compose("evaluate", *settings, "sampler=ancestral"))
