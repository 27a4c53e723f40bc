"""Attention of tokens (B, L, C) with fixed or rotary positions, and norms without weights, for transformers."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models.layers import zero_init

Norm = Literal["rms", "layer"]

THETA = 100.0
"""The period of the slowest rotary frequency is 2 pi times this many patches, as in DINOv3 (arXiv 2508.10104)."""


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
        both, value = qkv.split((2, 1), dim=2)  # queries and keys share the kernels of their norms and rotations
        if isinstance(self.query_norm, nn.RMSNorm) and isinstance(self.key_norm, nn.RMSNorm):
            weights = torch.stack([self.query_norm.weight, self.key_norm.weight])[:, None]
            both = rms_norm(both, 1e-6) * weights.to(both.dtype)
        if rotation is not None:
            both = rotate(both, rotation)
        query, key, value = (
            each.transpose(1, 2) for each in (*both.unbind(2), value.squeeze(2))
        )  # (B, heads, L, C / heads)
        attn_mask = None if mask is None else mask[:, None, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)
        out: Tensor = self.out(attended.transpose(1, 2).reshape(b, length, c))
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
        attn_mask = None if mask is None else mask[:, None, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)
        out: Tensor = self.out(attended.transpose(1, 2).reshape(b, length, c))
        return out


def make_norm(kind: Norm, width: int, eps: float = 1e-6) -> nn.Module:
    """Return a norm without weights: the modulation scales and shifts it."""
    return TokenNorm(eps) if kind == "rms" else nn.LayerNorm(width, eps=eps, elementwise_affine=False)


class TokenNorm(nn.Module):
    """An RMS norm of the last dimension without weights."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Return x over the root mean square of its last dimension, by fewer passes over memory in float32 on a CPU."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling():
        out: Tensor = _RMSNorm.apply(x, eps)
        return out
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def swiglu(h: Tensor) -> Tensor:
    """Return silu(a) b for the halves a and b of the last dimension. Source: Shazeer 2020 (arXiv 2002.05202), eq. 6."""
    if h.device.type == "cpu" and not torch.compiler.is_compiling():
        out: Tensor = _SwiGLU.apply(h)
        return out
    gate, value = h.chunk(2, dim=-1)
    return F.silu(gate) * value


class _SwiGLU(torch.autograd.Function):
    """Write both halves of the gradient into one tensor."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        gate, value = h.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(h, activated)
        return activated * value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        h, activated = ctx.saved_tensors
        gate, value = h.chunk(2, dim=-1)
        result: Tensor = torch.empty_like(h)
        of_gate, of_value = result.chunk(2, dim=-1)
        torch.mul(gradient, activated, out=of_value)
        torch.ops.aten.silu_backward.grad_input(gradient * value, gate, grad_input=of_gate)
        return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        squares: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
        scale = (squares / x.shape[-1] + eps).rsqrt()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        along = (gradient * y).mean(-1, keepdim=True)
        return torch.addcmul(gradient, y, along, value=-1).mul_(scale), None


def rotary_table(grid: Sequence[int], head_size: int, device: torch.device) -> Tensor:
    """Return cosine and sine of the angle of each pair of a head's channels for each position, (2, L, head_size / 2).

    The pairs are divided equally among the axes, with geometric frequencies from 1 to 1 / `THETA`.

    Source: Su et al. 2021 (arXiv 2104.09864), eq. 15, along each axis.
    """
    count = head_size // 2 // len(grid)
    frequency = THETA ** (-torch.arange(count, dtype=torch.float32, device=device) / max(count - 1, 1))
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(grid), 1)
    angles = (places * frequency).flatten(1)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate pairs of channels of the first tokens of x (B, L, ..., D) by `rotation`, of `rotary_table`.

    Channel k forms a pair with channel k + D / 2. Tokens after the first ones have no position.
    """
    length = rotation.shape[1]
    cos, sin = rotation.view(2, length, *[1] * (x.ndim - 3), -1)
    turned = _Rotation.apply(x[:, :length].float(), cos, sin).to(x.dtype)
    out: Tensor = turned if length == x.shape[1] else torch.cat([turned, x[:, length:]], dim=1)
    return out


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back, which saves the intermediate values of the products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        [torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(first * sin, second, cos)], dim=-1
    )


def sincos_positions(grid: Sequence[int], width: int, device: torch.device) -> Tensor:
    """Return fixed embeddings of the positions of a grid, (L, width): sines and cosines of each axis, the last first.

    Source: Dosovitskiy et al. 2021 (arXiv 2010.11929), app. D.4, in the layout of MAE and DiT.
    """
    count = width // len(grid) // 2
    frequency = 10_000.0 ** (-torch.arange(count, dtype=torch.float64, device=device) / count)
    axes = [torch.arange(n, dtype=torch.float64, device=device) for n in grid]
    places = torch.meshgrid(*axes, indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in reversed(places)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()
