"""Measure which parts of a run take how much time: `python -m benchmarks.shares [OVERRIDES]`.

The overrides are those of `src.train`; by default the run is `make train`. Times come from Lightning's profiler. The
time to move batches to the device includes validation.
"""

import argparse
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch.profilers import SimpleProfiler

from benchmarks.training import compose_train
from src.runs.build import build
from src.viz.tables import markdown_table

PARTS = {
    "data": r"train_dataloader_next$|batch_to_device$",
    "forward": r"\.training_step$",
    "backward": r"\.backward$",
    "average of the weights": r"\[Callback\]EMA\.on_train_batch_end$",
    "checkpoints": r"^save_checkpoint$",
    "pictures": r"\[Callback\]SampleGrid\.on_validation",
    "validation": r"\.validation_step$|val_next$|\[Callback\]BitsPerDim\.",
}
"""Profiler actions of each part; no action contains another."""


def shares(durations: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the seconds of each part."""
    seconds = dict.fromkeys(PARTS, 0.0)
    for action, each in durations.items():
        part = next((name for name, pattern in PARTS.items() if re.search(pattern, action)), None)
        if part:
            seconds[part] += sum(each)
    optimizer_step = sum(
        sum(each) for action, each in durations.items() if re.search(r"\[LightningModule\].*\.optimizer_step$", action)
    )
    if not (optimizer_step and all(seconds[name] for name in ("data", "forward", "backward"))):
        raise ValueError(f"PARTS does not match the profiler's actions: {', '.join(durations)}")
    # Lightning's optimizer step contains the forward and backward pass.
    seconds["clipping, optimizer"] = optimizer_step - seconds["forward"] - seconds["backward"]
    return seconds


def main() -> None:
    """Train, and print the shares as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("arguments", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        run = build(compose_train(args.arguments, Path(folder) / "run"))
        if (device := run.trainer.strategy.root_device.type) != "cpu":
            raise SystemExit(f"trainer.accelerator must be cpu, not {device}; add trainer.accelerator=cpu")
        profiler = SimpleProfiler()
        run.trainer.profiler = profiler  # type: ignore[attr-defined]
        start = time.perf_counter()
        run.trainer.fit(run.module, datamodule=run.data)
        total = time.perf_counter() - start
    seconds = shares(profiler.recorded_durations)
    seconds["other (loops, logs)"] = total - sum(seconds.values())
    rows = [[name, f"{value:.2f}", f"{value / total:.1%}"] for name, value in seconds.items()]
    rows.append([f"total of {run.trainer.global_step} steps", f"{total:.2f}", "100%"])
    print(f"threads: {args.threads}, torch {torch.__version__}\n\n{markdown_table(['', 'seconds', 'share'], rows)}")


if __name__ == "__main__":
    main()
