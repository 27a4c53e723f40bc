"""Embeddings of conditions: a vector for the time embedding, and tokens for cross-attention."""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models.layers import zero_init


class Embedded(NamedTuple):
    """An embedded condition."""

    vector: Tensor  # (B, dim), to add to the time embedding
    tokens: Tensor | None = None  # (B, L, token_width), for cross-attention
    mask: Tensor | None = None  # (B, L), True for tokens and False for padding, with at least one token per sample


class Embedding(Protocol):
    """A module that embeds conditions (B, ...), including the empty condition.

    `token_width` is the width of its tokens, or None if it returns a vector only.
    """

    token_width: int | None

    def __call__(self, cond: Tensor) -> Embedded: ...


class ClassEmbedding(nn.Module):
    """Embed class indices cond (B,) in [0, num_classes]; the last index is the empty condition.

    Source: Ho & Salimans 2022 (arXiv 2207.12598), sec. 3.2.
    """

    token_width = None

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, dim)

    def forward(self, cond: Tensor) -> Embedded:
        return Embedded(self.table(cond))


class ContinuousEmbedding(nn.Module):
    """Embed cond (B, num_covariates), of unit variance or NaN for the empty condition, by an MLP."""

    token_width = None

    def __init__(self, dim: int, num_covariates: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(num_covariates, dim)
        self.linear2 = nn.Linear(dim, dim)
        self.nothing = nn.Parameter(torch.zeros(dim))

    def forward(self, cond: Tensor) -> Embedded:
        is_null = cond.isnan().any(1, keepdim=True)
        covariates = cond.masked_fill(is_null, 0).to(self.linear1.weight.dtype)
        return Embedded(torch.where(is_null, self.nothing, self.linear2(F.silu(self.linear1(covariates)))))


class TextTransformer(nn.Module):
    """Embed token ids (B, L) by a transformer encoder, trained with the network, into tokens and a vector.

    L <= `max_length` and ids < `vocab_size`. Id 0 is masked padding, except in the first position. The blocks are
    pre-norm with learned positional embeddings. The vector is a projection of the sum of the n tokens over sqrt(n).

    At initialization, blocks are the identity and the vector has about unit variance, so that captions differ. Random
    blocks would make all tokens similar, and a mean would make the vector small; the network would not learn from it.

    Source: Xiong et al. 2020 (arXiv 2002.04745) for pre-norm.
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
        if num_layers < 1:
            raise ValueError(f"conditioning.embed.num_layers={num_layers} must be at least 1; 2 is usual")
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"conditioning.embed.num_heads={num_heads} must divide conditioning.embed.{hidden_size=}")
        self.token_width = hidden_size
        self.table = nn.Embedding(vocab_size, hidden_size)
        self.positions = nn.Parameter(torch.empty(max_length, hidden_size))
        nn.init.normal_(self.positions, std=0.1)
        self.blocks = nn.ModuleList(_Block(hidden_size, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.vector = _to_vector(hidden_size, dim)

    def forward(self, cond: Tensor) -> Embedded:
        mask = _unmask_first(cond != 0)
        tokens = self.table(cond) + self.positions[: cond.shape[1]]
        for block in self.blocks:
            tokens = block(tokens, mask)
        tokens = self.norm(tokens)
        return Embedded(self.vector(_scaled_sum(tokens, mask)), tokens, mask)


class TextProjection(nn.Module):
    """Project the outputs of a frozen text encoder, (B, L, features), to tokens of width `hidden_size` and a vector.

    Rows of zeros are masked padding, except the first row. The vector is a projection of the normalized token mean.
    """

    def __init__(self, dim: int, features: int | None, hidden_size: int = 256) -> None:
        super().__init__()
        if features is None:
            raise ValueError("conditioning.embed.features=null must be the width of the encoder; src.train infers it")
        self.token_width = hidden_size
        self.norm1 = nn.LayerNorm(features)
        self.linear = nn.Linear(features, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.vector = _to_vector(hidden_size, dim)

    def forward(self, cond: Tensor) -> Embedded:
        mask = _unmask_first(cond.any(2))
        tokens = self.norm2(self.linear(self.norm1(cond.to(self.linear.weight.dtype))))
        # Rows of one encoder are correlated, so that their sum grows with n: normalize instead of scaling.
        return Embedded(self.vector(F.layer_norm(_scaled_sum(tokens, mask), (self.token_width,))), tokens, mask)


class _Block(nn.Module):
    """A transformer block: self-attention over unmasked tokens (B, L, hidden_size), then an MLP, both residual."""

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
        b, length, hidden_size = x.shape
        query, keys, values = self.qkv(self.norm1(x)).view(b, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        # (B, num_heads, L, hidden_size / num_heads)
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask[:, None, None])
        x = x + self.out(attended.transpose(1, 2).reshape(b, length, hidden_size))
        out: Tensor = x + self.linear2(F.gelu(self.linear1(self.norm2(x))))
        return out


def _unmask_first(mask: Tensor) -> Tensor:
    """Return `mask` (B, L) with the first token always unmasked, since attention over zero tokens is NaN."""
    return torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], dim=1)


def _scaled_sum(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over the n unmasked tokens (B, L, hidden_size), divided by sqrt(n): (B, hidden_size)."""
    weights = mask.to(tokens.dtype)[:, :, None]
    return (tokens * weights).sum(1) / weights.sum(1).sqrt()


def _to_vector(hidden_size: int, dim: int) -> nn.Linear:
    """Return a linear layer that preserves the variance of its input."""
    linear = nn.Linear(hidden_size, dim)
    nn.init.normal_(linear.weight, std=hidden_size**-0.5)
    return linear
