"""How long a user waits from the command to the first step: `python -m benchmarks.startup`.

`src.train` to the end of its first step, over a process that only imports torch and lightning, in turns, each with one
thread and ended on the spot.
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
    """Ends the process with the first step, whatever would still be saved."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        os._exit(FIRST_STEP)


FIRST_STEP = 17
"""The status of a process that took its first step."""


def seconds(command: list[str], status: int) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode != status:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-2000:]}"
        )
    return time.perf_counter() - start


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("arguments", nargs="*", help="of src.train")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train = [sys.executable, "-m", "src.train", *args.arguments]
        train += ["+callbacks.first._target_=benchmarks.startup.FirstStep"]
        imports = [sys.executable, "-c", "import os, torch, lightning; os._exit(0)"]
        seconds([*train, f"run_dir='{Path(folder) / 'first'}'"], FIRST_STEP)  # so that no round reads from the disk
        pairs = []
        for k in range(args.rounds):
            run = [*train, f"run_dir='{Path(folder) / str(k)}'"]
            pairs.append((seconds(run, FIRST_STEP), seconds(imports, 0)))
    rows = [[str(k), f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}"] for k, (a, b) in enumerate(pairs, 1)]
    medians = [statistics.median(column) for column in zip(*((a, b, a / b) for a, b in pairs), strict=True)]
    rows.append(["median", *(f"{each:.2f}" for each in medians)])
    print(markdown_table(["round", "to the first step, s", "import torch, lightning, s", "ratio"], rows))


if __name__ == "__main__":
    main()
