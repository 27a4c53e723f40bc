"""List the longest kernels of a training step on a GPU: `python -m benchmarks.kernels --batch 512`.

Profiles the bare loop over our network; the default is bf16 and compiled.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import hydra
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.peers import flops
from benchmarks.training import BareLoop, compose, random_images, timed
from src.runs.open import pick_device
from src.training.provenance import device_name
from src.viz.tables import markdown_table


def main() -> None:
    """Print the kernels as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("unet_small", "unet_ddpm"), default="unet_ddpm")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--compile", default="default", help="a mode of torch.compile, or null")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="bf16-mixed")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--steps", type=int, default=3, help="profiled steps, after as many warmup steps")
    args = parser.parse_args()
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        more = [f"data.batch_size={args.batch}", f"compile={args.compile}"]
        cfg = compose(args.model, 1, args.precision, Path(folder) / "run", more)
    source = random_images(None, 32, 3)
    loop = BareLoop(cfg, source.fetch(range(len(source))).to(device), hydra.utils.instantiate(cfg.schedule), device)
    count = flops(loop.step)
    seconds = statistics.median(timed(loop.step, args.steps, args.steps).wall / args.steps for _ in range(3))
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        timed(loop.step, 0, args.steps)
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU  # type: ignore[attr-defined]
    each = [(e.self_device_time_total if cuda else e.self_cpu_time_total, e) for e in seen.key_averages()]
    kernels = sorted(
        # Annotations cover spans of kernels.
        (pair for pair in each if pair[0] > 0 and pair[1].device_type == kind and not pair[1].is_user_annotation),
        key=lambda pair: -pair[0],
    )
    total = sum(time for time, _ in kernels)
    rows = [
        [f"{1e-3 * time / args.steps:.3f}", f"{time / total:.1%}", str(e.count // args.steps), e.key[:100]]
        for time, e in kernels[: args.rows]
    ]
    kernel_count = sum(e.count for _, e in kernels) // args.steps
    print(
        f"{args.model}, {args.batch} images, {args.precision}, compile={args.compile}, {device_name(device)}, torch "
        f"{torch.__version__}: {1e3 * seconds:.1f} ms a step, {1e-12 * count / seconds:.3g} TFLOP/s; "
        f"{1e-3 * total / args.steps:.1f} ms in {kernel_count} kernels\n"
    )
    print(markdown_table(["ms", "share", "times", "kernel"], rows))


if __name__ == "__main__":
    main()
