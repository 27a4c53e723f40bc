"""All that benchmarks/ measures, one section after the other: `make bench`, and on a GPU `make bench-gpu`.

Leaves `table.md` in outputs/bench/<time>/, after each section what there is so far. Nothing else should run beside it.
It takes hours: with the `--folder` of an earlier run it goes on there, and does only what is missing.
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
    return ["benchmarks.training", *arguments]


def sections(gpu: bool, folder: Path) -> dict[str, list[str]]:
    """The module and arguments of each, by its title."""
    if gpu:
        # Of ours and the network tuned by hand; the others' loops are as they ship them, in float32. What tells most
        # comes first: to compile two networks for each size of batch takes minutes.
        bf16 = ["--precision", "bf16-mixed", "--rounds", "7", "--steps", "10", "--warmup", "5", "--compile"]
        steps = {
            f"A step of {model}, {batch} images": training(
                # The last one holds a whole graph while it waits for its turn.
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
            "Where the time of such a step goes": ["benchmarks.kernels"],
            "Images by the thousand": ["benchmarks.many"],
            **steps,
            "From the command to the first step": ["benchmarks.startup"],
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
        "Convolutions": ["benchmarks.convolutions"],
        "From the command to the first step": ["benchmarks.startup"],
        "Where the time of make train goes": ["benchmarks.shares"],
        "Quality for time": ["benchmarks.quality", "--data", "digits", "glyphs", "--folder", str(quality)],
        "Sampling": ["benchmarks.sampling"],
    }


def setting() -> str:
    """The machine and the versions, in a line."""
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
    """Run a section unless it is there already, and add it to the table; whether it went well."""
    typed_overrides, own = shlex.join(["python", "-m", *command]), folder / title.replace(" ", "_")
    good, bad, log = (own.with_suffix(suffix) for suffix in (".md", ".failed", ".log"))
    if good.is_file():
        print(f"{title}: is in {good} already", flush=True)
        return True
    print(f"{title}: {typed_overrides}", flush=True)
    began = time.monotonic()
    with log.open("w") as errors:
        ended = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=errors, text=True)
    text = ended.stdout.strip() + (f"\n\nFAILED with {ended.returncode}: see {log}" if ended.returncode else "")
    print(f"{text}\n", flush=True)
    bad.unlink(missing_ok=True)
    minutes = (time.monotonic() - began) / 60
    (bad if ended.returncode else good).write_text(
        f"## {title}\n{setting()}: `{typed_overrides}`, {minutes:.0f} minutes\n\n{text}\n"
    )
    there = sorted([*folder.glob("*.md"), *folder.glob("*.failed")], key=lambda path: path.stat().st_mtime)
    parts = [path.read_text() for path in there if path.name != TABLE]
    (folder / TABLE).write_text("\n".join(parts))
    return not ended.returncode


def main() -> None:
    """Run them; one that fails says so in the table, and the status is 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="what wants a GPU, in place of what a CPU can do")
    parser.add_argument("--folder", type=Path, help="where the table goes; sections that are there are not done again")
    parser.add_argument("--only", nargs="+", default=[], help="words of the titles of sections")
    args = parser.parse_args()
    if args.gpu and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use is to be found here: `make bench` is for a CPU")
    folder = args.folder or Path("outputs/bench") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {
        title: command
        for title, command in sections(args.gpu, folder).items()
        if not args.only or any(word in title for word in args.only)
    }
    if not chosen:
        raise SystemExit(f"no section has any of {args.only} in its title: {', '.join(sections(args.gpu, folder))}")
    print(f"Into {folder}; if it is cut short, --folder {folder} goes on with what is not done", flush=True)
    try:
        done = [measure(title, command, folder) for title, command in chosen.items()]
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"All of it: {folder / TABLE}")
    sys.exit(not all(done))


if __name__ == "__main__":
    main()
