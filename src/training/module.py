"""The LightningModule that trains a diffusion model."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from src.data.batches import Batch
from src.data.samplers import VALIDATION
from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.losses import Denoise
from src.diffusion.noise import CLEAN, Schedule, Transition
from src.diffusion.timestep_samplers import ImportanceSampler, TimestepSampler, stratified
from src.distributed.sharding import shard, unsharded
from src.rng import StepRng
from src.training.callbacks.importance import ImportanceUpdate
from src.training.callbacks.resume import ResumeTraining
from src.training.callbacks.schedule_free import ScheduleFreeAverage, adamw_schedule_free
from src.training.callbacks.seeding import SeedDropout
from src.training.finetuning import group_by_multiplier
from src.training.lightning_internals import clear_logged_metrics
from src.training.optim import keep_current_settings, skip_unless, trial_state, weight_matrices
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


class DiffusionModule(SamplingModule):
    """Train `net` to predict the target of the diffusion process at random noise levels, and sample from it.

    `optimizer` maps parameter groups to an optimizer; `lr_scheduler` maps an optimizer and the number of steps to a
    learning-rate schedule. `lr_multipliers` maps patterns of names in `net` to factors of the learning rate.
    With `decay_matrices_only`, weight decay spares all but the `weight_matrices` of `net`. Parameters without
    `requires_grad` are not trained.
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
    ) -> None:
        super().__init__(net, schedule, diffusion, sampler, shape, conditioning)
        self.loss_fn = loss_fn
        self.timestep_sampler = timestep_sampler
        self.seed = seed
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        is_schedule_free = getattr(optimizer, "func", None) is adamw_schedule_free
        self.averages = [ScheduleFreeAverage()] if is_schedule_free else []  # one for fit and the last validation
        self.lr_multipliers = lr_multipliers or {}
        self.decay_matrices_only = decay_matrices_only
        self.curve_weights: tuple[nn.Parameter, ...] = ()
        """The parameters of a learned schedule; see `LearnedScheduleModule`."""
        self.find_weights()
        terms = self.check_loss()
        self.estimates_bound = "vlb" in terms
        self.validation = nn.ModuleDict({name: MeanMetric() for name in terms})
        self.validated = 0  # the step at which the last validation ended
        self.grad_norm = torch.zeros(())
        """Gradient norm of the last step before clipping; not finite if the step was skipped."""

    def configure_callbacks(self) -> list[L.Callback]:
        importance = isinstance(self.timestep_sampler, ImportanceSampler)
        return [SeedDropout(), ResumeTraining(), *([ImportanceUpdate()] if importance else []), *self.averages]

    def configure_model(self) -> None:
        """Shard the network if the strategy shards weights."""
        if self.device_mesh is not None:
            shard(self.net, self.device_mesh["data_parallel"])
            self.find_weights()

    def find_weights(self) -> None:
        """Cache the trained parameters: collecting them takes a millisecond, too long for every step."""
        self.weights = tuple(p for p in self.parameters() if p.requires_grad)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Return the loss of one batch. Source: Ho et al. 2020 (arXiv 2006.11239), algorithm 1.

        For callbacks and logging it also returns v (B,), the time in [0, 1), the weights (B,) and the terms, each (B,).
        """
        rng = self.step_rng(batch, self.global_step)
        x0, cond = batch["x"], self.drop_condition(batch, rng)
        v, weight = self.timestep_sampler(rng.uniform("t"), rng.shared("t"), batch_positions(batch))
        t, eps = self.transition(v, x0), rng.normal("eps", x0.shape[1:])
        terms = self.compute_losses(x0, t, eps, cond, batch.get("augment"))
        loss = (weight * terms["loss"]).mean()
        return {"loss": loss, "v": v, "weight": weight, "terms": {name: x.detach() for name, x in terms.items()}}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        rng = self.step_rng(batch, VALIDATION)
        x0, cond = batch["x"], None if self.null is None else batch["cond"]
        v, _ = stratified(rng.uniform("t"), rng.shared("t"), batch_positions(batch))
        t, eps = self.transition(v, x0), rng.normal("eps", x0.shape[1:])
        for name, values in self.compute_losses(x0, t, eps, cond).items():
            metric = cast(MeanMetric, self.validation[name])
            metric.update(values)
            self.log(f"val/{name}", metric, prog_bar=name == "loss", on_step=False, on_epoch=True)

    def step_rng(self, batch: Batch, step: int) -> StepRng:
        """Return the random numbers keyed by step and position in the global batch."""
        x0 = batch["x"]
        return StepRng(self.seed, step, batch["start"], len(x0), x0.device)

    def drop_condition(self, batch: Batch, rng: StepRng) -> Tensor | None:
        """Return the conditions (B, ...), each replaced by the null condition with probability `cond_drop_prob`."""
        if self.null is None:
            return None
        cond = batch["cond"]
        if not self.cond_drop_prob:
            return cond
        dropped = rng.uniform("drop") < self.cond_drop_prob
        return torch.where(dropped.view(-1, *[1] * (cond.ndim - 1)), self.null, cond)

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

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self._is_logged(self.global_step):
            clear_logged_metrics(self.trainer)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self._is_logged(self.global_step):
            for name, values in outputs["terms"].items():
                self.log(f"train/{name}", (outputs["weight"] * values).mean())

    def _is_logged(self, num_steps: int) -> bool:
        """Return whether the last of `num_steps` steps is logged; each `self.log` call takes half a millisecond."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return num_steps % every == 0

    @property
    def validation_period(self) -> float:
        return self.trainer.val_check_interval / self.trainer.accumulate_grad_batches

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self.prepare_optimizer(self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}

    def prepare_optimizer(self, num_steps: int) -> tuple[Optimizer, LRScheduler]:
        """Return a new optimizer of the weights and its learning-rate schedule over `num_steps`."""
        if self.make_optimizer is None or self.make_lr_scheduler is None:
            raise RuntimeError("this module was built without an optimizer: it can sample but not train")
        optimizer = self.make_optimizer(self.parameter_groups())
        for group in optimizer.param_groups:
            group["lr"] *= group.pop("lr_multiplier", 1.0)
            group.pop("matrices", None)
        optimizer.register_load_state_dict_pre_hook(keep_current_settings)
        return optimizer, self.make_lr_scheduler(optimizer, num_steps)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the groups for the optimizer; "lr_multiplier" and "matrices" are removed after its construction."""
        matrices = weight_matrices(self.net)
        groups = [(1.0, list(self.weights))]
        if self.lr_multipliers:
            trained = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
            groups = group_by_multiplier(trained, self.lr_multipliers)
        result: list[dict[str, Any]] = []
        for factor, parameters in groups:
            decayed = [p for p in parameters if not self.decay_matrices_only or p in matrices]
            spared = [p for p in parameters if self.decay_matrices_only and p not in matrices]
            result.append({"params": decayed, "lr_multiplier": factor, "matrices": matrices})
            result.append({"params": spared, "lr_multiplier": factor, "weight_decay": 0.0})
        return [group for group in result if group["params"]]

    def optimizer_state(self) -> set[str]:
        """Return the names of the values that the optimizer keeps for each weight, from a step on a small weight."""
        assert self.make_optimizer is not None
        return set(trial_state(self.make_optimizer, 2))

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by total norm or by value, log the norm, and skip the step if the norm is not finite.

        Lightning's clipping rejects fused optimizers, the fastest ones.
        """
        by_value = gradient_clip_algorithm == "value"
        norm = self.clip_grad_norm(math.inf if by_value or not gradient_clip_val else gradient_clip_val)
        if by_value and gradient_clip_val:
            nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
        self.grad_norm = norm.detach()
        skip_unless(norm.isfinite(), optimizer)

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Clip the gradient and return its norm () before clipping."""
        norm = unsharded(nn.utils.clip_grad_norm_(self.weights, max_norm))
        if self._is_logged(self.global_step + 1):
            self.log("train/grad_norm", norm)
        return norm

    def check_loss(self) -> dict[str, Tensor]:
        """Return the terms (1,) of a constant output at the noisiest level, so that bad settings fail early."""
        x = torch.zeros(1, *self.shape)
        transition = self.schedule.transition(torch.ones(1) - 2**-24, x)
        ones = torch.ones(1, self.diffusion.outputs * self.shape[0], *self.shape[1:])
        return self.loss_fn(self.diffusion, lambda x, _: ones, x, transition, x)


def batch_positions(batch: Batch) -> Tensor:
    """Return each sample's position in the global batch divided by its size, (B,) in [0, 1)."""
    x0 = batch["x"]
    # float32 even if the default type has lower precision
    return (batch["start"] + torch.arange(len(x0), device=x0.device, dtype=torch.float32)) / batch["total"]
