"""Run all benchmarks, one section after another: `make bench`, or `make bench-gpu` on a GPU.

Writes `table.md` in outputs/bench/<time>/ after each section. Takes hours on an otherwise idle machine; with
`--folder` of an earlier run it continues that run.
"""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from src.training.provenance import code_version, device_name

PEERS = ["--peers", "diffusers", "diffusers, tuned by hand", "lucidrains", "smalldiffusion"]
PACKAGES = ("torch", "lightning", "diffusers", "denoising-diffusion-pytorch", "smalldiffusion")
TABLE = "table.md"


def training(*arguments: str) -> list[str]:
    """Return a command of `benchmarks.training`."""
    return ["benchmarks.training", *arguments]


def sections(gpu: bool, folder: Path) -> dict[str, list[str]]:
    """Return module and arguments of each section by its title."""
    if gpu:
        # Precision and compilation apply to our network and the hand-tuned one; the other loops run as shipped, in
        # float32. The most informative sections come first, since compilation takes minutes for each batch size.
        bf16 = ["--precision", "bf16-mixed", "--rounds", "7", "--steps", "10", "--warmup", "5", "--compile"]
        steps = {
            f"A step of {model}, {batch} images": training(
                # The last peer keeps the graph of a loss in memory while others run.
                *("--model", model, "--batch", str(batch), *bf16, "reduce-overhead" if batch < 128 else "default"),
                *(PEERS if batch < 128 else PEERS[:-1]),
            )
            for model, batch in [
                *(("unet_ddpm", batch) for batch in (512, 16, 128, 64)),
                *(("unet_small", batch) for batch in (512, 16, 128)),
            ]
        }
        first = next(iter(steps))
        return {
            first: steps.pop(first),
            "GPU kernels of a training step": ["benchmarks.kernels"],
            "Sampling throughput": ["benchmarks.many"],
            **steps,
            "Startup time": ["benchmarks.startup"],
        }
    few = ["--steps", "1", "--warmup", "1", *PEERS]
    large = ["--rounds", "2", "--steps", "1", "--warmup", "0", *PEERS[:-1]]
    quality = folder / "quality"
    return {
        "A step of unet_small, 16 images": training(
            "--batch", "16", "--rounds", "9", "--steps", "2", "--warmup", "1", *PEERS
        ),
        "A step of unet_small, 64 images": training("--batch", "64", "--rounds", "5", *few),
        "A step of unet_ddpm, 16 images": training("--model", "unet_ddpm", "--batch", "16", "--rounds", "5", *few),
        "A step of unet_small, 256 images": training("--batch", "256", *large),
        "A step of unet_ddpm, 64 images": training("--model", "unet_ddpm", "--batch", "64", *large),
        "A step of unet_tiny on the digits": training("--model", "unet_tiny", "--rounds", "15"),
        **{
            f"A step of {model}, {batch} images of {size}x{size}": training(
                *("--model", model, "--size", str(size), "--batch", str(batch), "--rounds", "9", "--steps", "1"),
                *("--warmup", "1", "--peers", "diffusers", "diffusers, tuned by hand"),
            )
            for model, size, batch in (("dit_tiny", 32, 16), ("dit_tiny", 64, 4), ("dit_s", 32, 4), ("dit_s", 64, 1))
        },
        "Convolutions": ["benchmarks.convolutions"],
        "Startup time": ["benchmarks.startup"],
        "Time shares of make train": ["benchmarks.shares"],
        "Quality by training time": ["benchmarks.quality", "--data", "digits", "glyphs", "--folder", str(quality)],
        "Sampling": ["benchmarks.sampling"],
    }


def describe_machine() -> str:
    """Return the hardware and the package versions in one line."""
    device = device_name(torch.device("cpu"))
    if torch.cuda.is_available():
        device = f"{device_name(torch.device('cuda'))}, {device}"
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} not installed")
    code = f"commit {(code_version()['commit'] or 'unknown')[:7]}, Python {platform.python_version()}"
    return f"{device}, {os.cpu_count()} CPUs, {code}, {', '.join(versions)}"


def measure(title: str, command: Sequence[str], folder: Path) -> bool:
    """Run a section that has no result yet, add it to the table, and return whether it succeeded."""
    typed, own = shlex.join(["python", "-m", *command]), folder / title.replace(" ", "_")
    good, bad, log = (own.with_suffix(suffix) for suffix in (".md", ".failed", ".log"))
    if good.is_file():
        print(f"{title}: already in {good}", flush=True)
        return True
    print(f"{title}: {typed}", flush=True)
    began = time.monotonic()
    with log.open("w") as errors:
        ended = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=errors, text=True)
    text = ended.stdout.strip() + (f"\n\nFAILED with {ended.returncode}: see {log}" if ended.returncode else "")
    print(f"{text}\n", flush=True)
    bad.unlink(missing_ok=True)
    minutes = (time.monotonic() - began) / 60
    (bad if ended.returncode else good).write_text(
        f"## {title}\n{describe_machine()}: `{typed}`, {minutes:.0f} minutes\n\n{text}\n"
    )
    written = sorted([*folder.glob("*.md"), *folder.glob("*.failed")], key=lambda path: path.stat().st_mtime)
    parts = [path.read_text() for path in written if path.name != TABLE]
    (folder / TABLE).write_text("\n".join(parts))
    return not ended.returncode


def main() -> None:
    """Run the sections; exit with status 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="run the GPU sections instead of the CPU sections")
    parser.add_argument("--folder", type=Path, help="output folder; existing sections are kept")
    parser.add_argument("--only", nargs="+", default=[], help="run sections whose titles contain one of these words")
    args = parser.parse_args()
    if args.gpu and not torch.cuda.is_available():
        raise SystemExit("--gpu needs a GPU that torch can use; run `make bench` for the CPU sections")
    folder = args.folder or Path("outputs/bench") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {
        title: command
        for title, command in sections(args.gpu, folder).items()
        if not args.only or any(word in title for word in args.only)
    }
    if not chosen:
        raise SystemExit(
            f"--only={' '.join(args.only)} matches no section: choose from {', '.join(sections(args.gpu, folder))}"
        )
    print(f"Output: {folder}; to continue an interrupted run add --folder {folder}", flush=True)
    try:
        done = [measure(title, command, folder) for title, command in chosen.items()]
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"Results: {folder / TABLE}")
    sys.exit(not all(done))


if __name__ == "__main__":
    main()
