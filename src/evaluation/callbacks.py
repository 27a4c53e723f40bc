"""Callbacks that evaluate the model during training."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from src.data.conditions import encode_conditions
from src.data.module import BaseDataModule
from src.distributed.processes import Processes
from src.errors import usage_errors
from src.evaluation.likelihood import bounds
from src.evaluation.quality import SampleEvaluator, estimate_seconds, log
from src.evaluation.reverse_variance import sum_errors
from src.evaluation.settings import QualitySettings, ReverseVariance, check_num_val
from src.training.callbacks.graceful_shutdown import check_stop_requested
from src.training.module import DiffusionModule, Sampler


class BitsPerDim(L.Callback):
    """Log `val/bits_per_dim`: an estimate of the bound with the averaged weights by `likelihood.bounds`.

    The first `num_samples` validation samples are used, with the decoder's term and `num_terms` others each, one
    network call per term; `optimal` doubles the calls. It runs at the end of training, or at every validation. The
    samples are divided equally among the processes; the remainder is dropped. It does nothing for a model with
    data.coupling=ot, whose noise the bound does not describe.
    """

    def __init__(
        self,
        num_samples: int = 512,
        num_terms: int = 4,
        reverse_variance: ReverseVariance = "optimal",
        every_validation: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value in (("num_samples", num_samples), ("num_terms", num_terms)):
            if value < 1:
                raise ValueError(f"callbacks.bits_per_dim.{name}={value} must be at least 1")
        setting, known = "callbacks.bits_per_dim.reverse_variance", get_args(ReverseVariance)
        if reverse_variance not in known:
            raise ValueError(f"{setting}={reverse_variance} must be one of {', '.join(known)}")
        check_num_val(reverse_variance, num_samples, setting)
        self.num_samples = num_samples
        self.num_terms = num_terms
        self.reverse_variance: ReverseVariance = reverse_variance
        self.every_validation = every_validation
        self.seed = seed

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        last = trainer.state.fn != TrainerFn.FITTING or trainer.should_stop or trainer.global_step >= trainer.max_steps
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not (self.every_validation or last) or trainer.sanity_checking:
            return
        assert isinstance(pl_module, DiffusionModule) and isinstance(data, BaseDataModule)
        if pl_module.coupling == "ot":
            return
        with data.reading_on_one_rank():
            x, indices = data.fetch(data.val_indices[: max(self.num_samples, trainer.world_size)])
        assert data.source is not None
        x, device = data.preprocess(x), pl_module.device
        cond = encode_conditions(data.condition, data.source, indices)
        share, size = len(x) // trainer.world_size, data.microbatch_size(trainer)
        own = range(trainer.global_rank * share, (trainer.global_rank + 1) * share)

        def load(positions: range) -> tuple[Tensor, Tensor | None]:
            if trainer.state.fn == TrainerFn.FITTING:
                check_stop_requested(trainer)
            part = slice(positions.start, positions.stop)
            return x[part].to(device), None if cond is None else cond[part].to(device)

        parts = [own[start : start + size] for start in range(0, share, size)]
        settings = self.seed, self.num_terms, self.reverse_variance
        processes = Processes(device, trainer.global_rank, trainer.world_size)
        results = bounds(
            pl_module, parts, load, *settings, reduce_errors=lambda errors: sum_errors(processes.gather(errors))
        )
        totals = processes.gather(torch.cat([part.total for part in results]))
        value = torch.cat(totals).mean().to(device, torch.float32)  # equal in all processes
        pl_module.log("val/bits_per_dim", value, sync_dist=True)


class Quality(L.Callback):
    """Measure samples at every `every`-th validation and log the metrics as `quality/<name>`. Off by default.

    All processes draw samples with the averaged weights, by the run's sampler or the same with other `steps`. The
    expected time is logged when training starts.
    """

    def __init__(
        self,
        features: Sequence[str] | None = None,
        n: int = 1000,
        every: int = 1,
        steps: int | None = None,
        seed: int = 0,
        cache: str = "outputs/cache",
        inception_weights: str | None = None,
        dinov2_model: str = "facebook/dinov2-large",
    ) -> None:
        if every < 1:
            raise ValueError(f"callbacks.quality.every={every} must be at least 1 validation")
        weights = inception_weights and Path(inception_weights)
        self.settings = QualitySettings(
            features, n, seed, cache=Path(cache), inception_weights=weights or None, dinov2_model=dinov2_model
        )
        self.settings.check()
        self.every = every
        self.steps = steps
        self._evaluator: SampleEvaluator | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DiffusionModule)
        data = trainer.datamodule  # type: ignore[attr-defined]
        processes = Processes(pl_module.device, trainer.global_rank, trainer.world_size)
        settings = self.settings._replace(batch_size=min(data.microbatch_size(trainer), self.settings.batch_size))
        with usage_errors():  # for example, missing weights of an extractor
            self._evaluator = SampleEvaluator(data, settings, processes)
        calls = pl_module.network_calls(self._sampler(pl_module))
        size = min(settings.batch_size, settings.n)
        seconds = estimate_seconds(pl_module, settings.n, calls, size, processes.count)
        if trainer.is_global_zero:
            period = "validation" if self.every == 1 else f"{self.every} validations"
            log.info(
                f"callbacks.quality measures {settings.n} samples every {period} ({calls} network calls each), about "
                f"{seconds:.0f} s each time"
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._evaluator is None:  # a validation before training, or no steps left
            return
        assert isinstance(pl_module, DiffusionModule)
        data = trainer.datamodule  # type: ignore[attr-defined]
        fitting = trainer.state.fn == TrainerFn.FITTING
        every = pl_module.validation_period * self.every
        if fitting and trainer.global_step % every and trainer.global_step < trainer.max_steps:
            return
        try:
            generated = self._evaluator.draw(
                pl_module,
                self._sampler(pl_module),
                on_step=lambda: check_stop_requested(trainer) if fitting else None,
                condition=data.condition,
            )
        except ValueError as error:
            if trainer.is_global_zero:
                warnings.warn(f"skipping callbacks.quality: {error}", stacklevel=2)
            return
        measured = self._evaluator.measure([generated])
        values = {f"quality/{name}": metric.value for each in measured for name, metric in each.metrics.items()}
        pl_module.log_dict(trainer.strategy.broadcast(values), sync_dist=True)

    def _sampler(self, module: DiffusionModule) -> Sampler:
        return module.sampler if self.steps is None else module.sampler._replace(steps=self.steps)
