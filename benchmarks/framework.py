"""What the framework costs: `src.train`'s steps per second against a bare PyTorch loop over the same network.

Both run in one process and take turns, a few steps at a time, so that what else the machine does slows both alike:
`python -m benchmarks.framework --model unet_small`. A ratio of 1 means that the framework costs nothing.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import lightning as L
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from src import resolvers, runs  # noqa: F401 - conf/ needs what the first registers
from src.data.batch import InMemory, Source
from src.module import DiffusionModule
from src.trust import CONF

RANDOM_IMAGES = [
    "data.source._target_=benchmarks.framework.random_images",
    "data.channels=3",
    "data.image_size=32",
    "data.levels=256",
    "data.batch_size=32",
]
WORKLOADS = {"unet_small": ["model=unet_small", *RANDOM_IMAGES], "unet_tiny": ["model=unet_tiny"]}
"""The model and its data: random 32x32 colour images, or the digits with their own settings."""


def random_images(root: str | None, image_size: int, channels: int, prepare: bool = False) -> Source:
    """512 images of uniform noise in memory: what they show does not change the time that they take."""
    generator = torch.Generator().manual_seed(0)
    size = (512, channels, image_size, image_size)
    return InMemory(torch.randint(256, size, dtype=torch.uint8, generator=generator))


class Clock(NamedTuple):
    """Seconds that went by, and seconds that this process had a processor for: steadier on a busy machine."""

    wall: float
    cpu: float


class BareLoop:
    """The training step as one would write it by hand, with nothing logged: own weights, optimizer and average."""

    def __init__(self, cfg: DictConfig, images: Tensor, betas: Tensor, device: torch.device) -> None:
        self.net = hydra.utils.instantiate(cfg.model).to(device, memory_format=torch.channels_last).train()
        self.parameters = list(self.net.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=cfg.optimizer.lr, weight_decay=cfg.optimizer.weight_decay, fused=True
        )
        warmup, last = cfg.lr_scheduler.warmup_steps, cfg.trainer.max_steps
        self.rate = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda k: min(1, (k + 1) / warmup) * (1 - k / last)
        )
        alpha_bar = (1 - betas.double()).cumprod(0)
        self.alpha, self.sigma = (x.sqrt().float().to(device) for x in (alpha_bar, 1 - alpha_bar))
        self.images, self.batch_size, self.levels = images, cfg.data.batch_size, cfg.data.levels
        self.gamma, self.decay = cfg.weighting.gamma, cfg.callbacks.ema.decay
        self.max_norm, self.precision, self.device = cfg.trainer.gradient_clip_val, cfg.trainer.precision, device

    def loss(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Squared error of the predicted x_0, weighted by min(SNR, gamma)."""
        alpha, sigma = self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)
        x = (alpha * x0 + sigma * eps).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            out: Tensor = self.net(x, (t + 1) / len(self.alpha))
        mse = (out.float() - x0).square().flatten(1).mean(1)
        return ((alpha / sigma).square().clamp(max=self.gamma).flatten() * mse).mean()

    def step(self, k: int) -> None:
        """Optimizer step number k."""
        pixels = self.images[torch.randint(len(self.images), (self.batch_size,))].to(self.device, non_blocking=True)
        x0 = pixels.float() * (2 / (self.levels - 1)) - 1
        t = torch.randint(len(self.alpha), (len(x0),), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(x0, t, torch.randn_like(x0)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
        self.rate.step()
        with torch.no_grad():
            decay = min(self.decay, (k + 2) / (k + 11))
            get_ema_multi_avg_fn(decay)(self.average, self.parameters, None)  # type: ignore[no-untyped-call]


class TakeTurns(L.Callback):
    """Every `warmup` + `steps` steps, holds the fit while the bare loop takes as many; times the last `steps` of both.

    Must stand last in the list of callbacks. A segment runs from the end of one step to the end of another, so
    it holds all that Lightning does in between.
    """

    def __init__(self, cfg: DictConfig, warmup: int, steps: int) -> None:
        self.cfg = cfg
        self.warmup = warmup
        self.steps = steps
        self.framework: list[Clock] = []
        self.bare: list[Clock] = []
        self._start = now()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DiffusionModule)
        source = trainer.datamodule.source  # type: ignore[attr-defined]
        images = source.fetch(range(len(source)))
        betas = hydra.utils.instantiate(self.cfg.schedule)
        self.loop = BareLoop(self.cfg, images, betas, pl_module.device)
        self.check_same_loss(pl_module)
        self._start = now()

    def check_same_loss(self, module: DiffusionModule) -> None:
        """Both must compute the same loss from the same weights and draws, or the comparison means nothing."""
        own = {name: value.clone() for name, value in self.loop.net.state_dict().items()}
        self.loop.net.load_state_dict(module.net.state_dict())
        x0, eps = torch.rand(2, 16, *module.shape, device=module.device) * 2 - 1
        t = torch.arange(16, device=module.device) * 60
        with torch.no_grad(), module.trainer.precision_plugin.forward_context():
            link = module.schedule.link((t + 0.5) / module.schedule.num_steps, x0)
            terms = module.objective(module.process, module.denoise, x0, link, eps)
            torch.testing.assert_close(self.loop.loss(x0, t, eps), terms["loss"].mean(), rtol=1e-3, atol=0)
        self.loop.net.load_state_dict(own)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        taken = (batch_idx + 1) % (self.warmup + self.steps)
        if taken == 0:
            self.framework.append(since(self._start))
            self._run_bare(batch_idx + 1)
        if taken == self.warmup:
            self._start = now()

    def _run_bare(self, stop: int) -> None:
        for k in range(stop - self.warmup - self.steps, stop - self.steps):
            self.loop.step(k)
        start = now()
        for k in range(stop - self.steps, stop):
            self.loop.step(k)
        self.bare.append(since(start))


def now() -> Clock:
    """The time once the device has done all that it was asked to."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return Clock(time.perf_counter(), time.process_time())


def since(start: Clock) -> Clock:
    stop = now()
    return Clock(stop.wall - start.wall, stop.cpu - start.cpu)


def compose(model: str, num_steps: int, precision: str, folder: Path) -> DictConfig:
    """The configuration of `src.train`, with validation (once, at the very end) and pictures cut to a minimum."""
    overrides = [
        *WORKLOADS[model],
        "process.prediction=x0",
        "weighting=min_snr",
        f"trainer.max_steps={num_steps}",
        f"trainer.precision={precision}",
        "trainer.devices=1",
        f"validate_every={num_steps}",
        f"checkpoint_every={num_steps}",
        "callbacks.samples.count=1",
        "sampler.steps=1",
        f"run_dir='{folder}'",
    ]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return hydra.compose("train", overrides)


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=WORKLOADS, default="unet_small")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of segments")
    parser.add_argument("--steps", type=int, default=10, help="timed per segment; logs are written every 10")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps before each segment")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        cfg = compose(args.model, args.rounds * (args.warmup + args.steps), args.precision, Path(folder) / "run")
        run = runs.build(cfg)
        turns = TakeTurns(cfg, args.warmup, args.steps)
        run.trainer.callbacks.append(turns)  # type: ignore[attr-defined]
        run.trainer.fit(run.module, datamodule=run.data)
    device = turns.loop.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {args.threads} threads"
    print(
        f"\n{args.model}, batches of {cfg.data.batch_size} x {run.module.shape}, {args.precision}, {name}, torch "
        f"{torch.__version__}, lightning {L.__version__}: {args.steps} steps per segment after {args.warmup}\n"
    )
    print("| pair | framework, steps/s | bare, steps/s | framework / bare | by CPU time |\n|---|---|---|---|---|")
    pairs = zip(turns.framework, turns.bare, strict=True)
    rows = [(args.steps / a.wall, args.steps / b.wall, b.wall / a.wall, b.cpu / a.cpu) for a, b in pairs]
    medians = tuple(statistics.median(column) for column in zip(*rows, strict=True))
    for label, figures in [*enumerate(rows, 1), ("median", medians)]:
        print(f"| {label} | {' | '.join(f'{figure:.3f}' for figure in figures)} |")


if __name__ == "__main__":
    main()
