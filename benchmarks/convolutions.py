"""Where Winograd's convolution pays on this machine: `python -m benchmarks.convolutions`.

Time of the direct one over its own, in turns, forward alone and with the backward pass, and the relative errors of both
in single precision: what the thresholds of `src.models.winograd` stand on.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from src.models.winograd import num_tiles, winograd
from src.viz.tables import markdown_table

SHAPES = [  # (batch, channels in, out, height and width)
    *((16, c, c, 32) for c in (32, 48, 64, 96, 128)),
    *((16, c, c, 16) for c in (64, 96, 128, 256)),
    (16, 256, 128, 16),
    *((b, 128, 128, 8) for b in (4, 8, 16, 64)),
    *((b, c, c, 8) for b, c in ((8, 256), (16, 96), (16, 64), (32, 64), (64, 64))),
    *((b, 256, 256, 4) for b in (16, 32)),
    *((64, c, c, 4) for c in (64, 128, 256)),
    *((64, 64, 64, size) for size in (5, 7, 14)),
]


def ratio(direct: Callable[[], object], other: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Milliseconds of the first, and the median of its time over the other's."""
    pairs = []
    for _ in range(rounds + 2):
        marks = [time.perf_counter_ns()]
        for each in (direct, other):
            each()
            marks.append(time.perf_counter_ns())
        pairs.append((marks[1] - marks[0], marks[2] - marks[1]))
    return statistics.median(a for a, _ in pairs[2:]) / 1e6, statistics.median(a / b for a, b in pairs[2:])


def row(batch: int, c_in: int, c_out: int, size: int, rounds: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    last = torch.channels_last
    x = draw(batch, c_in, size, size).contiguous(memory_format=last).requires_grad_()
    weight = (draw(c_out, c_in, 3, 3) / (3 * c_in**0.5)).contiguous(memory_format=last).requires_grad_()
    bias = torch.zeros(c_out, requires_grad=True)
    upstream = draw(batch, c_out, size, size).contiguous(memory_format=last)

    def direct() -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    def other() -> Tensor:
        return winograd(x, weight, bias)

    with torch.no_grad():
        exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
        errors = [((each() - exact).norm() / exact.norm()).item() for each in (direct, other)]
        forward = ratio(direct, other, rounds)

    def passes(way: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(way(), (x, weight, bias), upstream)

    both = ratio(passes(direct), passes(other), rounds)
    shape = f"{batch} x {c_in} to {c_out} at {size}x{size}"
    cells = [f"{forward[0]:.1f}", f"{forward[1]:.2f}", f"{both[0]:.1f}", f"{both[1]:.2f}"]
    return [shape, str(batch * num_tiles(size) ** 2), *cells, *(f"{error:.1e}" for error in errors)]


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header = ["convolution", "tiles", "forward, ms", "over Winograd's", "both passes, ms", "over Winograd's"]
    rows = [row(*shape, args.rounds) for shape in SHAPES]
    table = markdown_table([*header, "error", "of Winograd"], rows)
    print(f"threads: {args.threads}, torch {torch.__version__}\n\n{table}")


if __name__ == "__main__":
    main()
