"""The LightningModule that trains a diffusion model."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from src.data.batches import Batch
from src.data.module import Coupling
from src.data.samplers import VALIDATION
from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.losses import Denoise
from src.diffusion.noise import CLEAN, Schedule, Transition, per_sample
from src.diffusion.timestep_samplers import ImportanceSampler, TimestepSampler, stratified
from src.rng import StepRng
from src.training.base import TrainingModule
from src.training.callbacks.importance import ImportanceUpdate
from src.training.coupling import check_coupling, coupled_noise
from src.training.sampling import ConditionSpec, Sampler, SamplingModule

__all__ = ["ConditionSpec", "DiffusionModule", "LossFn", "Sampler"]


class LossFn(Protocol):
    """Return per-sample terms, each (B,), including "loss".

    A loss with a term "vlb" estimates the variational bound and receives transitions between neighboring steps. Any
    other loss receives the transition from the sampled noise level to clean data; on a continuous schedule, that level
    can be anywhere.
    """

    def __call__(
        self, diffusion: GaussianDiffusion, denoise: Denoise, x0: Tensor, transition: Transition, eps: Tensor
    ) -> dict[str, Tensor]: ...


class DiffusionModule(SamplingModule, TrainingModule):
    """Train `net` to predict the target of the diffusion process at random noise levels, and sample from it.

    `TrainingModule.prepare_training` describes `optimizer`, `lr_scheduler`, `lr_multipliers` and
    `decay_matrices_only`. `coupling` "ot" assigns the noise to the samples of a batch.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        diffusion: GaussianDiffusion,
        loss_fn: LossFn,
        timestep_sampler: TimestepSampler,
        sampler: Sampler,
        shape: Sequence[int],
        seed: int = 0,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
        conditioning: ConditionSpec | None = None,
        lr_multipliers: Mapping[str, float] | None = None,
        decay_matrices_only: bool = False,
        coupling: Coupling = "independent",
    ) -> None:
        super().__init__(net, schedule, diffusion, sampler, shape, conditioning, deterministic=coupling == "ot")
        self.loss_fn = loss_fn
        self.timestep_sampler = timestep_sampler
        terms = self.check_loss()
        self.estimates_bound = "vlb" in terms
        self.coupling: Coupling = coupling
        if coupling == "ot":
            check_coupling(schedule, conditioning is not None, self.estimates_bound)
        self.prepare_training(terms, seed, optimizer, lr_scheduler, lr_multipliers, decay_matrices_only)

    def configure_callbacks(self) -> list[L.Callback]:
        importance = isinstance(self.timestep_sampler, ImportanceSampler)
        return [*super().configure_callbacks(), *([ImportanceUpdate()] if importance else [])]

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Return the loss of one batch. Source: Ho et al. 2020 (arXiv 2006.11239), algorithm 1.

        For callbacks and logging it also returns v (B,), the time in [0, 1), the weights (B,) and the terms, each (B,).
        """
        rng = self.step_rng(batch, self.global_step)
        x0, cond = batch["x"], self.drop_condition(batch, rng)
        v, weight = self.timestep_sampler(rng.uniform("t"), rng.shared("t"), batch_positions(batch))
        t, eps = self.transition(v, x0), self.draw_noise(x0, rng)
        terms = self.compute_losses(x0, t, eps, cond, batch.get("augment"))
        loss = (weight * terms["loss"]).mean()
        return {"loss": loss, "v": v, "weight": weight, "terms": {name: x.detach() for name, x in terms.items()}}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        rng = self.step_rng(batch, VALIDATION)
        x0, cond = batch["x"], None if self.null is None else batch["cond"]
        v, _ = stratified(rng.uniform("t"), rng.shared("t"), batch_positions(batch))
        t, eps = self.transition(v, x0), self.draw_noise(x0, rng)
        self.log_validation(self.compute_losses(x0, t, eps, cond))

    def draw_noise(self, x0: Tensor, rng: StepRng) -> Tensor:
        """Return the noise (B, *data) of the samples x0 (B, *data)."""
        return rng.normal("eps", x0.shape[1:]) if self.coupling == "independent" else coupled_noise(x0, rng)

    def drop_condition(self, batch: Batch, rng: StepRng) -> Tensor | None:
        """Return the conditions (B, ...), each replaced by the null condition with probability `cond_drop_prob`."""
        if self.null is None:
            return None
        cond = batch["cond"]
        if not self.cond_drop_prob:
            return cond
        dropped = rng.uniform("drop") < self.cond_drop_prob
        return torch.where(per_sample(dropped, cond), self.null, cond)

    def transition(self, v: Tensor, like: Tensor) -> Transition:
        """Return the transition of the loss at v (B,) in [0, 1), broadcast to `like`; see `LossFn`."""
        if self.estimates_bound:
            return self.schedule.transition(v, like)
        return Transition(self.schedule.level_at(v, like), CLEAN, 1)

    def compute_losses(
        self, x0: Tensor, transition: Transition, eps: Tensor, cond: Tensor | None, augment: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the terms of the loss, given conditions (B, ...) and labels of augmentations (B, K), if any."""
        denoise = partial(self.denoise, cond=cond, augment=augment)
        return self.loss_fn(self.diffusion, denoise, x0, transition, eps)

    def check_loss(self) -> dict[str, Tensor]:
        """Return the terms (1,) of a constant output at the noisiest level, so that bad settings fail early."""
        x = torch.zeros(1, *self.shape)
        transition = self.schedule.transition(torch.ones(1) - 2**-24, x)
        ones = torch.ones(1, self.diffusion.outputs * self.shape[0], *self.shape[1:])
        return self.loss_fn(self.diffusion, lambda x, _: ones, x, transition, x)


def batch_positions(batch: Batch) -> Tensor:
    """Return each sample's position in the global batch, divided by the size of that batch, (B,) in [0, 1)."""
    x0 = batch["x"]
    # float32 even if the default type has lower precision
    return (batch["start"] + torch.arange(len(x0), device=x0.device, dtype=torch.float32)) / batch["total"]
