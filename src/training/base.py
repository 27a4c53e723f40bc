"""The base class of the LightningModules: optimizer, clipping, logging, and what the callbacks read."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from src.data.batches import Batch
from src.distributed.sharding import shard, unsharded
from src.rng import StepRng
from src.training.callbacks.resume import ResumeTraining
from src.training.callbacks.schedule_free import ScheduleFreeAverage, adamw_schedule_free
from src.training.callbacks.seeding import SeedDropout
from src.training.finetuning import group_by_multiplier
from src.training.lightning_internals import clear_logged_metrics
from src.training.optim import keep_current_settings, skip_unless, weight_matrices


class TrainingModule(L.LightningModule):
    """Train the network `net` of samples of `shape`.

    A subclass calls `prepare_training` at the end of its constructor. Its `training_step` returns "loss" () and
    "terms", each (B,), with the term "loss"; "weight" (B,) scales the logged terms, and the rest is for callbacks.
    """

    net: nn.Module
    shape: tuple[int, ...]
    compiled_training: Callable[..., Any] | None
    """The compiled network for calls with gradients; validation batches differ in size."""

    def prepare_training(
        self,
        terms: Iterable[str],
        seed: int,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None,
        lr_scheduler: Callable[[Optimizer, int], LRScheduler] | None,
        lr_multipliers: Mapping[str, float] | None,
        decay_matrices_only: bool,
    ) -> None:
        """Store the settings of training; `terms` are the names of the validation metrics.

        `optimizer` maps parameter groups to an optimizer; `lr_scheduler` maps an optimizer and the number of steps to a
        learning-rate schedule. `lr_multipliers` maps patterns of names in `net` to factors of the learning rate.
        With `decay_matrices_only`, weight decay spares all but the `weight_matrices` of `net`. Parameters without
        `requires_grad` are not trained.
        """
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
        self.validation = nn.ModuleDict({name: MeanMetric() for name in terms})
        self.validated = 0  # the step at which the last validation ended
        self.grad_norm = torch.zeros(())
        """Gradient norm of the last step before clipping; not finite if the step was skipped."""

    def configure_callbacks(self) -> list[L.Callback]:
        return [SeedDropout(), ResumeTraining(), *self.averages]

    def configure_model(self) -> None:
        """Shard the network if the strategy shards weights."""
        if self.device_mesh is not None:
            shard(self.net, self.device_mesh["data_parallel"])
            self.find_weights()

    def find_weights(self) -> None:
        """Cache the trained parameters: collecting them takes a millisecond, too long for every step."""
        self.weights = tuple(p for p in self.parameters() if p.requires_grad)

    def step_rng(self, batch: Batch, step: int) -> StepRng:
        """Return the random numbers keyed by step and position in the global batch."""
        x0 = batch["x"]
        return StepRng(self.seed, step, batch["start"], len(x0), x0.device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self._is_logged(self.global_step):
            clear_logged_metrics(self.trainer)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self._is_logged(self.global_step):
            for name, values in outputs["terms"].items():
                self.log(f"train/{name}", (outputs.get("weight", 1.0) * values).mean())

    def log_validation(self, terms: Mapping[str, Tensor]) -> None:
        """Log the mean of each term (B,) over all validation samples."""
        for name, values in terms.items():
            metric = cast(MeanMetric, self.validation[name])
            metric.update(values)
            self.log(f"val/{name}", metric, prog_bar=name == "loss", on_step=False, on_epoch=True)

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Number the weights of optimizer states as in the module, not as in the groups: sharded runs expect it."""
        numbers = {p: k for k, p in enumerate(self.parameters())}
        for optimizer, saved in zip(self.trainer.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            groups = saved.get("param_groups", ())  # only the first process holds sharded state
            renamed: dict[int, int] = {}
            for group, own in zip(groups, optimizer.param_groups, strict=False):
                renamed |= zip(group["params"], (numbers[p] for p in own["params"]), strict=True)
                group["params"] = [renamed[k] for k in group["params"]]
            saved["state"] = {renamed[k]: values for k, values in saved.get("state", {}).items()}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the groups for the optimizer; "lr_multiplier" and "matrices" are removed after its construction."""
        matrices, hidden = weight_matrices(self.net), self.hidden_matrices()
        groups = [(1.0, list(self.weights))]
        if self.lr_multipliers:
            trained = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
            groups = group_by_multiplier(trained, self.lr_multipliers)
        result: list[dict[str, Any]] = []
        for factor, parameters in groups:
            decayed = [p for p in parameters if not self.decay_matrices_only or p in matrices]
            spared = [p for p in parameters if self.decay_matrices_only and p not in matrices]
            result.append({"params": decayed, "lr_multiplier": factor, "matrices": hidden})
            result.append({"params": spared, "lr_multiplier": factor, "matrices": {}, "weight_decay": 0.0})
        return [group for group in result if group["params"]]

    def hidden_matrices(self) -> dict[nn.Parameter, str]:
        """Return the `weight_matrices` that an optimizer of hidden layers may update, and their names."""
        return weight_matrices(self.net)

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
