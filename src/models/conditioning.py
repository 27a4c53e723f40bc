"""Conditions in networks: what was asked for -> a vector that joins the time embedding, and tokens to attend to."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


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

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.table = nn.Embedding(classes + 1, dim)

    def forward(self, cond: Tensor) -> Embedded:
        return Embedded(self.table(cond))


class MeasuredEmbedding(nn.Module):
    """cond (B, K) of deviation about 1, or NaN for nothing -> a vector, by an MLP of the values."""

    token_width = None

    def __init__(self, dim: int, values: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(values, dim)
        self.linear2 = nn.Linear(dim, dim)
        self.nothing = nn.Parameter(torch.zeros(dim))

    def forward(self, cond: Tensor) -> Embedded:
        missing = cond.isnan().any(1, keepdim=True)
        values = cond.masked_fill(missing, 0).to(self.linear1.weight.dtype)
        return Embedded(torch.where(missing, self.nothing, self.linear2(nn.functional.silu(self.linear1(values)))))
