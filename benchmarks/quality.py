"""Measure sample quality after a fixed training time on two cores, for `src.train` and for other projects.

`python -m benchmarks.quality --data digits glyphs --minutes 2 5 10`. `src.train` uses `RECIPES`, tuned on these data;
its time includes one validation, pictures and checkpoints. The other projects use their own learning rate, batch size,
schedule, prediction target, average and sampler, with `--calls` network calls where their default is 1,000, and no
validation. Their networks have the channels, blocks and attention stages of the recipe but no patches: the networks
that they ship are far too large for these times.

Two processes of one thread run at a time, each for twice as long in CPU time. The metrics are those of `src.evaluate`
on the same validation images; the baseline is training images.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig
from torch import Tensor

from benchmarks.peers import PEERS, Contender, as_large_as
from benchmarks.training import OURS, compose_train
from src.data.module import BaseDataModule
from src.distributed.processes import Processes
from src.evaluation.quality import SampleEvaluator
from src.evaluation.settings import QualitySettings
from src.metrics.confidence import Metric
from src.runs.build import build
from src.runs.open import open_run
from src.training.provenance import code_version
from src.viz import images
from src.viz.tables import format_metric, markdown_table, strip_sample_count

RECIPES = {
    "digits": ["experiment=digits"],
    "glyphs": [
        "experiment=digits",
        "model.patch_size=2",
        "model.attention_resolutions=[7]",
        "data.source._target_=benchmarks.glyphs.glyphs",
        "data.image_size=28",
        "data.num_values=256",
        "data.batch_size=16",
        "sampler=dpmpp_2m_sde",
        "sampler.steps=25",
    ],
}
SAMPLES = {"digits": (1000, 100), "glyphs": (500, 50)}
"""Number of samples, and default network calls per sample of the other projects."""
CONTENDERS = (OURS, "diffusers", "lucidrains")
METRICS = ("fd_classifier", "fd_pixels", "precision_classifier", "recall_classifier", "nearest_ratio_classifier")
BASELINE = "baseline"


class StepTimer(L.Callback):
    """Measure the CPU time of a step after `skip` steps; stop training after `budget` seconds of CPU time."""

    def __init__(self, skip: int = 20, budget: float = math.inf) -> None:
        self.skip, self.budget = skip, budget
        self.start = self.end = 0.0
        self.steps = 0

    def on_train_start(self, *_: Any) -> None:
        self.end = time.process_time() + self.budget

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps += 1
        if self.steps == self.skip:
            self.start = time.process_time()
        self.seconds = (time.process_time() - self.start) / max(1, self.steps - self.skip)
        trainer.should_stop |= time.process_time() > self.end


def train_ours(recipe: Sequence[str], seed: int, budget: float, folder: Path) -> tuple[Path, float, int]:
    """Train as many steps of `src.train` as a short trial predicts to fit; return run folder, CPU seconds and steps.

    If steps take longer than predicted, training stops early, with a learning rate above 0. The time excludes loading
    data, as for the other projects.
    """

    def fit(name: str, steps: int, clock: StepTimer) -> tuple[Path, float]:
        more = [f"seed={seed}", f"trainer.max_steps={steps}", f"validate_every={steps}", f"checkpoint_every={steps}"]
        run = build(compose_train([*recipe, *more], folder / name))
        run.trainer.callbacks.append(clock)  # type: ignore[attr-defined]
        run.data.setup()
        start = time.process_time()
        run.trainer.fit(run.module, datamodule=run.data)
        return folder / name, time.process_time() - start

    clock, tried = StepTimer(), 60
    _, trial = fit("trial", tried, clock)
    overhead = trial - tried * clock.seconds  # validation, pictures
    steps = int((0.95 * budget - overhead) / clock.seconds)
    if steps < tried:
        raise ValueError(f"--minutes={budget / 120:g} must allow at least {tried} steps, not {steps}; raise --minutes")
    clock = StepTimer(budget=budget - overhead)
    where, seconds = fit("run", steps, clock)
    return where, seconds, clock.steps


def train_peer(name: str, cfg: DictConfig, images: Tensor, budget: float) -> tuple[Contender, float, int]:
    """Train another project until the budget is spent; return it with its CPU seconds and steps."""
    work = as_large_as(cfg.model, cfg.data, images, torch.device("cpu"))._replace(batch_size=16)  # their default
    trial = PEERS[name](work)
    for _ in range(3):
        trial.step()
    start = time.process_time()
    for _ in range(20):
        trial.step()
    steps = int(budget / (time.process_time() - start) * 20)
    contender = PEERS[name](work._replace(num_steps=steps))
    start, taken = time.process_time(), 0
    while time.process_time() - start < budget:
        contender.step()
        taken += 1
    return contender, time.process_time() - start, taken


class FixedSamples:
    """Existing samples with the sampling interface of a module."""

    def __init__(self, images: Tensor, calls: int) -> None:
        self.images = images
        self.calls = calls

    def sample(self, numbers: range, seed: int, sampler: Any, cond: Tensor | None = None) -> Iterator[Tensor]:
        yield self.images[[k % len(self.images) for k in numbers]]  # the evaluator drops the excess

    def network_calls(self, sampler: Any) -> int:
        return self.calls


def measure_contender(
    name: str, data_name: str, minutes: float, args: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Train one contender, sample, and return its row of the table."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    recipe, budget = [*RECIPES[data_name], *(args.recipe if name == OURS else [])], 2 * 60 * minutes
    n, calls = SAMPLES[data_name]
    calls = args.calls or calls
    cfg = compose_train(recipe, folder / "unused")
    data = build(cfg).data
    data.setup()
    assert data.source is not None
    if name == BASELINE:
        return {"metrics": without_counts(build_evaluator(data, n, args.seed).baseline())}
    if name == OURS:
        where, spent, steps = train_ours(recipe, args.seed, budget, folder)
        module = open_run(str(where), trust=True).module  # conf/ does not define its data
        calls, net = module.network_calls(module.sampler), module.net
        start = time.process_time()
        parts = [list(module.sample(range(k, min(k + 200, n)), args.seed))[-1] for k in range(0, n, 200)]
    else:
        real = data.source.fetch(data.train_indices)
        contender, spent, steps = train_peer(name, cfg, real, budget)
        assert contender.sample is not None
        net, start = contender.net, time.process_time()
        parts = [contender.sample(min(200, n - k), calls) for k in range(0, n, 200)]
    sampling = time.process_time() - start
    evaluator = build_evaluator(data, n, args.seed)
    drawn = evaluator.draw(FixedSamples(torch.cat(parts), calls), None)  # type: ignore[arg-type]
    images.draw_samples(drawn.first[:64]).save(folder / "grid.png")
    (measured,) = evaluator.measure([drawn])
    row = {"steps": steps, "spent": spent / budget, "calls": calls, "sampling": sampling}
    return {**row, "parameters": sum(p.numel() for p in net.parameters()), "metrics": without_counts(measured.metrics)}


def without_counts(metrics: Mapping[str, Metric]) -> dict[str, dict[str, float]]:
    """Return metrics by names without the number of samples."""
    return {strip_sample_count(key): metric._asdict() for key, metric in metrics.items()}


def build_evaluator(data: BaseDataModule, n: int, seed: int) -> SampleEvaluator:
    """Return an evaluator of n samples against the validation images."""
    settings = QualitySettings(["classifier", "pixels"], n=n, seed=seed, cache=Path("outputs/cache"))
    return SampleEvaluator(data, settings, Processes(torch.device("cpu"), 0, 1))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of the rows, with the distance divided by ours after the same training time."""
    columns = ["data", "minutes", "time spent", "loop", "commit", "M parameters", "steps", "calls", "sampling, s"]
    header = [*columns, *METRICS]
    distances = {
        (row["data"], row["contender"], row["minutes"]): row["metrics"]["fd_classifier"]["value"]
        for row in rows
        if "metrics" in row
    }
    lines = []
    for row in rows:
        first = [row["data"], f"{row['minutes']:g}" if row["minutes"] else ""]
        if "metrics" not in row:
            lines.append([*first, "", f"{row['contender']}: failed", *[""] * (len(header) - 3)])
            continue
        own = distances[row["data"], row["contender"], row["minutes"]]
        ours = distances.get((row["data"], OURS, row["minutes"]))
        ratio = f"{own / ours:.2f}" if ours else ""
        spent = f"{row['spent']:.0%}" if "spent" in row else ""
        size = f"{row['parameters'] / 1e6:.2f}" if "parameters" in row else ""
        sampling = f"{row['sampling']:.0f}" if "sampling" in row else ""
        cells = [*first, spent, row["contender"], (row.get("commit") or "")[:7], size]
        cells += [str(row.get("steps", "")), str(row.get("calls", "")), sampling]
        values = [format_metric(row["metrics"][name]) if name in row["metrics"] else "" for name in METRICS]
        lines.append([*cells, *values, ratio])
    return markdown_table([*header, "distance / ours"], lines)


