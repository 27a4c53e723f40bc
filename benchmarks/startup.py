"""Measure the time from the command to the first training step: `python -m benchmarks.startup`.

Alternates between `src.train`, up to the end of its first step, and a process that only imports torch and lightning,
each with one thread.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from src.viz.tables import markdown_table


class FirstStep(L.Callback):
    """End the process after the first step without saving anything."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        os._exit(FIRST_STEP)


FIRST_STEP = 17
"""Exit status of a process that completed its first step."""


def seconds(command: list[str], status: int) -> float:
    """Return the run time of a command; raise RuntimeError unless it exits with `status`."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode != status:
        raise RuntimeError(
            f"{' '.join(command)} exited with {done.returncode}: {done.stdout[-500:]}{done.stderr[-2000:]}"
        )
    return time.perf_counter() - start


def main() -> None:
    """Print the results as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("arguments", nargs="*", help="overrides of src.train")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train = [sys.executable, "-m", "src.train", *args.arguments]
        train += ["+callbacks.first._target_=benchmarks.startup.FirstStep"]
        imports = [sys.executable, "-c", "import os, torch, lightning; os._exit(0)"]
        seconds([*train, f"hydra.run.dir='{Path(folder) / 'first'}'"], FIRST_STEP)  # fills the file cache
        pairs = []
        for k in range(args.rounds):
            run = [*train, f"hydra.run.dir='{Path(folder) / str(k)}'"]
            pairs.append((seconds(run, FIRST_STEP), seconds(imports, 0)))
    rows = [[str(k), f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}"] for k, (a, b) in enumerate(pairs, 1)]
    medians = [statistics.median(column) for column in zip(*((a, b, a / b) for a, b in pairs), strict=True)]
    rows.append(["median", *(f"{each:.2f}" for each in medians)])
    print(markdown_table(["round", "to the first step, s", "import torch, lightning, s", "ratio"], rows))


if __name__ == "__main__":
    main()
