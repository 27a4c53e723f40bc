"""A residual MLP for vectors: points in a plane, rows of tables."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from src.models.conditioning import Embedding
from src.models.layers import TimeEmbedding, check_positive, zero_init


class MLP(nn.Module):
    """Map x (B, D), time (B,) in [0, 1] and cond (B, ...) to (B, D * outputs) by `num_res_blocks` residual blocks.

    `condition` maps the width of the time embedding to the embedding of conditions, whose vector is added to the time
    embedding; tokens are ignored.
    """

    def __init__(
        self,
        features: int,
        hidden_size: int = 128,
        num_res_blocks: int = 4,
        outputs: int = 1,
        time_scale: float = 1000.0,
        condition: Callable[[int], Embedding] | None = None,
    ) -> None:
        super().__init__()
        check_positive(features=features, hidden_size=hidden_size, num_res_blocks=num_res_blocks, outputs=outputs)
        self.time = TimeEmbedding(hidden_size, 2 * hidden_size, time_scale)
        self.condition = None if condition is None else condition(2 * hidden_size)
        self.linear_in = nn.Linear(features, hidden_size)
        self.blocks = nn.ModuleList([MLPBlock(hidden_size, 2 * hidden_size) for _ in range(num_res_blocks)])
        self.norm_out = nn.LayerNorm(hidden_size)
        self.linear_out = zero_init(nn.Linear(hidden_size, features * outputs))

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
    """LayerNorm, scale and shift by emb (B, emb_dim), and two linear layers, added to x (B, hidden_size)."""

    def __init__(self, hidden_size: int, emb_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.emb = nn.Linear(emb_dim, 2 * hidden_size)
        self.linear1 = nn.Linear(hidden_size, hidden_size)
        self.linear2 = zero_init(nn.Linear(hidden_size, hidden_size))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.emb(F.silu(emb)).chunk(2, dim=-1)
        h = F.silu(self.norm(x) * (1 + scale) + shift)
        out: Tensor = x + self.linear2(F.silu(self.linear1(h)))
        return out
