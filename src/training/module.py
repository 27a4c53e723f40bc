"""The LightningModule: network, noise schedule, process and objective put together."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torchmetrics import MeanMetric

from src.data.batches import Batch
from src.data.samplers import VALIDATION
from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.guidance import Guidance, guided
from src.diffusion.likelihood import Predict
from src.diffusion.losses import Denoise
from src.diffusion.noise import (
    CLEAN,
    DefaultSpacing,
    NoiseLevel,
    Schedule,
    Spacing,
    TimeGrid,
    Transition,
    make_time_grid,
    terminal_alpha_bar,
)
from src.diffusion.samplers import Noise, predictor
from src.diffusion.timestep_samplers import ImportanceSampler, TimestepSampler, stratified
from src.distributed.sharding import shard, total_norm
from src.rng import SampleNoise, StepRng, key
from src.training.optim import skip_unless


class LossFn(Protocol):
    """Per-sample terms, each (B,), "loss" among them.

    An objective that has a term "vlb" estimates the bound, and is given links of the chain. Any other is given the
    link from the level at v, anywhere on a continuous schedule, to clean data.
    """

    def __call__(
        self, diffusion: GaussianDiffusion, denoise: Denoise, x0: Tensor, transition: Transition, eps: Tensor
    ) -> dict[str, Tensor]: ...


class SamplerFn(Protocol):
    """A sampler of `src.diffusion.samplers` with its own settings bound."""

    def __call__(
        self, diffusion: GaussianDiffusion, predict: Predict, x: Tensor, time_grid: TimeGrid, *, noise: Noise
    ) -> Iterator[Tensor]: ...


class Sampler(NamedTuple):
    """How to sample: the walk, the grid of levels that it takes, and what guides it."""

    fn: SamplerFn
    steps: int
    spacing: Spacing | DefaultSpacing
    guidance: Guidance = Guidance()


class ConditionSpec(NamedTuple):
    """What a network that takes conditions may be asked for, as it takes them."""

    null: Tensor
    """(1, ...) nothing."""
    examples: Tensor
    """(N, ...) what samples show if no one says what they should: sample k example k mod N."""
    cond_drop_prob: float
    """The share of training samples, each by itself, of which the network is told nothing."""


class DiffusionModule(L.LightningModule):
    """Trains `net` to predict the process's target at random levels of the schedule, and samples from it.

    `shape` is that of one sample; `optimizer` takes groups of parameters, `lr_scheduler` an optimizer and the number of
    steps. A schedule that has parameters is trained too, to the least variance of the bound, whose mean in continuous
    time does not depend on its shape (Kingma et al. 2021, VDM, sec. 5.1 and 5.3). Raises ValueError for settings that
    contradict each other, such as a schedule with zero terminal SNR and eps-prediction.
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
    ) -> None:
        super().__init__()
        if conditioning is not None and not 0 <= conditioning.cond_drop_prob < 1:
            raise ValueError(
                f"conditioning.cond_drop_prob must lie in [0, 1), got {conditioning.cond_drop_prob}: 0.1 is usual, 0 allows no guidance"
            )
        # Below it x_0 = (x_T - sigma eps) / alpha leaves the range of float32.
        if diffusion.prediction == "eps" and terminal_alpha_bar(schedule) < 1e-60:
            raise ValueError(
                "a schedule that ends in pure noise (zero_terminal_snr, rectified_flow, alpha below 1e-30) cannot go "
                "with diffusion.prediction=eps: at zero SNR x_T is the noise itself, so "
                "predicting it teaches nothing and x_0 = (x_T - sigma eps) / alpha divides by 0; use v or x0"
            )
        self.net = net
        self.schedule = schedule
        self.diffusion = diffusion
        self.loss_fn = loss_fn
        self.timestep_sampler = timestep_sampler
        self.sampler = sampler
        self.shape = tuple(shape)
        self.seed = seed
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.cond_drop_prob = conditioning.cond_drop_prob if conditioning else 0.0
        self.register_buffer("null", conditioning and conditioning.null, persistent=False)
        self.register_buffer("examples", conditioning and conditioning.examples, persistent=False)
        # Convolutions run fastest with channels last, here and on a GPU.
        self.memory_format = torch.channels_last if len(self.shape) == 3 else torch.contiguous_format
        self._find_weights()
        self.check_sampler(sampler)
        self.compiled_training: Callable[..., Tensor] | None = None
        """What is called instead of the network where gradients are needed; elsewhere the sizes of batches vary."""
        self.compiled_sampling: Callable[..., Tensor] | None = None
        """What is called instead of it to draw samples, in batches that are filled up to one size."""
        self.sampling_dtype: torch.dtype | None = None
        """In which the network's products are computed when it samples; None for its own."""
        terms = self.check_loss()
        self.estimates_bound = "vlb" in terms
        self.validation = nn.ModuleDict({name: MeanMetric() for name in terms})
        self._seen: list[tuple[Tensor, Tensor]] = []
        self.validated = 0
        """The step at which the last validation ended."""
        self.grad_norm = torch.zeros(())
        """Of the last step, before clipping; not finite if the step was skipped."""

    null: Tensor | None
    examples: Tensor | None

    def denoise(self, x: Tensor, t: NoiseLevel, cond: Tensor | None = None) -> Tensor:
        """The network's output for x (B, *data) at a level, in float32 whatever the precision.

        A network that takes conditions is asked for `cond` (B, ...); None asks for nothing.
        """
        fast = self.compiled_training if torch.is_grad_enabled() else None
        return self._denoise(self.net if fast is None else fast, x, t, cond)

    def _denoise(self, net: Callable[..., Tensor], x: Tensor, t: NoiseLevel, cond: Tensor | None) -> Tensor:
        scaled = self.diffusion.scale_input(x, t).contiguous(memory_format=self.memory_format)
        # A scalar is on the CPU: as a number it costs no transfer that the device would wait for.
        time = t.time.flatten().to(x) if t.time.ndim else x.new_full((len(x),), t.time.item())
        if self.null is None:
            out: Tensor = net(scaled, time)
        else:
            out = net(scaled, time, self.null.expand(len(x), *self.null.shape[1:]) if cond is None else cond)
        return out.float()

    def configure_model(self) -> None:
        """Shard the network where the strategy asks for that."""
        if self.device_mesh is not None:
            shard(self.net, self.device_mesh["data_parallel"])
            self._find_weights()

    def _find_weights(self) -> None:
        """Those of the network, and of a curve that learns: finding them anew at each step costs a millisecond."""
        curve = {id(p) for p in self.schedule.parameters()} if isinstance(self.schedule, nn.Module) else set()
        self.weights = tuple(p for p in self.parameters() if id(p) not in curve)
        self.curve_weights = tuple(p for p in self.parameters() if id(p) in curve)

    def on_train_start(self) -> None:
        """Make up for a validation in which the run was stopped or killed, and which Lightning takes for done.

        Raises RuntimeError if the processes do not start at the same step.
        """
        trainer = self.trainer
        if self.global_step > 0:
            self._apply_current_optimizer_settings()
        starts = cast(Tensor, self.all_gather(torch.tensor(self.global_step, device=self.device))).flatten().tolist()
        if len({*starts}) > 1:
            raise RuntimeError(
                f"the processes start at steps {starts}: all must see the run's folder, with the same checkpoints in it"
            )
        due = self.validated < self.global_step and self.global_step % self.validation_period == 0
        if due and trainer.enable_validation:
            validation = trainer.fit_loop.epoch_loop.val_loop
            validation.restarting = False  # from its first batch
            trainer.validating = True
            validation.run()
            trainer.training = True

    @property
    def validation_period(self) -> float:
        """The steps from one validation to the next."""
        return self.trainer.val_check_interval / self.trainer.accumulate_grad_batches

    def on_validation_epoch_end(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.validated = self.global_step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["validated"] = self.validated

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.validated = checkpoint.get("validated", checkpoint["global_step"])

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Clear what the last step logged; Lightning would log it again, as of that step, when training stops."""
        if (logged := self.trainer._results) is not None and self._is_logged(self.global_step - 1):
            logged.reset(metrics=False)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        # What networks draw, their dropout, belongs to the step too: so a resumed run draws it as if it went on.
        seed_networks(key(self.seed, "network", self.global_step, batch["start"]), self.device)
        v, terms = self._train_terms(batch, self.global_step)
        if isinstance(self.timestep_sampler, ImportanceSampler):
            gathered = cast(tuple[Tensor, Tensor], self.all_gather((v, terms["unweighted"])))
            self._seen.append((gathered[0].flatten(), gathered[1].flatten()))
        loss = terms["loss"].mean()
        if self._is_logged(self.global_step):
            for name in terms.keys() - {"loss", "unweighted"}:
                self.log(f"train/{name}", terms[name].mean())
            self.log("train/loss", loss)
        # A loss that is not finite makes the gradient so, in which all processes share: none of them takes the step.
        passed_on = loss * torch.where(loss.isfinite(), 1.0, math.nan)
        return {"loss": passed_on, "v": v, "losses": terms["unweighted"]}

    def _is_logged(self, step: int) -> bool:
        """Whether this step of training is: for each value Lightning takes half a millisecond, written or not."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return (step + 1) % every == 0

    def _train_terms(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Where training looks (B,), and the objective's terms there (B,), "loss" weighted as that demands."""
        x0, rng = self._step_rng(batch, step)
        v, weight = self.timestep_sampler(rng.uniform("t"), rng.shared("t"), self._place(batch))
        transition = self.transition(v, x0)
        losses: list[Tensor] = []
        self._register_variance_hooks(transition, losses)
        terms = self._terms(x0, transition, rng, self._asked(batch, rng, self.cond_drop_prob))
        losses.append(terms["loss"].detach())
        weighted = {name: weight * (values if name == "loss" else values.detach()) for name, values in terms.items()}
        return v, {**weighted, "unweighted": losses[0]}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if isinstance(self.timestep_sampler, ImportanceSampler) and self._seen:
            self.timestep_sampler.update(*(torch.cat(parts) for parts in zip(*self._seen, strict=True)))
            self._seen.clear()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        x0, rng = self._step_rng(batch, VALIDATION)
        v, _ = stratified(rng.uniform("t"), rng.shared("t"), self._place(batch))
        for name, values in self._terms(x0, self.transition(v, x0), rng, self._asked(batch)).items():
            metric = cast(MeanMetric, self.validation[name])
            metric.update(values)
            self.log(f"val/{name}", metric, prog_bar=name == "loss", on_step=False, on_epoch=True)

    def transition(self, v: Tensor, like: Tensor) -> Transition:
        """The links that the objective is given for v (B,) in [0, 1), as (B, 1, ..., 1) against `like` (B, *data)."""
        if self.estimates_bound:
            return self.schedule.transition(v, like)
        return Transition(self.schedule.level_at(v, like), CLEAN, 1)

    def _step_rng(self, batch: Batch, step: int) -> tuple[Tensor, StepRng]:
        """The data, and the draws that belong to the step and to their places in the batch."""
        x0 = batch["x"]
        return x0, StepRng(self.seed, step, batch["start"], len(x0), x0.device)

    def _place(self, batch: Batch) -> Tensor:
        """The samples' places in the global batch, in [0, 1)."""
        x0 = batch["x"]
        # float32 also where the default is a lower precision
        return (batch["start"] + torch.arange(len(x0), device=x0.device, dtype=torch.float32)) / batch["total"]

    def _asked(self, batch: Batch, rng: StepRng | None = None, cond_drop_prob: float = 0.0) -> Tensor | None:
        """What the samples are asked to be, or nothing for a share `cond_drop_prob` of them."""
        if self.null is None:
            return None
        cond = batch["cond"]
        if rng is None or not cond_drop_prob:
            return cond
        dropped = rng.uniform("drop") < cond_drop_prob
        return torch.where(dropped.view(-1, *[1] * (cond.ndim - 1)), self.null, cond)

    def _terms(self, x0: Tensor, transition: Transition, rng: StepRng, cond: Tensor | None) -> dict[str, Tensor]:
        eps = rng.normal("eps", x0.shape[1:])
        denoise = self.denoise if cond is None else partial(self.denoise, cond=cond)
        return self.loss_fn(self.diffusion, denoise, x0, transition, eps)

    def _register_variance_hooks(self, transition: Transition, losses: list[Tensor]) -> None:
        """Have a schedule with parameters descend the mean square of the losses (B,), which are not known yet.

        The square's gradient is 2 loss times that of the loss, so both need one backward pass only. The cleanest row,
        where the decoder takes over, learns nothing, as VDM's end does not: the mean of the divergences alone depends
        on where they end, and the decoder's term would outweigh them.
        """
        for level in (transition.t, transition.s):
            learns = level.time > 1.5 / self.schedule.num_steps

            def scaled(gradient: Tensor, learns: Tensor = learns) -> Tensor:
                return 2 * losses[0].view_as(gradient) * learns * gradient

            for field in level:
                if field.requires_grad:
                    field.register_hook(scaled)  # type: ignore[no-untyped-call]

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self.prepare_optimizer(self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}

    def prepare_optimizer(self, num_steps: int) -> tuple[Optimizer, LRScheduler]:
        """The optimizer of the network's weights and its learning-rate schedule over `num_steps`."""
        if self.make_optimizer is None or self.make_lr_scheduler is None:
            raise RuntimeError("this module was built without an optimizer: it can sample but not train")
        groups: list[dict[str, Any]] = [{"params": list(self.weights)}]
        if self.curve_weights:
            # Decay would pull the curve to where its parameters are 0, which is no better a curve.
            groups.append({"params": list(self.curve_weights), "weight_decay": 0.0})
        optimizer = self.make_optimizer(groups)
        optimizer.register_load_state_dict_pre_hook(keep_current_settings)
        return optimizer, self.make_lr_scheduler(optimizer, num_steps)

    def optimizer_state(self) -> set[str]:
        """The names of what the optimizer keeps of each weight once it has taken a step."""
        assert self.make_optimizer is not None
        weight = nn.Parameter(torch.zeros(2, 2))
        weight.grad = torch.zeros(2, 2)
        optimizer = self.make_optimizer([{"params": [weight]}])
        optimizer.step()
        return set(optimizer.state[weight])

    def _apply_current_optimizer_settings(self) -> None:
        """Have a resumed run train with its own optimizer settings, where Lightning restores those of the checkpoint.

        The learning rate is that of the step at which it stands, by these settings, times what `NonFiniteGuard` has
        left of it. With the same settings it is the checkpoint's to the last bit.
        """
        (config,) = self.trainer.lr_scheduler_configs
        scheduler = config.scheduler
        optimizer, fresh = self.prepare_optimizer(self.trainer.max_steps)
        groups = [*zip(scheduler.optimizer.param_groups, optimizer.param_groups, strict=True)]
        for k, (old, new) in enumerate(groups):
            left = scheduler.base_lrs[k] / old["initial_lr"]
            same = new["initial_lr"] == old["initial_lr"]
            fresh.base_lrs[k] = scheduler.base_lrs[k] if same else new["initial_lr"] * left
            new["lr"] *= left
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no step of this optimizer comes before
            if isinstance(fresh, LambdaLR):  # knows the rate of any step
                fresh.last_epoch = scheduler.last_epoch - 1
            for _ in range(scheduler.last_epoch - fresh.last_epoch):
                fresh.step()
        for old, new in groups:
            old.update({name: value for name, value in new.items() if name != "params"})
        scheduler.load_state_dict({**fresh.state_dict(), "_step_count": scheduler._step_count})

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by total norm or by value, log the norm, and take no step where it is not finite.

        Lightning's own clipping refuses fused optimizers, which are the fast ones. A learned curve is clipped by
        itself: it descends something else, whose gradients have another size.
        """
        by_value = gradient_clip_algorithm == "value"
        limit = math.inf if by_value or not gradient_clip_val else gradient_clip_val
        norm = total_norm(nn.utils.clip_grad_norm_(self.weights, limit))
        if self._is_logged(self.global_step):
            self.log("train/grad_norm", norm)
        if self.curve_weights:
            norm = norm + nn.utils.clip_grad_norm_(self.curve_weights, limit)
        if by_value and gradient_clip_val:
            nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
        self.grad_norm = norm.detach()
        skip_unless(norm.isfinite(), optimizer)

    def check_loss(self) -> dict[str, Tensor]:
        """The terms (1,) at the noisiest level for a wrong output, so that settings are refused before any work."""
        x = torch.zeros(1, *self.shape)
        transition = self.schedule.transition(torch.ones(1) - 2**-24, x)
        wrong = torch.ones(1, self.diffusion.outputs * self.shape[0], *self.shape[1:])
        terms = self.loss_fn(self.diffusion, lambda x, _: wrong, x, transition, x)
        if any(field.requires_grad for field in transition.t) and terms.get("vlb") is not terms["loss"]:
            raise ValueError("a learned schedule is trained by the bound: choose loss=vlb, or another schedule")
        return terms

    def check_sampler(self, sampler: Sampler) -> None:
        """Take one step on zeros, so that settings which the sampler refuses are refused before any work."""
        next(self._meta_sample(sampler, []))

    def network_calls(self, sampler: Sampler) -> int:
        """How often a network is called for each sample: counted on a walk without it."""
        calls: list[NoiseLevel] = []
        for _ in self._meta_sample(sampler, calls):
            pass
        return len(calls)

    def _meta_sample(self, sampler: Sampler, calls: list[NoiseLevel]) -> Iterator[Tensor]:
        """From zeros, with ones for the network's outputs; `calls` is told the levels that it is asked for."""
        guidance = sampler.guidance
        guidance.check()
        if guidance.rescale and math.prod(self.shape) == 1:
            raise ValueError(
                f"guidance.rescale={guidance.rescale:g} compares deviations within a sample, and one number has none: "
                "set guidance.rescale=0"
            )
        if guidance.scale != 1 and self.null is None and guidance.model is None:
            raise ValueError(
                f"guidance.scale={guidance.scale:g} needs a run that was trained with conditions (conditioning=class, "
                "...), or a weaker model to lead away from (guidance.model=RUN)"
            )
        if guidance.scale != 1 and guidance.model is None and self.cond_drop_prob == 0:
            raise ValueError(
                f"guidance.scale={guidance.scale:g} leads away from the model that is told nothing, as this one never "
                "was: train with conditioning.cond_drop_prob=0.1, or give a weaker model (guidance.model=RUN)"
            )
        grid = make_time_grid(self.schedule, sampler.steps, sampler.spacing)
        x = torch.zeros(1, *self.shape, device=self.device)
        wrong = x.new_ones(1, self.diffusion.outputs * self.shape[0], *self.shape[1:])

        def denoise(x: Tensor, t: NoiseLevel, cond: Tensor | None) -> Tensor:
            calls.extend([t] * len(x))
            return wrong.expand(len(x), *wrong.shape[1:])

        hollow = guidance._replace(model=guidance.model and denoise)
        predict = predictor(self.diffusion, guided(denoise, self.null, self.null, hollow, self.shape[0]))
        return sampler.fn(self.diffusion, predict, x, grid, noise=torch.zeros_like)

    def denoise_for_sampling(
        self, x: Tensor, t: NoiseLevel, cond: Tensor | None = None, microbatch_size: int | None = None
    ) -> Tensor:
        """As `denoise`, `microbatch_size` samples at a time, in the precision that is for sampling.

        A compiled network is given just as many each time.
        """
        net, half = self.compiled_sampling or self.net, self.sampling_dtype
        size = microbatch_size or len(x)
        count = len(x) if self.compiled_sampling is None else -(-len(x) // size) * size
        parts = torch.split(_filled_up(x, count), size)
        conds = [None] * len(parts) if cond is None else torch.split(_filled_up(cond, count), size)
        with torch.autocast(x.device.type, half) if half else nullcontext():
            # Copied, since what CUDA graphs put out is overwritten when they are replayed.
            outs = [self._denoise(net, part, t, c).clone() for part, c in zip(parts, conds, strict=True)]
        return torch.cat(outs)[: len(x)]

    @torch.no_grad()
    def sample(
        self,
        indices: Sequence[int],
        seed: int,
        sampler: Sampler | None = None,
        microbatch_size: int | None = None,
        cond: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield samples `indices` at every level from pure noise to data, each (N, *data) float32.

        Sample k depends on (seed, k) and what it is asked to be alone, not on what it is drawn together with. They are
        asked to be `cond` (N, ...), or else the examples by turns. The network sees at most `microbatch_size` of them together,
        and if it is compiled just as many.
        """
        fn, steps, spacing, guidance = sampler or self.sampler
        if self.compiled_sampling is not None:
            microbatch_size = microbatch_size or len(indices)  # also where guidance asks for twice as many
        if cond is None and self.examples is not None:
            cond = self.examples[[k % len(self.examples) for k in indices]]
        cond = None if cond is None else cond.to(self.device)
        training = self.training
        self.eval()
        denoise = partial(self.denoise_for_sampling, microbatch_size=microbatch_size)
        try:
            predict = predictor(self.diffusion, guided(denoise, cond, self.null, guidance, self.shape[0]))
            noise = SampleNoise(seed, indices, self.device)
            grid = make_time_grid(self.schedule, steps, spacing)
            x = grid[0].norm * noise.draw(self.shape)
            yield x
            yield from fn(self.diffusion, predict, x, grid, noise=noise)
        finally:
            self.train(training)

    def sample_distributed(self, count: int, seed: int) -> Iterator[Tensor]:
        """Yield samples 0..count - 1 as `sample` does, (count, *data), drawn by all processes, each a share of them.

        Every process must take part, and gets all samples.
        """
        trainer = self.trainer
        share = -(-count // trainer.world_size)  # the same everywhere: sharded weights need all for every step
        first = trainer.global_rank * share
        data = trainer.datamodule  # type: ignore[attr-defined]
        for x in self.sample(range(first, first + share), seed, microbatch_size=data.microbatch_size(trainer)):
            yield trainer.strategy.all_gather(x).view(-1, *self.shape)[:count]


def seed_networks(seed: int, device: torch.device) -> None:
    """Seed what networks draw from on the CPU, and on the current device of this one's kind.

    `torch.manual_seed` does so for all kinds of devices there could be, which takes a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def _filled_up(x: Tensor, count: int) -> Tensor:
    """x (B, ...) with its last row repeated until there are `count`."""
    return x if len(x) == count else torch.cat([x, x[-1:].expand(count - len(x), *x.shape[1:])])


def keep_current_settings(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Have a state that is loaded keep the optimizer's own settings, all but the learning rate.

    Another precision may have had another way of computing, and a run may be resumed with other settings.
    """
    for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        group.update({name: value for name, value in own.items() if name not in ("params", "lr", "initial_lr")})
