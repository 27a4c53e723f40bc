"""Sample from a network: the base class of the LightningModule, without training."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple, Protocol

import lightning as L
import torch
from torch import Tensor, nn

from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.guidance import Guidance, guided
from src.diffusion.likelihood import Predict
from src.diffusion.noise import (
    DefaultSpacing,
    NoiseLevel,
    Schedule,
    Spacing,
    TimeGrid,
    make_time_grid,
    terminal_alpha_bar,
)
from src.diffusion.samplers import Noise, predictor
from src.rng import SampleNoise


class SamplerFn(Protocol):
    """A function of `src.diffusion.samplers` with its own settings bound."""

    def __call__(
        self, diffusion: GaussianDiffusion, predict: Predict, x: Tensor, grid: TimeGrid, *, noise: Noise
    ) -> Iterator[Tensor]: ...


class Sampler(NamedTuple):
    """A sampler function, its time grid and its guidance."""

    fn: SamplerFn
    steps: int
    spacing: Spacing | DefaultSpacing
    guidance: Guidance = Guidance()


class ConditionSpec(NamedTuple):
    """The conditions of a conditional network, encoded as its input."""

    null: Tensor  # (1, ...) the null condition
    examples: Tensor  # (N, ...) default conditions: sample k takes example k mod N
    cond_drop_prob: float  # probability that training replaces a sample's condition with `null`


class SamplingModule(L.LightningModule):
    """A network with its noise schedule and diffusion process; `shape` is that of one sample.

    `deterministic` refuses samplers that add noise.
    """

    null: Tensor | None
    examples: Tensor | None

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        diffusion: GaussianDiffusion,
        sampler: Sampler,
        shape: Sequence[int],
        conditioning: ConditionSpec | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        if conditioning is not None and not 0 <= conditioning.cond_drop_prob < 1:
            raise ValueError(
                f"conditioning.cond_drop_prob={conditioning.cond_drop_prob} must be in [0, 1); 0.1 is usual"
            )
        # Below this, x_0 = (x_T - sigma eps) / alpha overflows float32.
        if diffusion.prediction == "eps" and terminal_alpha_bar(schedule) < 1e-60:
            raise ValueError(
                "diffusion.prediction=eps needs a schedule whose alpha ends above 1e-30, unlike zero_terminal_snr=true "
                "and schedule=rectified_flow: x_0 = (x_T - sigma eps) / alpha divides by 0; set diffusion.prediction=v "
                "or diffusion.prediction=x0"
            )
        self.net = net
        self.schedule = schedule
        self.diffusion = diffusion
        self.sampler = sampler
        self.shape = tuple(shape)
        self.cond_drop_prob = conditioning.cond_drop_prob if conditioning else 0.0
        self.register_buffer("null", conditioning and conditioning.null, persistent=False)
        self.register_buffer("examples", conditioning and conditioning.examples, persistent=False)
        # Convolutions are fastest in channels-last layout, on CPUs and GPUs.
        self.memory_format = torch.channels_last if len(self.shape) == 3 else torch.contiguous_format
        self.compiled_training: Callable[..., Tensor] | None = None
        """The compiled network for calls with gradients; validation batches differ in size."""
        self.compiled_sampling: Callable[..., Tensor] | None = None
        """The compiled network for sampling, whose batches are padded to one size."""
        self.sampling_dtype: torch.dtype | None = None
        """Autocast type of sampling; None computes in the type of the weights."""
        self.deterministic = deterministic
        self.check_sampler(sampler)

    def denoise(self, x: Tensor, t: NoiseLevel, cond: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """Return the network's output (B, outputs * C, *rest) for x (B, *data), in float32 in every precision.

        A conditional network takes `cond` (B, ...), by default the null condition. One that was built for labels of
        augmentations takes `augment` (B, K), by default 0.
        """
        compiled = self.compiled_training if torch.is_grad_enabled() else None
        return self._call_network(self.net if compiled is None else compiled, x, t, cond, augment)

    def _call_network(
        self, net: Callable[..., Tensor], x: Tensor, t: NoiseLevel, cond: Tensor | None, augment: Tensor | None = None
    ) -> Tensor:
        scaled = self.diffusion.scale_input(x, t).contiguous(memory_format=self.memory_format)
        # A scalar time is on the CPU; a Python number avoids a synchronizing copy.
        time = t.time.flatten().to(x) if t.time.ndim else x.new_full((len(x),), t.time.item())
        if self.null is not None and cond is None:
            cond = self.null.expand(len(x), *self.null.shape[1:])
        inputs = [] if self.null is None else [cond]
        if augment is not None:
            inputs = [cond, augment]
        out: Tensor = net(scaled, time, *inputs)
        return out.float()

    def denoise_for_sampling(
        self, x: Tensor, t: NoiseLevel, cond: Tensor | None = None, microbatch_size: int | None = None
    ) -> Tensor:
        """Return `denoise(x, t, cond)` in `sampling_dtype`, computed in microbatches.

        A compiled network sees microbatches of exactly `microbatch_size`, the last one padded.
        """
        net, dtype = self.compiled_sampling or self.net, self.sampling_dtype
        size = microbatch_size or len(x)
        count = len(x) if self.compiled_sampling is None else -(-len(x) // size) * size
        parts = torch.split(_pad(x, count), size)
        conds = [None] * len(parts) if cond is None else torch.split(_pad(cond, count), size)
        with torch.autocast(x.device.type, dtype) if dtype else nullcontext():
            # Cloned, because a CUDA graph overwrites its output when it is replayed.
            outs = [self._call_network(net, part, t, c).clone() for part, c in zip(parts, conds, strict=True)]
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
        """Yield samples `indices` at each noise level, from noise to data, each (N, *data) float32.

        Sample k depends only on (seed, k) and its condition, not on the other samples of the batch. `cond` (N, ...)
        defaults to cycling through the examples. `microbatch_size` limits the batch that the network sees.
        """
        fn, steps, spacing, guidance = sampler or self.sampler
        if self.compiled_sampling is not None:
            microbatch_size = microbatch_size or len(indices)  # guidance doubles the batch
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
        """Yield samples 0..count - 1 at each noise level, each (count, *data), computed by all processes.

        Collective: every process must call it, and receives all samples.
        """
        trainer = self.trainer
        share = -(-count // trainer.world_size)  # the same for all processes, as sharded weights require
        first = trainer.global_rank * share
        data = trainer.datamodule  # type: ignore[attr-defined]
        for x in self.sample(range(first, first + share), seed, microbatch_size=data.microbatch_size(trainer)):
            yield trainer.strategy.all_gather(x).view(-1, *self.shape)[:count]

    def check_sampler(self, sampler: Sampler) -> None:
        """Take one step on zeros. Raises ValueError for settings that the sampler or this model does not support."""
        next(self._dry_run(sampler, []))
        if self.deterministic:
            for _ in self._dry_run(sampler, [], refuse_noise):
                pass

    def network_calls(self, sampler: Sampler) -> int:
        """Return the number of network evaluations per sample, counted without running the network."""
        calls: list[NoiseLevel] = []
        for _ in self._dry_run(sampler, calls):
            pass
        return len(calls)

    def _dry_run(self, sampler: Sampler, calls: list[NoiseLevel], noise: Noise = torch.zeros_like) -> Iterator[Tensor]:
        """Sample from zeros with a network that returns ones; append the level of each evaluation to `calls`."""
        guidance = sampler.guidance
        guidance.check()
        if guidance.rescale and math.prod(self.shape) == 1:
            raise ValueError(f"guidance.rescale={guidance.rescale:g} needs samples of more than one value; set it to 0")
        if guidance.scale != 1 and guidance.model is None:
            if self.null is None:
                raise ValueError(
                    f"guidance.scale={guidance.scale:g} needs a run trained with conditions (conditioning=class, ...), "
                    "or a weaker model (guidance.model=RUN)"
                )
            if self.cond_drop_prob == 0:
                raise ValueError(
                    f"guidance.scale={guidance.scale:g} needs a model trained with conditioning.cond_drop_prob > 0 "
                    "(0.1 is usual), or a weaker model (guidance.model=RUN)"
                )
        grid = make_time_grid(self.schedule, sampler.steps, sampler.spacing)
        x = torch.zeros(1, *self.shape, device=self.device)
        ones = x.new_ones(1, self.diffusion.outputs * self.shape[0], *self.shape[1:])

        def denoise(x: Tensor, t: NoiseLevel, cond: Tensor | None) -> Tensor:
            calls.extend([t] * len(x))
            return ones.expand(len(x), *ones.shape[1:])

        dry_guidance = guidance._replace(model=guidance.model and denoise)
        predict = predictor(self.diffusion, guided(denoise, self.null, self.null, dry_guidance, self.shape[0]))
        return sampler.fn(self.diffusion, predict, x, grid, noise=noise)


def refuse_noise(x: Tensor) -> Tensor:
    """Raise ValueError: a noise function for samplers that must not add noise."""
    raise ValueError(
        "the sampler adds noise, and a model with data.coupling=ot needs a deterministic one, as it learns no score; "
        "choose sampler=heun, sampler=dpmpp_2m or sampler=ddim, and leave out sampler.eta and sampler.s_churn"
    )


def _pad(x: Tensor, count: int) -> Tensor:
    """Return x (B, ...) with its last row repeated up to `count` rows."""
    return x if len(x) == count else torch.cat([x, x[-1:].expand(count - len(x), *x.shape[1:])])
