"""How good samples are after so many minutes of two cores: ours, and other projects' loops with their own settings.

`python -m benchmarks.quality --data digits glyphs --minutes 2 5 10`. Ours is `src.train` with `RECIPES`, which were
chosen on these data; one validation, pictures and checkpoints at its end are in the time. The others have their own
learning rate, batch size, schedule, target, average and sampler, in `--calls` calls where their default is 1,000, no
validation, and a network with the widths, blocks and levels of attention of the recipe's, but none sees patches: those
that they ship are far too large for such times.
Two cores are two processes of one thread at a time, each for twice as long, told by the time that it had its core.
Samples are measured by `src.evaluate`'s figures against the same held-out images; the floor is training images.
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
from src.viz.tables import format_metric, markdown_table, stem

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
"""How many are measured, and with how many calls the others draw each unless told otherwise."""
CONTENDERS = (OURS, "diffusers", "lucidrains")
FIGURES = ("fd_classifier", "fd_pixels", "precision_classifier", "recall_classifier", "nearest_ratio_classifier")
FLOOR = "floor"


class Clocked(L.Callback):
    """How long a step takes, without the first ones; ends the training when `budget` seconds are spent."""

    def __init__(self, skip: int = 20, budget: float = math.inf) -> None:
        self.skip, self.budget = skip, budget
        self.began = self.end = 0.0
        self.steps = 0

    def on_train_start(self, *_: Any) -> None:
        self.end = time.process_time() + self.budget

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps += 1
        if self.steps == self.skip:
            self.began = time.process_time()
        self.seconds = (time.process_time() - self.began) / max(1, self.steps - self.skip)
        trainer.should_stop |= time.process_time() > self.end


def train_ours(recipe: Sequence[str], seed: int, budget: float, folder: Path) -> tuple[Path, float, int]:
    """As many steps of `src.train` as fit, told by a few: the run's folder, the seconds that it took, the steps.

    Where they turn out to take longer it ends early, its learning rate not yet at 0. The data are there before the time
    begins, as they are for the others.
    """

    def fit(name: str, steps: int, clock: Clocked) -> tuple[Path, float]:
        more = [f"seed={seed}", f"trainer.max_steps={steps}", f"validate_every={steps}", f"checkpoint_every={steps}"]
        run = build(compose_train([*recipe, *more], folder / name))
        run.trainer.callbacks.append(clock)  # type: ignore[attr-defined]
        run.data.setup()
        began = time.process_time()
        run.trainer.fit(run.module, datamodule=run.data)
        return folder / name, time.process_time() - began

    clock, tried = Clocked(), 60
    _, trial = fit("trial", tried, clock)
    around = trial - tried * clock.seconds  # validation, pictures
    steps = int((0.95 * budget - around) / clock.seconds)
    if steps < tried:
        raise ValueError(f"{budget:.0f} s are too few: they have room for {steps} steps; give more --minutes")
    clock = Clocked(budget=budget - around)
    where, seconds = fit("run", steps, clock)
    return where, seconds, clock.steps


def train_peer(name: str, cfg: DictConfig, images: Tensor, budget: float) -> tuple[Contender, float, int]:
    """Steps of another project until the budget is spent: the seconds that they took, and how many there were."""
    work = as_large_as(cfg.model, cfg.data, images, torch.device("cpu"))._replace(batch_size=16)  # the default of both
    trial = PEERS[name](work)
    for _ in range(3):
        trial.step()
    began = time.process_time()
    for _ in range(20):
        trial.step()
    steps = int(budget / (time.process_time() - began) * 20)
    contender = PEERS[name](work._replace(num_steps=steps))
    began, taken = time.process_time(), 0
    while time.process_time() - began < budget:
        contender.step()
        taken += 1
    return contender, time.process_time() - began, taken


class FixedSamples:
    """Samples that are there, to be measured as a module's own are."""

    def __init__(self, images: Tensor, calls: int) -> None:
        self.images = images
        self.calls = calls

    def sample(self, numbers: range, seed: int, sampler: Any, cond: Tensor | None = None) -> Iterator[Tensor]:
        yield self.images[[k % len(self.images) for k in numbers]]  # beyond them are those that are dropped

    def network_calls(self, sampler: Any) -> int:
        return self.calls


