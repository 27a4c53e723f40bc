"""3x3 convolutions on a CPU in 2.25 multiplications a pixel instead of 9: Winograd's minimal filtering, F(4x4, 3x3).

Of each 6x6 tile d of the input and each 3x3 filter g, the 4x4 outputs are A^T [(G g G^T) * (B^T d B)] A, where * is by
element (Lavin & Gray 2016, arXiv 1509.09308, eq. 8 and sec. 4.3): all that mixes channels are 36 products of
matrices, one for each place of a tile. What PyTorch calls on a CPU does not do it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

POINTS = (0.0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)
"""Where polynomials are evaluated, besides infinity. Points decide the error (Barabasz et al. 2018, arXiv 1803.10986);
these, which oneDNN has for its F(4x4, 3x3), have half of that of 0, 1, -1, 2, -2 here."""


def polynomial(roots: Sequence[float]) -> list[float]:
    """The coefficients of prod (x - root), that of the lowest power first, for the powers up to 5."""
    coefficients = [1.0]
    for root in roots:
        shifted, scaled = [0.0, *coefficients], [root * c for c in coefficients] + [0.0]
        coefficients = [a - b for a, b in zip(shifted, scaled, strict=True)]
    return coefficients + [0.0] * (6 - len(coefficients))


# The algorithm of Toom and Cook, transposed: of each, a row or column belongs to a point, the last to infinity.
OTHERS = [[q for q in POINTS if q != p] for p in POINTS]
A_T = [[p**power for p in POINTS] + [float(power == 3)] for power in range(4)]
B_T = [*(polynomial(others) for others in OTHERS), polynomial(POINTS)]
G = [
    [p**power / math.prod(p - q for q in others) for power in range(3)]
    for p, others in zip(POINTS, OTHERS, strict=True)
]
G.append([0.0, 0.0, 1.0])


class Least(NamedTuple):
    """From where on it pays, on an AVX2 machine with one and two threads (docs/results.md)."""

    channels: int
    """Where the products begin to outweigh the transforms."""
    work: int
    """Tiles times channels for each thread: where the products begin to outweigh what a call costs."""


LEAST_TILES = 32
"""Where they begin to outweigh the filters, whose transforms have four times their weights."""
FORWARD, BOTH_PASSES = Least(channels=96, work=8192), Least(channels=48, work=4096)


class Conv3x3(nn.Conv2d):
    """x (B, C_in, H, W) -> (B, C_out, H, W): a 3x3 convolution with a border of zeros, by the faster way.

    On a CPU, where it pays, Winograd's; equal to the direct one up to rounding. In float32 its relative error is 1.1e-6
    where the other's is 6e-7.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return winograd(x, self.weight, self.bias) if self.winograd_pays(x) else super().forward(x)

    def winograd_pays(self, x: Tensor) -> bool:
        """Never where a compiler sees the network, which knows the direct one only, nor in half precision."""
        b, _, height, width = x.shape
        tiles, channels = num_tiles(height) * num_tiles(width), min(self.in_channels, self.out_channels)
        least = BOTH_PASSES if torch.is_grad_enabled() else FORWARD
        return (
            x.device.type == "cpu"
            and x.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and channels >= least.channels
            and b * tiles >= LEAST_TILES
            and b * tiles * channels >= least.work * torch.get_num_threads()
            and 16 * tiles <= 1.5 * height * width  # the rest of them is padding
        )


def winograd(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, C, H, W), weight (O, C, 3, 3), bias (O,) -> (B, O, H, W), with channels last."""
    batch, channels, height, width = x.shape
    out_channels = len(weight)
    rows, columns = num_tiles(height), num_tiles(width)
    filters = sandwich(G, weight.permute(2, 3, 0, 1).reshape(9, -1)).view(36, out_channels, channels)
    tiles = sandwich(B_T, Tiles.apply(x)).view(36, -1, channels)
    products = torch.bmm(tiles, filters.transpose(1, 2))  # (36, B rows columns, O)
    y = sandwich(A_T, products.view(36, -1)).view(4, 4, batch, rows, columns, out_channels)
    y = y.permute(2, 3, 0, 4, 1, 5).reshape(batch, 4 * rows, 4 * columns, out_channels) + bias
    return y[:, :height, :width].permute(0, 3, 1, 2)


def sandwich(matrix: list[list[float]], x: Tensor) -> Tensor:
    """M x M^T for each of the N p-by-p matrices in x (p^2, N) and M (q, p): (q^2, N)."""
    m = x.new_tensor(matrix)
    q, p = m.shape
    half = (m @ x.reshape(p, -1)).view(q, p, -1)
    return torch.matmul(m, half).view(q * q, -1)


class Tiles(torch.autograd.Function):
    """x (B, C, H, W) -> (36, B rows columns C): the places of its 6x6 tiles, which overlap by 2, beyond the edges 0."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        batch, channels, height, width = ctx.size = x.shape  # type: ignore[attr-defined]
        rows, columns = num_tiles(height), num_tiles(width)
        edges = (0, 0, 1, 4 * columns + 1 - width, 1, 4 * rows + 1 - height)
        padded = F.pad(x.permute(0, 2, 3, 1), edges).contiguous()
        b, h, w, c = padded.stride()
        tiles = padded.as_strided((6, 6, batch, rows, columns, channels), (h, w, b, 4 * h, 4 * w, c))
        return tiles.reshape(36, -1)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        batch, channels, height, width = ctx.size  # type: ignore[attr-defined]
        rows, columns = num_tiles(height), num_tiles(width)
        tiles = gradients[0].view(6, 6, batch, rows, columns, channels).permute(2, 3, 0, 4, 1, 5)
        # In steps of 4, each tile adds to the one after it what it overlaps with.
        x = tiles.new_zeros(batch, rows + 1, 4, columns + 1, 4, channels)
        x[:, :rows, :, :columns] = tiles[:, :, :4, :, :4]
        x[:, :rows, :, 1:, :2] += tiles[:, :, :4, :, 4:]
        x[:, 1:, :2, :columns] += tiles[:, :, 4:, :, :4]
        x[:, 1:, :2, 1:, :2] += tiles[:, :, 4:, :, 4:]
        x = x.view(batch, 4 * (rows + 1), 4 * (columns + 1), channels)
        return x[:, 1 : height + 1, 1 : width + 1].permute(0, 3, 1, 2)


def num_tiles(size: int) -> int:
    """Tiles of four outputs that cover `size`."""
    return -(-size // 4)
