"""What samples cost, and how good they are: `python -m benchmarks.sampling [RUN]` of a run on the embedded digits.

Our samplers, and those of diffusers' pipelines and of lucidrains' GaussianDiffusion as they ship them, all with the
run's own network and averaged weights, so that they differ in nothing else. The time for 64 images is the median of
several rounds, in turns; that for 10,000 follows from `--n` of them, drawn 250 at a time. "Outside" is the share of it
in which the network is not at work. The distance is that of `src.evaluate`, to held-out digits.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from benchmarks.quality import FixedSamples
from benchmarks.training import compose_train
from src.config.overrides import CONF
from src.distributed.processes import Processes
from src.evaluation.quality import SampleEvaluator
from src.evaluation.settings import QualitySettings
from src.runs import components
from src.runs.build import build
from src.runs.open import open_run
from src.training.module import DiffusionModule, Sampler
from src.viz.tables import format_metric, markdown_table, stem

SAMPLERS = (("ancestral", 100), ("ddim", 50), ("dpmpp_2m", 15), ("dpmpp_2m_sde", 25), ("dpmpp_2m_sde", 15))


class Way(NamedTuple):
    """A way to sample."""

    draw: Callable[[range], Tensor]
    """Numbers of samples -> images (N, C, H, W) in [-1, 1]."""
    calls: int


class Watched(nn.Module):
    """A network that keeps the time which it is at work. Takes timesteps (B,) or () in {0..T-1}."""

    channels = out_dim = 1  # what lucidrains' GaussianDiffusion asks of a network
    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self, net: nn.Module, num_steps: int) -> None:
        super().__init__()
        self.net = net
        self.num_steps = num_steps
        self.seconds = 0.0

    def forward(self, x: Tensor, t: Tensor, self_cond: None = None) -> Tensor:
        time_ = ((t + 1) / self.num_steps).expand(len(x))
        began = time.perf_counter()
        out: Tensor = self.net(x, time_)
        self.seconds += time.perf_counter() - began
        return out


class OurNet(nn.Module):
    """The same for our own calls, which give times."""

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self.watched = watched

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        out: Tensor = self.watched(x, time * self.watched.num_steps - 1)
        return out


def ours(module: DiffusionModule, name: str, steps: int) -> Way:
    cfg = OmegaConf.load(CONF / "sampler" / f"{name}.yaml")
    assert isinstance(cfg, DictConfig)
    sampler: Sampler = components.build_sampler(cfg)._replace(steps=steps)

    def draw(numbers: range) -> Tensor:
        *_, x = module.sample(numbers, 0, sampler)
        return x

    return Way(draw, module.network_calls(sampler))


def diffusers(net: Watched, betas: Tensor, shape: Sequence[int], scheduler: str, steps: int) -> Way:
    """The loop of its unconditional pipelines, which is the same for all schedulers."""
    import diffusers

    # What its DPM-Solver calls critical for the cosine schedule.
    more = {"lambda_min_clipped": -5.1} if scheduler.startswith("DPMSolver") else {}
    made = getattr(diffusers, scheduler)(trained_betas=betas.tolist(), prediction_type="sample", **more)

    @torch.no_grad()
    def draw(numbers: range) -> Tensor:
        made.set_timesteps(steps)
        x = torch.randn(len(numbers), *shape)
        for t in made.timesteps:
            x = made.step(net(x, t), t, x).prev_sample
        return x.clamp(-1, 1)

    return Way(draw, steps)


def lucidrains(net: Watched, size: int, steps: int) -> Way:
    """Its cosine schedule is ours."""
    from denoising_diffusion_pytorch import GaussianDiffusion

    diffusion = GaussianDiffusion(
        net, image_size=size, beta_schedule="cosine", objective="pred_x0", sampling_timesteps=steps
    ).eval()
    return Way(lambda numbers: diffusion.sample(batch_size=len(numbers)) * 2 - 1, steps)


def rows_of(ways: dict[str, Way], net: Watched, evaluator: SampleEvaluator, n: int, rounds: int) -> list[list[str]]:
    """A row of the table for each."""
    few: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way.draw(range(64))
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way.draw(range(64))
            few[name].append(time.perf_counter() - began)
    first = next(iter(few))
    rows = []
    for name, way in ways.items():
        net.seconds, began = 0.0, time.perf_counter()
        images = torch.cat([way.draw(range(k, min(k + 250, n))) for k in range(0, n, 250)])
        seconds = time.perf_counter() - began
        outside = 1 - net.seconds / seconds
        drawn = evaluator.draw(FixedSamples(images, way.calls), None, lambda _: None)  # type: ignore[arg-type]
        (measured,) = evaluator.measure([drawn], lambda batches: batches)
        figures = {stem(key): format_metric(figure._asdict()) for key, figure in measured.metrics.items()}
        ratio = statistics.median(a / b for a, b in zip(few[name], few[first], strict=True))
        cells = [f"{statistics.median(few[name]):.2f}", f"{ratio:.2f}", f"{seconds / n * 10_000:.0f}", f"{outside:.1%}"]
        rows.append([name, str(way.calls), *cells, figures["fd_classifier"], figures["precision_classifier"]])
    return rows


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", nargs="?", help="on the digits, x_0 its target, with the cosine schedule; else one is made"
    )
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        if args.run is None:
            run = build(compose_train(["experiment=digits", "logger=none"], Path(folder) / "run"))
            run.trainer.fit(run.module, datamodule=run.data)
        opened = open_run(args.run or str(Path(folder) / "run"))
    module, data = opened.module.eval(), opened.data
    betas: Tensor = module.schedule.betas  # type: ignore[attr-defined]
    net = Watched(module.net, module.schedule.num_steps)
    module.net = OurNet(net)
    data.setup()
    settings = QualitySettings(["classifier"], n=args.n, cache=Path("outputs/cache"))
    evaluator = SampleEvaluator(data, settings, Processes(torch.device("cpu"), 0, 1))
    theirs = partial(diffusers, net, betas, module.shape)
    ways = {f"ours, {name} {steps}": ours(module, name, steps) for name, steps in SAMPLERS}
    ways |= {
        "diffusers, DDPMPipeline": theirs("DDPMScheduler", 1000),
        "diffusers, DDIMPipeline": theirs("DDIMScheduler", 50),
        "diffusers, DPMSolverMultistepScheduler": theirs("DPMSolverMultistepScheduler", 20),
        "lucidrains, sampling_timesteps=250": lucidrains(net, module.shape[-1], 250),
    }
    rows = rows_of(ways, net, evaluator, args.n, args.rounds)
    floor = {stem(key): format_metric(figure._asdict()) for key, figure in evaluator.baseline().items()}
    rows.append(["training digits (floor)", "", "", "", "", "", floor["fd_classifier"], floor["precision_classifier"]])
    header = ["sampler", "calls", "s for 64", "over the first", "s for 10,000", "outside", "fd_classifier", "precision"]
    print(f"{args.n} samples, threads: {args.threads}, torch {torch.__version__}\n\n{markdown_table(header, rows)}")


if __name__ == "__main__":
    main()
