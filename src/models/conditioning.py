"""Conditions in networks: what was asked for -> a vector that joins the time embedding, and tokens to attend to."""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models.layers import zero_init


class Embedded(NamedTuple):
    """A condition as networks use it."""

    vector: Tensor
    """(B, dim), added to the time embedding."""
    tokens: Tensor | None = None
    """(B, L, token_width), which cross-attention attends to."""
    mask: Tensor | None = None
    """(B, L) bool: which of them are there, at least one of each sample's."""


class Embedding(Protocol):
    """A network for conditions (B, ...), among them the one that asks for nothing.

    `token_width` is that of its tokens; None for one that gives a vector alone.
    """

    token_width: int | None

    def __call__(self, cond: Tensor) -> Embedded: ...


class ClassEmbedding(nn.Module):
    """cond (B,) in 0..classes -> a vector for each class and one, the last, for none (Ho & Salimans 2022, sec. 3.2)."""

    token_width = None

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, dim)

    def forward(self, cond: Tensor) -> Embedded:
        return Embedded(self.table(cond))


class ContinuousEmbedding(nn.Module):
    """cond (B, K) of deviation about 1, or NaN for nothing -> a vector, by an MLP of the values."""

    token_width = None

    def __init__(self, dim: int, num_values: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(num_values, dim)
        self.linear2 = nn.Linear(dim, dim)
        self.nothing = nn.Parameter(torch.zeros(dim))

    def forward(self, cond: Tensor) -> Embedded:
        missing = cond.isnan().any(1, keepdim=True)
        values = cond.masked_fill(missing, 0).to(self.linear1.weight.dtype)
        return Embedded(torch.where(missing, self.nothing, self.linear2(F.silu(self.linear1(values)))))


class TextTransformer(nn.Module):
    """Token ids (B, L) -> what a transformer encoder, trained along, makes of each, and a vector for all of them.

    L <= `max_length` and ids < `vocab_size`; id 0 is padding, which nothing attends to, and the first id is never padding.
    Pre-norm blocks (Xiong et al. 2020) and learned positions; the vector is the sum over n tokens, over sqrt(n), made
    `dim` long.

    Before training, words are far apart, blocks are the identity, and the vector has about deviation 1: what a caption
    says is a large part of what it gives. Random blocks would make all tokens alike, and a mean the vector small; at
    high noise, where there is nothing else to go by, a network does not learn from that.
    """

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        max_length: int,
        hidden_size: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        if num_layers < 1 or num_heads < 1 or hidden_size % num_heads:
            raise ValueError(
                f"the text's transformer needs num_layers >= 1 and a hidden_size that num_heads divide, got num_layers={num_layers}, "
                f"hidden_size={hidden_size}, num_heads={num_heads}: change conditioning.embed"
            )
        self.token_width = hidden_size
        self.table = nn.Embedding(vocab_size, hidden_size)
        self.positions = nn.Parameter(torch.empty(max_length, hidden_size))
        nn.init.normal_(self.positions, std=0.1)
        self.blocks = nn.ModuleList(_Block(hidden_size, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.vector = _to_vector(hidden_size, dim)

    def forward(self, cond: Tensor) -> Embedded:
        mask = _there(cond != 0)
        tokens = self.table(cond) + self.positions[: cond.shape[1]]
        for block in self.blocks:
            tokens = block(tokens, mask)
        tokens = self.norm(tokens)
        return Embedded(self.vector(_sum(tokens, mask)), tokens, mask)


class TextProjection(nn.Module):
    """What a frozen encoder made of texts, (B, L, features) -> tokens `hidden_size` wide, and a vector for all of them.

    Rows of zeros are padding, which nothing attends to; the first row is never padding. Each row is normalised, since
    encoders differ in scale; the vector is the mean over tokens, normalised and made `dim` long.
    """

    def __init__(self, dim: int, features: int | None, hidden_size: int = 256) -> None:
        super().__init__()
        if features is None:
            raise ValueError("conditioning=pretrained needs features, the width of the encoder, found as a run starts")
        self.token_width = hidden_size
        self.norm1 = nn.LayerNorm(features)
        self.linear = nn.Linear(features, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.vector = _to_vector(hidden_size, dim)

    def forward(self, cond: Tensor) -> Embedded:
        mask = _there(cond.any(2))
        tokens = self.norm2(self.linear(self.norm1(cond.to(self.linear.weight.dtype))))
        # Rows of one encoder have much in common, so that their sum grows with their number: normalised, not scaled.
        return Embedded(self.vector(F.layer_norm(_sum(tokens, mask), (self.token_width,))), tokens, mask)


class _Block(nn.Module):
    """Self-attention among the tokens (B, L, hidden_size) that are there, then an MLP of each, both residual."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = zero_init(nn.Linear(hidden_size, hidden_size))
        self.norm2 = nn.LayerNorm(hidden_size)
        self.linear1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.linear2 = zero_init(nn.Linear(4 * hidden_size, hidden_size))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, max_length, hidden_size = x.shape
        query, keys, values = self.qkv(self.norm1(x)).view(b, max_length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        # (B, num_heads, L, hidden_size / num_heads)
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask[:, None, None])
        x = x + self.out(attended.transpose(1, 2).reshape(b, max_length, hidden_size))
        out: Tensor = x + self.linear2(F.gelu(self.linear1(self.norm2(x))))
        return out


def _there(mask: Tensor) -> Tensor:
    """`mask` (B, L) with the first token of each sample there whatever it is: attention to nothing would be NaN."""
    return torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], dim=1)


def _sum(tokens: Tensor, mask: Tensor) -> Tensor:
    """The sum over the n tokens (B, L, hidden_size) that are there, as (B, hidden_size), over sqrt(n).

    It has the deviation of one of them if they are uncorrelated.
    """
    weights = mask.to(tokens.dtype)[:, :, None]
    return (tokens * weights).sum(1) / weights.sum(1).sqrt()


def _to_vector(hidden_size: int, dim: int) -> nn.Linear:
    """Linear, of the deviation of what it is given."""
    linear = nn.Linear(hidden_size, dim)
    nn.init.normal_(linear.weight, std=hidden_size**-0.5)
    return linear
