"""Callbacks that evaluate the model during training."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from src.data.conditions import encode_conditions
from src.data.module import BaseDataModule
from src.distributed.processes import Processes
from src.errors import usage_errors
from src.evaluation.likelihood import Errors, ReverseVariance, bounds, check_halves, check_reverse_variance
from src.evaluation.quality import SampleEvaluator, Settings, log, seconds_of_call
from src.training.callbacks.graceful_shutdown import check_stop_requested
from src.training.module import DiffusionModule, Sampler


class BitsPerDim(L.Callback):
    """`val/bits_per_dim`: the averaged weights' bound on held-out data, estimated by `likelihood.bounds`.

    Of the first `num_samples` of them, from the decoder's term and `num_terms` others each, as many passes of the network,
    and with the reverse variance `optimal` as many again (5120 by default, about a validation's on 5120 samples).
    At every validation, or only at the `end` of training. Processes take equal shares, for which a few samples may be
    left out.
    """

    def __init__(
        self,
        num_samples: int = 512,
        num_terms: int = 4,
        reverse_variance: ReverseVariance = "optimal",
        every_validation: bool = False,
        seed: int = 0,
    ) -> None:
        if num_samples < 1 or num_terms < 1:
            raise ValueError(
                f"callbacks.bits_per_dim needs num_samples and links of at least 1, got {num_samples} and {num_terms}: 512 and 4 "
                "are usual"
            )
        check_reverse_variance(reverse_variance, "callbacks.bits_per_dim.reverse_variance")
        check_halves(reverse_variance, num_samples, "callbacks.bits_per_dim.reverse_variance")
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
        with data.reading_on_one_rank():
            x, indices = data.validation_samples(max(self.num_samples, trainer.world_size))
        assert data.source is not None
        device = pl_module.device
        cond = encode_conditions(data.condition, data.source, indices)
        share, size = len(x) // trainer.world_size, data.microbatch_size(trainer)
        first = trainer.global_rank * share
        stop = first + share
        if self.reverse_variance == "optimal" and share * trainer.world_size < 2:
            rank_zero_warn(
                "val/bits_per_dim is left out: callbacks.bits_per_dim.reverse_variance=optimal needs at least 2 "
                "held-out samples, and there is 1; hold out more, or set it to fixed_large"
            )
            return

        def load(places: range) -> tuple[Tensor, Tensor | None]:
            if trainer.state.fn == TrainerFn.FITTING:
                check_stop_requested(trainer)
            part = slice(places.start, places.stop)
            return x[part].to(device), None if cond is None else cond[part].to(device)

        def together(errors: Errors) -> Errors:
            flat = torch.cat([part.flatten() for part in errors]).to(device, torch.float32)
            summed = trainer.strategy.all_gather(flat).view(-1, len(flat)).sum(0).cpu().double()
            pieces = torch.split(summed, [part.numel() for part in errors])
            return Errors(*(piece.view_as(part) for piece, part in zip(pieces, errors, strict=True)))

        parts = [range(start, min(start + size, stop)) for start in range(first, stop, size)]
        settings = self.seed, self.num_terms, self.reverse_variance
        found = bounds(pl_module, parts, load, *settings, together=together)
        mine = torch.cat([part.total for part in found]).mean().to(device, torch.float32)
        pl_module.log("val/bits_per_dim", trainer.strategy.all_gather(mine).mean(), rank_zero_only=False)


class Quality(L.Callback):
    """Measures samples at every `every`-th validation and logs their figures as `quality/<name>`; off by default.

    What it will cost is said when training starts. The samples are the averaged weights', by the run's own sampler or
    one with so many `steps`, drawn by all processes.
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
            raise ValueError(f"callbacks.quality.every must be at least 1 validation, got {every}")
        weights = inception_weights and Path(inception_weights)
        self.settings = Settings(
            features, n, seed, cache=Path(cache), inception_weights=weights or None, dinov2_model=dinov2_model
        )
        self.settings.check()
        self.every = every
        self.steps = steps
        self._yardstick: SampleEvaluator | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DiffusionModule)
        data = trainer.datamodule  # type: ignore[attr-defined]
        processes = Processes(pl_module.device, trainer.global_rank, trainer.world_size)
        settings = self.settings._replace(batch_size=min(data.microbatch_size(trainer), self.settings.batch_size))
        with usage_errors():  # such as weights that are not to be had
            self._yardstick = SampleEvaluator(data, settings, processes)
        calls = pl_module.network_calls(self._sampler(pl_module))
        size = min(settings.batch_size, settings.n)
        seconds = seconds_of_call(pl_module, size) * calls * -(-settings.n // (size * processes.count))
        if trainer.is_global_zero:
            log.info(
                f"at every {f'{self.every} validations' if self.every > 1 else 'validation'} {settings.n} samples are "
                f"measured ({calls} network calls each), about {seconds:.0f} s each time"
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._yardstick is None:  # a validation that is made up for, or nothing was left to train
            return
        assert isinstance(pl_module, DiffusionModule)
        data = trainer.datamodule  # type: ignore[attr-defined]
        fitting = trainer.state.fn == TrainerFn.FITTING
        every = pl_module.validation_period * self.every
        if fitting and trainer.global_step % every and trainer.global_step < trainer.max_steps:
            return
        try:
            drawn = self._yardstick.draw(
                pl_module,
                self._sampler(pl_module),
                lambda _: None,
                lambda: check_stop_requested(trainer) if fitting else None,
                data.condition,
            )
        except ValueError as error:
            if trainer.is_global_zero:
                warnings.warn(f"not measured: {error}", stacklevel=2)
            return
        measured = self._yardstick.measure([drawn], lambda batches: batches)
        figures = {name: figure.value for each in measured for name, figure in each.figures.items()}
        for name, value in trainer.strategy.broadcast(figures).items():
            pl_module.log(f"quality/{name}", value)

    def _sampler(self, module: DiffusionModule) -> Sampler:
        return module.sampler if self.steps is None else module.sampler._replace(steps=self.steps)
