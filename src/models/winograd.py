"""3x3 convolutions by Winograd's minimal filtering F(4x4, 3x3): 2.25 multiplications per output instead of 9.

For each 6x6 input tile d and 3x3 filter g, the 4x4 outputs are A^T [(G g G^T) * (B^T d B)] A, where * is the
elementwise product. Only 36 matrix products, one per tile position, mix channels.

Source: Lavin & Gray 2016 (arXiv 1509.09308), eq. 8 and sec. 4.3.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

ConvBackend = Literal["auto", "winograd", "torch"]

POINTS = (0.0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)
"""Interpolation points other than infinity, as in oneDNN's F(4x4, 3x3). They halve the error of 0, 1, -1, 2, -2
(compare Barabasz et al. 2018, arXiv 1803.10986)."""


def polynomial(roots: Sequence[float]) -> list[float]:
    """Return the coefficients of prod (x - root) for the powers 0 to 5, lowest power first."""
    coefficients = [1.0]
    for root in roots:
        shifted, scaled = [0.0, *coefficients], [root * c for c in coefficients] + [0.0]
        coefficients = [a - b for a, b in zip(shifted, scaled, strict=True)]
    return coefficients + [0.0] * (6 - len(coefficients))


# The transposed Toom-Cook algorithm: one row or column per point, infinity last.
OTHERS = [[q for q in POINTS if q != p] for p in POINTS]
A_T = [[p**power for p in POINTS] + [float(power == 3)] for power in range(4)]
B_T = [*(polynomial(others) for others in OTHERS), polynomial(POINTS)]
G = [
    [p**power / math.prod(p - q for q in others) for power in range(3)]
    for p, others in zip(POINTS, OTHERS, strict=True)
]
G.append([0.0, 0.0, 1.0])


# The smallest problem on which Winograd is faster, on a CPU with AVX2 and 1 or 2 threads (docs/results.md): channels,
# tiles, and tiles times channels per thread.
MIN_TILES = 32
MIN_CHANNELS, MIN_WORK = 48, 4096
MIN_CHANNELS_FORWARD, MIN_WORK_FORWARD = 96, 8192


class Conv3x3(nn.Conv2d):
    """A zero-padded 3x3 convolution, x (B, C_in, H, W) -> (B, C_out, H, W), by a choice of algorithms.

    - "torch": PyTorch's convolution. In float32 its relative error is 6e-7.
    - "winograd": `winograd` on every device and in every precision. In float32 its relative error is 1.1e-6; half
      precision loses accuracy, since the transforms add numbers of different size.
    - "auto": "winograd" where it is faster (see `winograd_pays`), else "torch".
    """

    def __init__(self, in_channels: int, out_channels: int, backend: ConvBackend = "auto") -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        if backend not in get_args(ConvBackend):
            raise ValueError(f"model.conv_backend={backend} must be auto, winograd or torch")
        self.backend: ConvBackend = backend

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        if self.backend == "winograd" or (self.backend == "auto" and self.winograd_pays(x)):
            return winograd(x, self.weight, self.bias)
        return super().forward(x)

    def winograd_pays(self, x: Tensor) -> bool:
        """Return whether Winograd is faster for x: in float32 or float64 on a CPU, uncompiled, and large enough."""
        b, _, height, width = x.shape
        tiles, channels = num_tiles(height) * num_tiles(width), min(self.in_channels, self.out_channels)
        trains = torch.is_grad_enabled()
        return (
            x.device.type == "cpu"
            and x.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and channels >= (MIN_CHANNELS if trains else MIN_CHANNELS_FORWARD)
            and b * tiles >= MIN_TILES
            and b * tiles * channels >= (MIN_WORK if trains else MIN_WORK_FORWARD) * torch.get_num_threads()
            and 16 * tiles <= 1.5 * height * width  # at most a third of the outputs is padding
        )


def winograd(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `F.conv2d(x, weight, bias, padding=1)` up to rounding, in channels_last.

    x (B, C, H, W), weight (O, C, 3, 3), bias (O,) -> (B, O, H, W).
    """
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
    """Return M X M^T, (q^2, N), for each of the N p-by-p matrices X in x (p^2, N) and M (q, p)."""
    m = x.new_tensor(matrix)
    q, p = m.shape
    half = (m @ x.reshape(p, -1)).view(q, p, -1)
    return torch.matmul(m, half).view(q * q, -1)


class Tiles(torch.autograd.Function):
    """Split x (B, C, H, W) into zero-padded 6x6 tiles that overlap by 2: (36, B * rows * columns * C)."""

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
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Tensor:
        batch, channels, height, width = ctx.size  # type: ignore[attr-defined]
        rows, columns = num_tiles(height), num_tiles(width)
        tiles = grads[0].view(6, 6, batch, rows, columns, channels).permute(2, 3, 0, 4, 1, 5)
        # Tiles are 4 apart: the last 2 rows and columns of each add to the next tile.
        x = tiles.new_zeros(batch, rows + 1, 4, columns + 1, 4, channels)
        x[:, :rows, :, :columns] = tiles[:, :, :4, :, :4]
        x[:, :rows, :, 1:, :2] += tiles[:, :, :4, :, 4:]
        x[:, 1:, :2, :columns] += tiles[:, :, 4:, :, :4]
        x[:, 1:, :2, 1:, :2] += tiles[:, :, 4:, :, 4:]
        x = x.view(batch, 4 * (rows + 1), 4 * (columns + 1), channels)
        return x[:, 1 : height + 1, 1 : width + 1].permute(0, 3, 1, 2)


def num_tiles(size: int) -> int:
    """Return the number of tiles of 4 outputs that cover `size`."""
    return -(-size // 4)
