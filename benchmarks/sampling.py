"""Measure cost and quality of samplers for a run on the embedded digits: `python -m benchmarks.sampling [RUN]`.

Compares our samplers, those of diffusers' pipelines and that of lucidrains' GaussianDiffusion, with the same network
and averaged weights. The time for 64 images is the median of several alternating rounds; the time for 10,000 is
extrapolated from `--n` images in batches of 250. "Outside" is the share of time outside the network. The distance is
that of `src.evaluate` to validation digits.
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
from src.config.search_path import CONF
from src.distributed.processes import Processes
from src.evaluation.quality import SampleEvaluator
from src.evaluation.settings import QualitySettings
from src.runs import components
from src.runs.build import build
from src.runs.open import open_run
from src.training.module import DiffusionModule, Sampler
from src.viz.tables import format_metric, markdown_table, strip_sample_count

SAMPLERS = (("ancestral", 100), ("ddim", 50), ("dpmpp_2m", 15), ("dpmpp_2m_sde", 25), ("dpmpp_2m_sde", 15))


class SamplerCase(NamedTuple):
    """A sampler with its network."""

    sample: Callable[[range], Tensor]
    """Sample indices -> images (N, C, H, W) in [-1, 1]."""
    calls: int


class TimedNet(nn.Module):
    """Measure the time spent in a network. Takes timesteps (B,) or () in {0..T-1}."""

    channels = out_dim = 1  # attributes that lucidrains' GaussianDiffusion reads
    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self, net: nn.Module, num_steps: int) -> None:
        super().__init__()
        self.net = net
        self.num_steps = num_steps
        self.seconds = 0.0

    def forward(self, x: Tensor, t: Tensor, self_cond: None = None) -> Tensor:
        time_ = ((t + 1) / self.num_steps).expand(len(x))
        start = time.perf_counter()
        out: Tensor = self.net(x, time_)
        self.seconds += time.perf_counter() - start
        return out


class ContinuousTimeNet(nn.Module):
    """Map continuous times in (0, 1] to the timesteps of a `TimedNet`."""

    def __init__(self, timed: TimedNet) -> None:
        super().__init__()
        self.timed = timed

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        out: Tensor = self.timed(x, time * self.timed.num_steps - 1)
        return out


def ours(module: DiffusionModule, name: str, steps: int) -> SamplerCase:
    """Return one of our samplers."""
    cfg = OmegaConf.load(CONF / "sampler" / f"{name}.yaml")
    assert isinstance(cfg, DictConfig)
    sampler: Sampler = components.build_sampler(cfg)._replace(steps=steps)

    def sample(indices: range) -> Tensor:
        *_, x = module.sample(indices, 0, sampler)
        return x

    return SamplerCase(sample, module.network_calls(sampler))


def diffusers(net: TimedNet, betas: Tensor, shape: Sequence[int], scheduler: str, steps: int) -> SamplerCase:
    """Return the loop of the unconditional pipelines of diffusers with one of its schedulers."""
    import diffusers

    # The documentation of its DPM-Solver requires this for the cosine schedule.
    more = {"lambda_min_clipped": -5.1} if scheduler.startswith("DPMSolver") else {}
    made = getattr(diffusers, scheduler)(trained_betas=betas.tolist(), prediction_type="sample", **more)

    @torch.no_grad()
    def sample(indices: range) -> Tensor:
        made.set_timesteps(steps)
        x = torch.randn(len(indices), *shape)
        for t in made.timesteps:
            x = made.step(net(x, t), t, x).prev_sample
        return x.clamp(-1, 1)

    return SamplerCase(sample, steps)


def lucidrains(net: TimedNet, size: int, steps: int) -> SamplerCase:
    """Return the DDIM sampler of GaussianDiffusion, whose cosine schedule equals ours."""
    from denoising_diffusion_pytorch import GaussianDiffusion

    diffusion = GaussianDiffusion(
        net, image_size=size, beta_schedule="cosine", objective="pred_x0", sampling_timesteps=steps
    ).eval()
    return SamplerCase(lambda indices: diffusion.sample(batch_size=len(indices)) * 2 - 1, steps)


def measure_samplers(
    cases: dict[str, SamplerCase], net: TimedNet, evaluator: SampleEvaluator, n: int, rounds: int
) -> list[list[str]]:
    """Return a row of the table per sampler."""
    few: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case.sample(range(64))
    for _ in range(rounds):
        for name, case in cases.items():
            start = time.perf_counter()
            case.sample(range(64))
            few[name].append(time.perf_counter() - start)
    first = next(iter(few))
    rows = []
    for name, case in cases.items():
        net.seconds, start = 0.0, time.perf_counter()
        images = torch.cat([case.sample(range(k, min(k + 250, n))) for k in range(0, n, 250)])
        seconds = time.perf_counter() - start
        outside = 1 - net.seconds / seconds
        drawn = evaluator.draw(FixedSamples(images, case.calls), None)  # type: ignore[arg-type]
        (measured,) = evaluator.measure([drawn])
        metrics = {strip_sample_count(key): format_metric(metric._asdict()) for key, metric in measured.metrics.items()}
        ratio = statistics.median(a / b for a, b in zip(few[name], few[first], strict=True))
        cells = [f"{statistics.median(few[name]):.2f}", f"{ratio:.2f}", f"{seconds / n * 10_000:.0f}", f"{outside:.1%}"]
        rows.append([name, str(case.calls), *cells, metrics["fd_classifier"], metrics["precision_classifier"]])
    return rows


def main() -> None:
    """Print the results as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", nargs="?", help="run on the digits with prediction=x0 and the cosine schedule; default: train one"
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
    net = TimedNet(module.net, module.schedule.num_steps)
    module.net = ContinuousTimeNet(net)
    data.setup()
    settings = QualitySettings(["classifier"], n=args.n, cache=Path("outputs/cache"))
    evaluator = SampleEvaluator(data, settings, Processes(torch.device("cpu"), 0, 1))
    theirs = partial(diffusers, net, betas, module.shape)
    cases = {f"ours, {name} {steps}": ours(module, name, steps) for name, steps in SAMPLERS}
    cases |= {
        "diffusers, DDPMPipeline": theirs("DDPMScheduler", 1000),
        "diffusers, DDIMPipeline": theirs("DDIMScheduler", 50),
        "diffusers, DPMSolverMultistepScheduler": theirs("DPMSolverMultistepScheduler", 20),
        "lucidrains, sampling_timesteps=250": lucidrains(net, module.shape[-1], 250),
    }
    rows = measure_samplers(cases, net, evaluator, args.n, args.rounds)
    baseline = {
        strip_sample_count(key): format_metric(metric._asdict()) for key, metric in evaluator.baseline().items()
    }
    rows.append(
        ["training digits (baseline)", "", "", "", "", "", baseline["fd_classifier"], baseline["precision_classifier"]]
    )
    header = ["sampler", "calls", "s for 64", "over the first", "s for 10,000", "outside", "fd_classifier", "precision"]
    print(f"{args.n} samples, threads: {args.threads}, torch {torch.__version__}\n\n{markdown_table(header, rows)}")


if __name__ == "__main__":
    main()
