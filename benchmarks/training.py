"""Measure the speed of training steps of `src.train`, of a bare loop over the same network, and of other projects.

`python -m benchmarks.training --model unet_small --batch 32`. The loops alternate in one process, a few steps at a
time, so that other load affects all of them equally. Ratios are medians over rounds; more than 1 means that `src.train`
is faster. GFLOP counts the matrix products and convolutions of one step. The peak is the measured speed of a large
product and of a convolution like those of the network, in the same rounds and in the precision of `src.train`; loops in
another precision have no share of it.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import lightning as L
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from benchmarks.peers import IN_FLOAT32, PEERS, WITH_TRANSFORMER, Contender, as_large_as, flops
from src.config.search_path import CONF
from src.data.sources import InMemory, Source
from src.errors import is_out_of_memory
from src.runs.build import build
from src.training.compile import compile_network
from src.training.module import DiffusionModule
from src.training.provenance import device_name
from src.viz.tables import markdown_table

RANDOM_IMAGES = [
    "data.source._target_=benchmarks.training.random_images",
    "data.channels=3",
    "data.image_size=32",
    "data.num_values=256",
    "data.batch_size=32",
]
OURS, BARE = "src.train", "bare loop"
WORKLOADS = {
    "unet_small": ["model=unet_small", *RANDOM_IMAGES],
    "unet_ddpm": ["model=unet_ddpm", "model.dropout=0", *RANDOM_IMAGES],
    "unet_tiny": ["model=unet_tiny"],
    "dit_tiny": ["model=dit_tiny", *RANDOM_IMAGES],
    "dit_s": ["model=dit_s", *RANDOM_IMAGES],
}
"""Model and data: random color images, or the digits with their own settings."""


COUNT = 2048
"""Number of random images; the largest batches need 512 training images."""


def random_images(root: str | None, image_size: int, channels: int, prepare: bool = False) -> Source:
    """Return images of uniform noise for `data.source`; their content does not affect the speed."""
    generator = torch.Generator().manual_seed(0)
    size = (COUNT, channels, image_size, image_size)
    return InMemory(torch.randint(256, size, dtype=torch.uint8, generator=generator))


class Clock(NamedTuple):
    """Wall-clock seconds and CPU seconds of this process; the latter vary less on a busy machine."""

    wall: float
    cpu: float


class BareLoop:
    """A hand-written training step without logging, with its own weights, optimizer and average."""

    def __init__(self, cfg: DictConfig, images: Tensor, betas: Tensor, device: torch.device) -> None:
        self.net = hydra.utils.instantiate(cfg.model).to(device, memory_format=torch.channels_last).train()
        fast = compile_network(self.net, cfg.compile)
        self.forward = self.net if fast is None else fast
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
        self.taken = 0
        self.images, self.batch_size, self.num_values = images, cfg.data.batch_size, cfg.data.num_values
        self.gamma, self.decay = cfg.weighting.gamma, cfg.callbacks.ema.decay
        self.max_norm, self.precision, self.device = cfg.trainer.gradient_clip_val, cfg.trainer.precision, device

    def loss(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return the squared error of the predicted x_0, weighted by min(SNR, gamma)."""
        alpha, sigma = self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)
        x = (alpha * x0 + sigma * eps).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            out: Tensor = self.forward(x, (t + 1) / len(self.alpha))
        mse = (out.float() - x0).square().flatten(1).mean(1)
        return ((alpha / sigma).square().clamp(max=self.gamma).flatten() * mse).mean()

    def step(self) -> None:
        """Take one optimizer step on a random batch."""
        chosen = torch.randint(len(self.images), (self.batch_size,), device=self.images.device)
        x0 = self.images[chosen].float() * (2 / (self.num_values - 1)) - 1
        t = torch.randint(len(self.alpha), (len(x0),), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(x0, t, torch.randn_like(x0)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
        self.rate.step()
        with torch.no_grad():
            decay = min(self.decay, (self.taken + 2) / (self.taken + 11))
            get_ema_multi_avg_fn(decay)(self.average, self.parameters, None)  # type: ignore[no-untyped-call]
        self.taken += 1


class AlternateLoops(L.Callback):
    """Run segments of `warmup` + `steps` steps of every loop in turn; time the last `steps` of each segment.

    Must be the last callback. A segment starts and ends with the end of a step, and includes all work of
    Lightning between steps.
    """

    def __init__(self, cfg: DictConfig, peers: Sequence[str], warmup: int, steps: int) -> None:
        self.cfg = cfg
        self.peers = peers
        self.warmup = warmup
        self.steps = steps
        self.clocks: dict[str, list[Clock]] = {OURS: []}
        self.peaks: dict[str, list[float]] = {}
        self._start = now()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DiffusionModule)
        cfg, device = self.cfg, pl_module.device
        self.device = device
        source = trainer.datamodule.source  # type: ignore[attr-defined]
        images = source.fetch(range(len(source))).to(device)
        loop = BareLoop(cfg, images, hydra.utils.instantiate(cfg.schedule), device)
        check_same_loss(loop, pl_module)
        self.loops = {BARE: Contender(loop.net, loop.step)}
        model, bf16 = cfg.model, cfg.trainer.precision == "bf16-mixed"
        self.flops = {BARE: flops(loop.step)}
        work = as_large_as(model, cfg.data, images, device)._replace(bf16=bf16, compile_mode=cfg.compile)
        for name in self.peers:
            try:
                contender = PEERS[name](work)
                self.flops[name] = flops(contender.step)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                print(f"{name}: out of memory with batches of {work.batch_size}, skipped", file=sys.stderr)
            else:
                self.loops[name] = contender
        self.sizes = {name: sum(p.numel() for p in each.net.parameters()) for name, each in self.loops.items()}
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.probes = {"matmul": matmul(device, dtype)}
        if "model_channels" in model:
            self.probes["convolution"] = convolution(device, dtype, model.model_channels * 2)
        self._start = now()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        taken = batch_idx % (self.warmup + self.steps)  # the first step creates the optimizer's state
        if taken == 0 and batch_idx:
            self.clocks[OURS].append(since(self._start))
            loops = list(self.loops.items())
            first = len(self.clocks[OURS]) % len(loops)  # rotate the order
            for name, each in loops[first:] + loops[:first]:
                self.clocks.setdefault(name, []).append(timed(each.step, self.warmup, self.steps))
            for name, (count, work) in self.probes.items():
                self.peaks.setdefault(name, []).append(4 * count / timed(work, 1, 4).wall)
        if taken == self.warmup:
            self._start = now()


def check_same_loss(loop: BareLoop, module: DiffusionModule) -> None:
    """Raise AssertionError unless both compute the same loss from the same weights and random numbers."""
    nets = (loop.net, module.net)
    weights = [{name: value.clone() for name, value in net.state_dict().items()} for net in nets]
    with torch.no_grad():
        for p in loop.net.parameters():
            p += 0.02 * torch.randn_like(p)  # the output layer is initialized to 0
    module.net.load_state_dict(loop.net.state_dict())
    # The batch size of training: a second size would make torch.compile assume dynamic sizes.
    x0, eps = torch.rand(2, loop.batch_size, *module.shape, device=module.device) * 2 - 1
    t = torch.arange(loop.batch_size, device=module.device) * 60 % module.schedule.num_steps
    with module.trainer.precision_plugin.forward_context():  # with gradients, as the networks are compiled
        transition = module.schedule.transition((t + 0.5) / module.schedule.num_steps, x0)
        terms = module.loss_fn(module.diffusion, module.denoise, x0, transition, eps)
        torch.testing.assert_close(loop.loss(x0, t, eps), terms["loss"].mean(), rtol=1e-3, atol=0)
    for net, own in zip(nets, weights, strict=True):
        net.load_state_dict(own)


def matmul(device: torch.device, dtype: torch.dtype) -> tuple[int, Callable[[], Any]]:
    """Return the FLOP of a large matrix product, and a function that computes it."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3, lambda: a @ b


def convolution(device: torch.device, dtype: torch.dtype, channels: int) -> tuple[int, Callable[[], Any]]:
    """Return the FLOP of a 3x3 convolution at 16x16, both passes, and a function that computes it."""
    batch = 512 if device.type == "cuda" else 32
    x = torch.randn(batch, channels, 16, 16, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(device, dtype)
    layer = layer.to(memory_format=torch.channels_last)
    x.requires_grad_()
    gradient = torch.randn_like(x)
    return 3 * 2 * 9 * channels**2 * 256 * batch, lambda: torch.autograd.grad(layer(x), (x, layer.weight), gradient)


def timed(step: Callable[[], Any], warmup: int, steps: int) -> Clock:
    """Return the time of `steps` steps after `warmup` steps."""
    for _ in range(warmup):
        step()
    start = now()
    for _ in range(steps):
        step()
    return since(start)


def now() -> Clock:
    """Return the time after the device has finished its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return Clock(time.perf_counter(), time.process_time())


def since(start: Clock) -> Clock:
    """Return the time elapsed since `start`."""
    stop = now()
    return Clock(stop.wall - start.wall, stop.cpu - start.cpu)


def compose(model: str, num_steps: int, precision: str, folder: Path, more: Sequence[str] = ()) -> DictConfig:
    """Compose `src.train` without validation and pictures, which would take longer than the measured steps."""
    overrides = [
        *WORKLOADS[model],
        "diffusion.prediction=x0",
        "weighting=min_snr",
        f"trainer.max_steps={num_steps}",
        f"trainer.precision={precision}",
        "trainer.devices=1",
        "trainer.limit_val_batches=0",
        f"checkpoint_every={num_steps}",
        "callbacks.bits_per_dim=null",
        "neighbors.num_samples=0",
        "~callbacks.samples",
    ]
    return compose_train([*overrides, *more], folder, bar=True)


def compose_train(overrides: Sequence[str], folder: Path, bar: bool = False) -> DictConfig:
    """Compose `src.train` for a run in `folder`, with or without a progress bar."""
    quiet = [] if bar else ["~callbacks.progress", "+trainer.enable_progress_bar=false"]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return hydra.compose("train", [*overrides, *quiet, f"run_dir='{folder}'"])


def table(turns: AlternateLoops) -> str:
    """Return a row per loop: size, FLOP, time, ratio to `src.train`, and share of the peak."""
    clocks, steps = turns.clocks, turns.steps
    peak = {name: statistics.median(values) for name, values in turns.peaks.items()}
    rows = []
    for name in (OURS, *turns.loops):
        each = clocks[name]
        count = turns.flops.get(name, turns.flops[BARE])
        seconds = statistics.median(c.wall for c in each) / steps
        ratios = sorted(a.wall / b.wall for a, b in zip(each, clocks[OURS], strict=True))
        by_cpu = statistics.median(a.cpu / b.cpu for a, b in zip(each, clocks[OURS], strict=True))
        done = sorted(1e-9 * count * steps / c.wall for c in each)
        own_precision = turns.cfg.trainer.precision != "32-true" and name in IN_FLOAT32
        shares = ["" if own_precision else f"{statistics.median(done) / (1e-9 * top):.0%}" for top in peak.values()]
        how = "float32" if own_precision else "bf16" if turns.cfg.trainer.precision == "bf16-mixed" else "float32"
        how += ", compiled" if turns.cfg.compile and name not in IN_FLOAT32 else ""
        size = f"{turns.sizes.get(name, turns.sizes[BARE]) / 1e6:.2f}"
        ratio = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        rows.append([name, how, size, f"{1e-9 * count:.1f}", f"{1e3 * seconds:.1f}", ratio, f"{by_cpu:.3f}", *shares])
    columns = ["M parameters", "GFLOP", "ms", "time / ours (range)", "by CPU time"]
    header = ["loop", "network", *columns, *(f"of {name} peak" for name in peak)]
    peaks = ", ".join(f"{name} {1e-9 * top:,.0f} GFLOP/s" for name, top in peak.items())
    return f"{markdown_table(header, rows)}\n\nPeak: {peaks}.\n"


def main() -> None:
    """Print the results as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=WORKLOADS, default="unet_small")
    parser.add_argument("--size", type=int, help="side of the random images; default: 32")
    parser.add_argument("--batch", type=int, help="batch size; default: that of the data")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[], help="other projects; they must be installed")
    parser.add_argument("--rounds", type=int, default=7, help="segments per loop")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per segment; logs are written every 10")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps before each segment")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--compile", nargs="?", const="default", help="a mode of torch.compile for our loops and the hand-tuned one"
    )
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    more = [f"compile={args.compile or 'null'}"]
    more += [] if args.size is None else [f"data.image_size={args.size}"]
    if args.model.startswith("dit") and (others := sorted({*args.peers} - {*WITH_TRANSFORMER})):
        parser.error(f"--peers {others[0]} has no transformer; choose of {', '.join(WITH_TRANSFORMER)}")
    more += [] if args.batch is None else [f"data.batch_size={args.batch}"]
    with tempfile.TemporaryDirectory() as folder:
        num_steps = 1 + args.rounds * (args.warmup + args.steps)
        cfg = compose(args.model, num_steps, args.precision, Path(folder) / "run", more)
        run = build(cfg)
        turns = AlternateLoops(cfg, args.peers, args.warmup, args.steps)
        run.trainer.callbacks.append(turns)  # type: ignore[attr-defined]
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
        ):  # the bar is part of the measured loop
            run.trainer.fit(run.module, datamodule=run.data)
    print(
        f"{args.model}, batches of {cfg.data.batch_size} x {run.module.shape}, {args.precision}, "
        f"{device_name(turns.device)}, {args.threads} CPU threads, torch {torch.__version__}, lightning "
        f"{L.__version__}: {args.rounds} rounds of {args.steps} steps after {args.warmup}\n\n{table(turns)}"
    )


if __name__ == "__main__":
    main()
