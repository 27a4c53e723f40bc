"""Layers of the networks: time embedding, residual block, self- and cross-attention, resampling."""

import math
from typing import Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models.winograd import Conv3x3, ConvBackend

TimeConditioning = Literal["add", "scale_shift"]
Resample = Literal["up", "down"]
M = TypeVar("M", bound=nn.Module)


def sinusoidal_embedding(time: Tensor, dim: int, scale: float = 1000.0, max_period: float = 10_000.0) -> Tensor:
    """Return sines, then cosines, of scale * time at geometric frequencies: time (B,) in [0, 1] -> (B, dim).

    Always float32: bfloat16 rounds steps 500 and 501 of 1000 to the same value.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), sec. 3.5, in the layout of Ho et al. 2020.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=time.device) / max(half - 1, 1)
    angle = scale * time.float()[:, None] * torch.exp(-math.log(max_period) * exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class TimeEmbedding(nn.Module):
    """Map time (B,) in [0, 1] to (B, dim): `width` sinusoidal features through a two-layer MLP."""

    def __init__(self, width: int, dim: int, time_scale: float = 1000.0) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"the time embedding width={width} must be even; make model.model_channels even")
        self.width = width
        self.time_scale = time_scale
        self.linear1 = nn.Linear(width, dim)
        self.linear2 = nn.Linear(dim, dim)

    def forward(self, time: Tensor) -> Tensor:
        sinusoids = sinusoidal_embedding(time, self.width, self.time_scale)
        hidden: Tensor = F.silu(self.linear1(sinusoids.to(self.linear1.weight.dtype)))
        out: Tensor = self.linear2(hidden)
        return out


class ResidualBlock(nn.Module):
    """Map x (B, C_in, H, W) and emb (B, E) to (B, C_out, H', W').

    GroupNorm, SiLU and convolution, twice (Ho et al. 2020, app. B). The time embedding is added between the two, or
    scales and shifts the second norm (`time_conditioning`). `resample` halves or doubles H and W inside the block, as
    in BigGAN and ADM (Dhariwal & Nichol 2021).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int,
        groups: int,
        time_conditioning: TimeConditioning = "add",
        dropout: float = 0.0,
        resample: Resample | None = None,
        conv_backend: ConvBackend = "auto",
    ) -> None:
        super().__init__()
        if time_conditioning not in get_args(TimeConditioning):
            raise ValueError(f"model.time_conditioning={time_conditioning} must be add or scale_shift")
        self.time_conditioning: TimeConditioning = time_conditioning
        self.resample: Resample | None = resample
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = Conv3x3(in_channels, out_channels, conv_backend)
        self.emb = nn.Linear(emb_dim, out_channels * (2 if time_conditioning == "scale_shift" else 1))
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(Conv3x3(out_channels, out_channels, conv_backend))
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            x, h = resample(x, self.resample), resample(h, self.resample)
        h = self.conv1(h)
        emb = self.emb(F.silu(emb))[:, :, None, None]
        if self.time_conditioning == "add":
            h = self.norm2(h + emb)
        else:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        h = self.conv2(self.dropout(F.silu(h)))
        out: Tensor = self.shortcut(x) + h
        return out


class SelfAttention(nn.Module):
    """Add multi-head self-attention over the positions of x (B, C, H, W)."""

    def __init__(self, channels: int, groups: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, H W, C)
        qkv = self.qkv(tokens).view(b, -1, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv)  # (B, heads, H W, C / heads)
        out: Tensor = self.out(attended.transpose(1, 2).reshape(b, -1, c))
        return x + out.transpose(1, 2).view(b, c, height, width)


class CrossAttention(nn.Module):
    """Add multi-head attention from the positions of x (B, C, H, W) to tokens (B, L, token_width).

    `mask` (B, L) is True for tokens and False for padding, with at least one token per sample; None means no padding.
    """

    def __init__(self, channels: int, groups: int, num_heads: int, token_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(groups, channels)
        self.query = nn.Linear(channels, channels)
        self.kv = nn.Linear(token_width, 2 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        b, c, height, width = x.shape
        query = self.query(self.norm(x).flatten(2).transpose(1, 2))  # (B, H W, C)
        query = query.view(b, -1, self.num_heads, c // self.num_heads).transpose(1, 2)
        keys, values = self.kv(tokens).view(b, -1, 2, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        attn_mask = None if mask is None else mask[:, None, None]  # the same for all heads and positions
        # (B, heads, H W, C / heads)
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=attn_mask)
        out: Tensor = self.out(attended.transpose(1, 2).reshape(b, -1, c))
        return x + out.transpose(1, 2).view(b, c, height, width)


class Downsample(nn.Module):
    """Halve H and W of (B, C, H, W) by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class Upsample(nn.Module):
    """Double H and W of (B, C, H, W) by nearest neighbors, then apply a convolution."""

    def __init__(self, channels: int, conv_backend: ConvBackend = "auto") -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels, conv_backend)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(resample(x, "up"))
        return out


def resample(x: Tensor, direction: Resample) -> Tensor:
    """Double the height and width by nearest neighbors, or halve them by averaging."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if direction == "up" else F.avg_pool2d(x, 2)


def fit_groups(channels: int, max_groups: int = 32, min_channels: int = 4) -> int:
    """Return the largest divisor of `channels` up to `max_groups` with at least `min_channels` per group, or 1."""
    allowed = [g for g in range(1, max_groups + 1) if channels % g == 0 and channels // g >= min_channels]
    return max(allowed, default=1)


def zero_init(module: M) -> M:
    """Set every parameter of `module` to 0, so that its residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
