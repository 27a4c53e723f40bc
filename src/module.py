"""The LightningModule: network, noise schedule, process and objective put together."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from src.data.batch import Batch
from src.diffusion.losses import Denoise, uniform_timesteps
from src.diffusion.noise import Level, NoiseSchedule, Spacing
from src.diffusion.process import GaussianDiffusion
from src.diffusion.samplers import Noise, Predict, predictor
from src.draws import Draws, SampleNoise

VALIDATION = -1
"""The step that validation's draws belong to: always the same, so that equal weights give equal figures."""


class Objective(Protocol):
    """Per-sample terms, each (B,), "loss" among them."""

    def __call__(
        self, process: GaussianDiffusion, denoise: Denoise, x0: Tensor, t: Level, eps: Tensor
    ) -> dict[str, Tensor]: ...


class Walk(Protocol):
    """A sampler of `src.diffusion.samplers` with its own settings bound."""

    def __call__(
        self, process: GaussianDiffusion, predict: Predict, x: Tensor, grid: Sequence[Level], *, noise: Noise
    ) -> Iterator[Tensor]: ...


class Sampler(NamedTuple):
    """How to sample: the walk, and the grid of levels that it takes."""

    walk: Walk
    steps: int
    spacing: Spacing


class DiffusionModule(L.LightningModule):
    """Trains `net` to predict the process's target at random levels of the schedule, and samples from it.

    `shape` is that of one sample; `optimizer` takes parameters, `lr_scheduler` an optimizer and the number of
    steps. Raises ValueError for a schedule with zero terminal SNR and eps-prediction.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: NoiseSchedule,
        process: GaussianDiffusion,
        objective: Objective,
        sampler: Sampler,
        shape: Sequence[int],
        seed: int = 0,
        optimizer: Callable[[Iterator[nn.Parameter]], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer, int], LambdaLR] | None = None,
    ) -> None:
        super().__init__()
        if process.prediction == "eps" and schedule.terminal_alpha_bar == 0:
            raise ValueError(
                "zero_terminal_snr cannot go with process.prediction=eps: at zero SNR x_T is the noise itself, so "
                "predicting it teaches nothing and x_0 = (x_T - sigma eps) / alpha divides by 0; use v or x0"
            )
        self.net = net
        self.schedule = schedule
        self.process = process
        self.objective = objective
        self.sampler = sampler
        self.shape = tuple(shape)
        self.seed = seed
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        # Convolutions run fastest with channels last, here and on a GPU.
        self.memory_format = torch.channels_last if len(self.shape) == 3 else torch.contiguous_format
        self.weights = tuple(net.parameters())  # finding them anew costs a millisecond
        self.check_sampler(sampler)
        self.check_objective()
        self.val_loss = MeanMetric()
        self.val_mse = MeanMetric()

    def denoise(self, x: Tensor, t: Level) -> Tensor:
        """The network's output for x (B, *data) at a level, in float32 whatever the precision."""
        x = x.contiguous(memory_format=self.memory_format)
        out: Tensor = self.net(x, t.time.flatten().expand(len(x)))
        return out.float()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._loss(batch, self.global_step)["loss"].mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        terms = self._loss(batch, VALIDATION)
        self.val_loss.update(terms["loss"])
        self.val_mse.update(terms["mse"])
        self.log("val/loss", self.val_loss, prog_bar=True, on_step=False, on_epoch=True)
        self.log("val/mse", self.val_mse, on_step=False, on_epoch=True)

    def _loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The objective's terms at random levels; the draws belong to the step and the place in the batch."""
        x0 = batch["x"]
        draws = Draws(self.seed, step, batch["start"], len(x0), x0.device)
        t = uniform_timesteps(draws.uniform("t"), self.schedule.num_steps)
        eps = draws.normal("eps", x0.shape[1:])
        return self.objective(self.process, self.denoise, x0, self.schedule.level(t, x0), eps)

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self.prepare_optimizer(self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def prepare_optimizer(self, num_steps: int) -> tuple[Optimizer, LambdaLR]:
        """The optimizer of the network's weights and its learning-rate schedule over `num_steps`."""
        if self.make_optimizer is None or self.make_lr_scheduler is None:
            raise RuntimeError("this module was built without an optimizer: it can sample but not train")
        optimizer = self.make_optimizer(self.net.parameters())
        return optimizer, self.make_lr_scheduler(optimizer, num_steps)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by total norm, and log it. Lightning's own way refuses fused optimizers, which are the fast ones."""
        norm = nn.utils.clip_grad_norm_(self.weights, gradient_clip_val or math.inf)
        self.log("train/grad_norm", norm)

    def check_objective(self) -> dict[str, Tensor]:
        """The terms (1,) at the noisiest level for a wrong output, so that settings are refused before any work."""
        x = torch.zeros(1, *self.shape)
        level = self.schedule.level(torch.tensor([self.schedule.num_steps - 1]), x)
        return self.objective(self.process, lambda x, _: torch.ones_like(x), x, level, x)

    def check_sampler(self, sampler: Sampler) -> None:
        """Take one step on zeros, so that settings which the sampler refuses are refused before any work."""
        grid = self.schedule.grid(sampler.steps, sampler.spacing)
        x = torch.zeros(1, *self.shape, device=grid[0].sigma.device)
        next(sampler.walk(self.process, predictor(self.process, lambda x, _: x), x, grid, noise=torch.zeros_like))

    @torch.no_grad()
    def sample(self, indices: Sequence[int], seed: int, sampler: Sampler | None = None) -> Iterator[Tensor]:
        """Yield samples `indices` at every level from pure noise to data, each (N, *data) float32.

        Sample k depends on (seed, k) alone, not on what it is drawn together with.
        """
        walk, steps, spacing = sampler or self.sampler
        training = self.training
        self.eval()
        try:
            noise = SampleNoise(seed, indices, self.device)
            grid = self.schedule.grid(steps, spacing)
            x = grid[0].sigma * noise.draw(self.shape)
            yield x
            yield from walk(self.process, predictor(self.process, self.denoise), x, grid, noise=noise)
        finally:
            self.train(training)


def warmup(
    optimizer: Optimizer,
    num_steps: int,
    *,
    warmup_steps: int,
    decay: Literal["none", "linear", "cosine"] = "none",
) -> LambdaLR:
    """Raise the learning rate linearly over `warmup_steps`, then hold it or let it fall to 0 at `num_steps`."""
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}: 0 starts at the full rate")
    if decay not in ("none", "linear", "cosine"):
        raise ValueError(f"unknown decay {decay!r}: lr_scheduler.decay is none, linear or cosine")

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(warmup_steps, 1))
        left = 1 - step / max(num_steps, 1)
        fall = {"none": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[decay]
        return rise * fall

    return LambdaLR(optimizer, factor)
