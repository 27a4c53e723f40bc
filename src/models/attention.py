"""Attention of tokens (B, L, C) with fixed or rotary positions, and norms without weights, for transformers."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models.layers import attend, zero_init

Norm = Literal["rms", "layer"]

THETA = 100.0
"""The period of the slowest rotary frequency is 2 pi times this many patches (Heo et al. 2024, arXiv 2403.13298)."""


class RotaryAttention(nn.Module):
    """Multi-head self-attention of tokens x (B, L, C), with rotary positions of the first tokens."""

    def __init__(self, channels: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.query_norm, self.key_norm = (
            nn.RMSNorm(channels // num_heads, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, rotation: Tensor | None, mask: Tensor | None = None) -> Tensor:
        b, length, c = x.shape
        qkv = self.qkv(x).view(b, length, 3, self.num_heads, c // self.num_heads)
        query, key, value = qkv.unbind(2)  # (B, L, heads, C / heads)
        query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        out: Tensor = self.out(attend(query, key, value, mask))
        return out


class TokenAttention(nn.Module):
    """Multi-head attention from x (B, L, C) to tokens (B, M, token_width), which starts at 0."""

    def __init__(self, channels: int, num_heads: int, token_width: int, norm: Norm) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = make_norm(norm, channels)
        self.query = nn.Linear(channels, channels)
        self.kv = nn.Linear(token_width, 2 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        b, length, c = x.shape
        heads = (self.num_heads, c // self.num_heads)
        query = self.query(self.norm(x)).view(b, length, *heads).transpose(1, 2)
        key, value = self.kv(tokens).view(b, -1, 2, *heads).permute(2, 0, 3, 1, 4)
        out: Tensor = self.out(attend(query, key, value, mask))
        return out


def make_norm(kind: Norm, width: int, eps: float = 1e-6) -> nn.Module:
    """Return a norm without weights: the modulation scales and shifts it."""
    make = nn.RMSNorm if kind == "rms" else nn.LayerNorm
    return make(width, eps=eps, elementwise_affine=False)


def rotary_table(grid: Sequence[int], head_size: int, device: torch.device) -> Tensor:
    """Return cosine and sine of the angle of each pair of a head's channels for each position, (2, L, head_size / 2).

    The pairs are divided equally among the axes, with geometric frequencies from 1 to 1 / `THETA`. Those that remain
    have the angle 0.

    Source: Su et al. 2021 (arXiv 2104.09864), eq. 15, along each axis.
    """
    count = head_size // 2 // len(grid)
    frequency = THETA ** (-torch.arange(count, dtype=torch.float32, device=device) / max(count - 1, 1))
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(grid), 1)
    angles = (places * frequency).flatten(1)
    angles = F.pad(angles, (0, head_size // 2 - angles.shape[1]))
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate pairs of channels of the first tokens of x (B, L, ..., D) by `rotation`, of `rotary_table`.

    Channel k forms a pair with channel k + D / 2. Tokens after the first ones have no position.
    """
    length = rotation.shape[1]
    cos, sin = rotation.view(2, length, *[1] * (x.ndim - 3), -1)
    first, second = x[:, :length].float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)
    return turned if length == x.shape[1] else torch.cat([turned, x[:, length:]], dim=1)


def sincos_positions(grid: Sequence[int], width: int, device: torch.device) -> Tensor:
    """Return fixed embeddings of the positions of a grid, (L, width): sines and cosines of each axis, the last first.

    Source: Dosovitskiy et al. 2021 (arXiv 2010.11929), app. D.4, in the layout of MAE and DiT.
    """
    count = width // len(grid) // 2
    frequency = 10_000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    axes = [torch.arange(n, dtype=torch.float64) for n in grid]
    places = torch.meshgrid(*axes, indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in reversed(places)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float().to(device)
