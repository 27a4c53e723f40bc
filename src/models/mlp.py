"""A residual MLP for points in a plane and vectors of measurements."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from src.models.conditioning import Embedding
from src.models.layers import TimeEmbedding, zero_init


class MLP(nn.Module):
    """x (B, D), time (B,) in [0, 1], cond (B, ...) if it takes any -> (B, D * outputs), by `blocks` residual blocks.

    Each block, of `width` features, is LayerNorm, the time embedding as scale and shift, SiLU and two linear layers,
    the last starting at 0. `condition`, given the width of the time embedding, makes the network for conditions, whose
    vector joins that; tokens, if it has any, are not looked at.
    """

    def __init__(
        self,
        features: int,
        width: int = 128,
        blocks: int = 4,
        outputs: int = 1,
        time_scale: float = 1000.0,
        condition: Callable[[int], Embedding] | None = None,
    ) -> None:
        super().__init__()
        if min(features, width, blocks, outputs) < 1:
            raise ValueError(
                f"features, width, blocks and outputs must be at least 1, got {features}, {width}, {blocks}, {outputs}"
            )
        self.time = TimeEmbedding(width, 2 * width, time_scale)
        self.condition = None if condition is None else condition(2 * width)
        self.linear_in = nn.Linear(features, width)
        self.blocks = nn.ModuleList([MLPBlock(width, 2 * width) for _ in range(blocks)])
        self.norm_out = nn.LayerNorm(width)
        self.linear_out = zero_init(nn.Linear(width, features * outputs))

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        emb = self.time(time)
        if self.condition is not None:
            assert cond is not None
            emb = emb + self.condition(cond).vector
        h = self.linear_in(x.to(self.linear_in.weight.dtype))
        for block in self.blocks:
            h = block(h, emb)
        out: Tensor = self.linear_out(F.silu(self.norm_out(h)))
        return out


class MLPBlock(nn.Module):
    """x (B, width), emb (B, emb_dim) -> (B, width)."""

    def __init__(self, width: int, emb_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.emb = nn.Linear(emb_dim, 2 * width)
        self.linear1 = nn.Linear(width, width)
        self.linear2 = zero_init(nn.Linear(width, width))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.emb(F.silu(emb)).chunk(2, dim=-1)
        h = F.silu(self.norm(x) * (1 + scale) + shift)
        out: Tensor = x + self.linear2(F.silu(self.linear1(h)))
        return out
