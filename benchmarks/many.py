"""Measure the sampling throughput of a GPU in float32, in bf16 and compiled: `python -m benchmarks.many`.

Samples batches of 1,024 images in 20 steps from a network with random weights. The time includes noise, network and
sampler, not files. "Outside" is the share of time outside network calls, whose time is measured separately.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from benchmarks.training import compose
from src.config.search_path import CONF
from src.evaluation.quality import time_network_call
from src.runs import components
from src.runs.build import build, close_run
from src.runs.open import pick_device
from src.training.compile import PRECISIONS, compile_network
from src.training.module import DiffusionModule
from src.training.provenance import device_name
from src.viz.tables import markdown_table


def main() -> None:
    """Print the results as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("unet_small", "unet_ddpm"), default="unet_ddpm")
    parser.add_argument("--batch", type=int, default=1024, help="images per batch")
    parser.add_argument("--batches", type=int, default=5, help="timed batches, after one warmup batch")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--samplers", nargs="+", default=["dpmpp_2m", "dpmpp_2m_sde"])
    parser.add_argument("--modes", nargs="+", default=["32-true", "bf16-mixed", "bf16-mixed compiled"])
    args = parser.parse_args()
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        run = build(compose(args.model, 1, "32-true", Path(folder) / "run"))
        close_run(run)
    module = run.module.to(device).eval()
    assert isinstance(module, DiffusionModule)
    for p in module.parameters():
        p.data += 0.02 * torch.randn_like(p)
    rows = []
    for mode, name in itertools.product(args.modes, args.samplers):
        cfg = OmegaConf.load(CONF / "sampler" / f"{name}.yaml")
        assert isinstance(cfg, DictConfig)
        sampler = components.build_sampler(cfg)._replace(steps=args.steps)
        precision, *compilation = mode.split()
        module.sampling_dtype = PRECISIONS[precision]
        module.compiled_sampling = compile_network(module.net, bool(compilation))
        seconds = []
        for k in range(args.batches + 1):
            start = time.perf_counter()
            *_, x = module.sample(range(k * args.batch, (k + 1) * args.batch), 0, sampler, args.batch)
            x.sum().item()  # waits for the device
            seconds.append(time.perf_counter() - start)
        rate = args.batches * args.batch / sum(seconds[1:])
        calls = module.network_calls(sampler)
        outside = 1 - time_network_call(module, args.batch) * calls * args.batches / sum(seconds[1:])
        cells = [f"{seconds[0]:.1f}", f"{rate:.0f}", f"{50_000 / rate:.0f}", f"{outside:.0%}"]
        rows.append([mode, name, str(calls), *cells])
    print(f"{args.model}, batches of {args.batch}, {device_name(device)}, torch {torch.__version__}\n")
    header = ["mode", "sampler", "calls", "first batch, s", "images/s", "50,000 images, s", "outside"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