def one(name: str, data_name: str, minutes: float, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one contender, draw, and measure: what a row of the table says."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    recipe, budget = [*RECIPES[data_name], *(args.recipe if name == OURS else [])], 2 * 60 * minutes
    n, calls = SAMPLES[data_name]
    calls = args.calls or calls
    cfg = compose_train(recipe, folder / "unused")
    data = build(cfg).data
    data.setup()
    assert data.source is not None
    if name == FLOOR:
        return {"figures": named(measured_by(data, n, args.seed).baseline())}
    if name == OURS:
        where, spent, steps = train_ours(recipe, args.seed, budget, folder)
        module = open_run(str(where), trust=True).module  # of data that conf/ does not name
        calls, net = module.network_calls(module.sampler), module.net
        began = time.process_time()
        parts = [list(module.sample(range(k, min(k + 200, n)), args.seed))[-1] for k in range(0, n, 200)]
    else:
        real = data.source.fetch(data.train_indices)
        contender, spent, steps = train_peer(name, cfg, real, budget)
        assert contender.sample is not None
        net, began = contender.net, time.process_time()
        parts = [contender.sample(min(200, n - k), calls) for k in range(0, n, 200)]
    sampling = time.process_time() - began
    evaluator = measured_by(data, n, args.seed)
    drawn = evaluator.draw(FixedSamples(torch.cat(parts), calls), None, lambda _: None)  # type: ignore[arg-type]
    images.draw_samples(drawn.first[:64]).save(folder / "grid.png")
    (measured,) = evaluator.measure([drawn], lambda batches: batches)
    row = {"steps": steps, "spent": spent / budget, "calls": calls, "sampling": sampling}
    return {**row, "parameters": sum(p.numel() for p in net.parameters()), "figures": named(measured.metrics)}


def named(figures: Mapping[str, Metric]) -> dict[str, dict[str, float]]:
    """By names without the number of samples."""
    return {stem(key): figure._asdict() for key, figure in figures.items()}


def measured_by(data: BaseDataModule, n: int, seed: int) -> SampleEvaluator:
    """What measures n samples against the data's held-out images."""
    settings = QualitySettings(["classifier", "pixels"], n=n, seed=seed, cache=Path("outputs/cache"))
    return SampleEvaluator(data, settings, Processes(torch.device("cpu"), 0, 1))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each, in the order in which they are given, with the distance over ours at the same time."""
    about = ["data", "minutes", "of them spent", "loop", "commit", "M parameters", "steps", "calls", "s to draw"]
    header = [*about, *FIGURES]
    distances = {
        (row["data"], row["contender"], row["minutes"]): row["figures"]["fd_classifier"]["value"]
        for row in rows
        if "figures" in row
    }
    lines = []
    for row in rows:
        start = [row["data"], f"{row['minutes']:g}" if row["minutes"] else ""]
        if "figures" not in row:
            lines.append([*start, "", f"{row['contender']}: failed", *[""] * (len(header) - 3)])
            continue
        own = distances[row["data"], row["contender"], row["minutes"]]
        ours = distances.get((row["data"], OURS, row["minutes"]))
        ratio = f"{own / ours:.2f}" if ours else ""
        spent = f"{row['spent']:.0%}" if "spent" in row else ""
        size = f"{row['parameters'] / 1e6:.2f}" if "parameters" in row else ""
        sampling = f"{row['sampling']:.0f}" if "sampling" in row else ""
        cells = [*start, spent, row["contender"], (row.get("commit") or "")[:7], size]
        cells += [str(row.get("steps", "")), str(row.get("calls", "")), sampling]
        figures = [format_metric(row["figures"][name]) if name in row["figures"] else "" for name in FIGURES]
        lines.append([*cells, *figures, ratio])
    return markdown_table([*header, "distance / ours"], lines)


def main() -> None:
    """Train, draw and measure all, two at a time; leave figures, grids and a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=RECIPES, default=["digits"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--minutes", nargs="+", type=float, default=[2, 5, 10], help="of two cores")
    parser.add_argument("--recipe", nargs="*", default=[], help="more overrides of ours")
    parser.add_argument("--calls", type=int, help="of the network for each sample of the others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where all is left; what is there already is not done again")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder or Path("outputs/bench") / f"quality_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    if args.one:
        code = {"commit": code_version()["commit"]}  # before it may become another
        (folder / "row.json").write_text(json.dumps(code | one(args.one, args.data[0], args.minutes[0], args, folder)))
        return
    jobs = [(data, FLOOR, 0.0) for data in args.data]
    # Those of the same time beside each other, so that the machine is much the same for them.
    jobs += [
        (data, name, minutes) for data, minutes, name in itertools.product(args.data, args.minutes, args.contenders)
    ]

    def run(job: tuple[str, str, float]) -> dict[str, Any]:
        data, name, minutes = job
        recipe = args.recipe if name == OURS else []
        calls = [f"--calls={args.calls}"] if args.calls and name not in (OURS, FLOOR) else []
        own = folder / "_".join([data, name, f"{minutes:g}", f"seed{args.seed}", *recipe, *calls])
        if not (own / "row.json").is_file():
            shutil.rmtree(own, ignore_errors=True)  # of one that was cut off, whose run would be refused
            own.mkdir(parents=True)
            command = [sys.executable, "-m", "benchmarks.quality", "--one", name, "--data", data]
            command += ["--minutes", f"{minutes}", "--seed", f"{args.seed}", "--folder", f"{own}", *calls]
            command += ["--recipe", *recipe]
            with open(own / "log.txt", "w") as log:
                subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        measured = json.loads((own / "row.json").read_text()) if (own / "row.json").is_file() else {}
        return {"data": data, "contender": name, "minutes": minutes, **measured}

    for data in args.data:  # whose classifier is trained once, for all
        run((data, FLOOR, 0.0))
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(run, jobs))
    written = table(rows)
    (folder / "table.md").write_text(written)
    counts = ", ".join(f"{SAMPLES[data][0]} samples of {data}" for data in args.data)
    print(f"{counts}, seed {args.seed}, torch {torch.__version__}; grids in {folder}\n\n{written}")
    sys.exit(any("figures" not in row for row in rows))


if __name__ == "__main__":
    main()