def main() -> None:
    """Train, sample and evaluate all contenders, two at a time; save results, grids and a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=RECIPES, default=["digits"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--minutes", nargs="+", type=float, default=[2, 5, 10], help="training time on two cores")
    parser.add_argument("--recipe", nargs="*", default=[], help="more overrides for src.train")
    parser.add_argument("--calls", type=int, help="network calls per sample of the other projects")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="output folder; existing results are kept")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder or Path("outputs/bench") / f"quality_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    if args.one:
        code = {"commit": code_version()["commit"]}  # read before training, since the commit may change
        (folder / "row.json").write_text(
            json.dumps(code | measure_contender(args.one, args.data[0], args.minutes[0], args, folder))
        )
        return
    jobs = [(data, BASELINE, 0.0) for data in args.data]
    # Jobs of the same time run next to each other, so that the load of the machine is similar.
    jobs += [
        (data, name, minutes) for data, minutes, name in itertools.product(args.data, args.minutes, args.contenders)
    ]

    def run(job: tuple[str, str, float]) -> dict[str, Any]:
        data, name, minutes = job
        recipe = args.recipe if name == OURS else []
        calls = [f"--calls={args.calls}"] if args.calls and name not in (OURS, BASELINE) else []
        own = folder / "_".join([data, name, f"{minutes:g}", f"seed{args.seed}", *recipe, *calls])
        if not (own / "row.json").is_file():
            shutil.rmtree(own, ignore_errors=True)  # an interrupted job, whose folder would be refused
            own.mkdir(parents=True)
            command = [sys.executable, "-m", "benchmarks.quality", "--one", name, "--data", data]
            command += ["--minutes", f"{minutes}", "--seed", f"{args.seed}", "--folder", f"{own}", *calls]
            command += ["--recipe", *recipe]
            with open(own / "log.txt", "w") as log:
                subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        measured = json.loads((own / "row.json").read_text()) if (own / "row.json").is_file() else {}
        return {"data": data, "contender": name, "minutes": minutes, **measured}

    for data in args.data:  # trains the classifier once
        run((data, BASELINE, 0.0))
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(run, jobs))
    written = table(rows)
    (folder / "table.md").write_text(written)
    counts = ", ".join(f"{SAMPLES[data][0]} samples of {data}" for data in args.data)
    print(f"{counts}, seed {args.seed}, torch {torch.__version__}; grids in {folder}\n\n{written}")
    sys.exit(any("metrics" not in row for row in rows))


if __name__ == "__main__":
    main()
