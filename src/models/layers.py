"""Layers of the networks: time embedding, residual block, self- and cross-attention, resampling.

Feature maps have shape (B, C, *size), where size is (L,) for signals, (H, W) for images and (D, H, W) for volumes.
"""

import math
from collections.abc import Sequence
from typing import Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models.winograd import Conv3x3, ConvBackend

TimeConditioning = Literal["add", "scale_shift"]
Resample = Literal["up", "down"]
M = TypeVar("M", bound=nn.Module)

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
"""The convolution for each number of dimensions of a feature map."""
AVG_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def shape_of_data(channels: int | None, image_size: int | Sequence[int] | None) -> tuple[int, tuple[int, ...]]:
    """Return the channels and the sides of the data; one number is the side of a square image.

    Raises ValueError if one is missing.
    """
    if channels is None or image_size is None:
        raise ValueError(
            f"model.channels={channels} and model.image_size={image_size} must be those of the data; src.train infers "
            "them"
        )
    return channels, (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)


def sinusoidal_embedding(
    time: Tensor, dim: int, scale: float = 1000.0, offset: float = 0.0, freq_shift: int = 1
) -> Tensor:
    """Return sines, then cosines, of scale * time + offset at geometric frequencies: time (B,) in [0, 1] -> (B, dim).

    The lowest frequency is 1 / 10,000 with `freq_shift` 1 (Ho et al. 2020), and the next lower one with 0 (ADM).
    Always float32: bfloat16 rounds steps 500 and 501 of 1000 to the same value.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), sec. 3.5, in the layout of Ho et al. 2020.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=time.device) / max(half - freq_shift, 1)
    position = scale * time.float()[:, None]
    if offset:
        position = position + offset
    angle = position * torch.exp(-math.log(10_000.0) * exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class TimeEmbedding(nn.Module):
    """Map time (B,) in [0, 1] to (B, dim): `width` sinusoidal features through a two-layer MLP."""

    def __init__(
        self, width: int, dim: int, time_scale: float = 1000.0, time_offset: float = 0.0, freq_shift: int = 1
    ) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"the time embedding width={width} must be even; make model.model_channels even")
        self.width = width
        self.time_scale = time_scale
        self.time_offset = time_offset
        self.freq_shift = freq_shift
        self.linear1 = nn.Linear(width, dim)
        self.linear2 = nn.Linear(dim, dim)

    def forward(self, time: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the embedding of time (B,); `cond` (B, dim) is added to the hidden layer before its nonlinearity."""
        sinusoids = sinusoidal_embedding(
            time, self.width, self.time_scale, offset=self.time_offset, freq_shift=self.freq_shift
        )
        hidden: Tensor = self.linear1(sinusoids.to(self.linear1.weight.dtype))
        out: Tensor = self.linear2(F.silu(hidden if cond is None else hidden + cond))
        return out


class ResidualBlock(nn.Module):
    """Map x (B, C_in, *size) and emb (B, E) to (B, C_out, *size'), for a size of `dims` dimensions.

    GroupNorm, SiLU and convolution, twice (Ho et al. 2020, app. B). The time embedding is added between the two, or
    scales and shifts the second norm (`time_conditioning`); with `emb_dim` None there is none. `resample` halves or
    doubles the size inside the block, as in BigGAN and ADM (Dhariwal & Nichol 2021); with `resample_proj`, its shortcut
    has a 1x1 convolution even if C_in = C_out. The output is multiplied by `skip_scale` (Song et al. 2021, arXiv
    2011.13456, app. H).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int | None,
        groups: int,
        time_conditioning: TimeConditioning = "add",
        dropout: float = 0.0,
        resample: Resample | None = None,
        conv_backend: ConvBackend = "auto",
        dims: int = 2,
        norm_eps: float = 1e-5,
        skip_scale: float = 1.0,
        resample_proj: bool = False,
    ) -> None:
        super().__init__()
        if time_conditioning not in get_args(TimeConditioning):
            raise ValueError(f"model.time_conditioning={time_conditioning} must be add or scale_shift")
        self.time_conditioning: TimeConditioning = time_conditioning
        self.resample: Resample | None = resample
        self.skip_scale = skip_scale
        self.norm1 = nn.GroupNorm(groups, in_channels, norm_eps)
        self.conv1 = conv3(dims, in_channels, out_channels, conv_backend)
        num_outputs = out_channels * (2 if time_conditioning == "scale_shift" else 1)
        self.emb = None if emb_dim is None else nn.Linear(emb_dim, num_outputs)
        self.norm2 = nn.GroupNorm(groups, out_channels, norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(conv3(dims, out_channels, out_channels, conv_backend))
        same = in_channels == out_channels and not (resample_proj and resample is not None)
        self.shortcut = nn.Identity() if same else CONVS[dims](in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            x, h = resample(x, self.resample), resample(h, self.resample)
        h = self.conv1(h)
        if self.emb is None:
            h = self.norm2(h)
        else:
            assert emb is not None
            emb = self.emb(F.silu(emb))
            emb = emb.view(*emb.shape, *[1] * (x.ndim - 2))
            if self.time_conditioning == "add":
                h = self.norm2(h + emb)
            else:
                scale, shift = emb.chunk(2, dim=1)
                h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        h = self.conv2(self.dropout(F.silu(h)))
        out: Tensor = self.shortcut(x) + h
        return out if self.skip_scale == 1 else self.skip_scale * out


class SelfAttention(nn.Module):
    """Add multi-head self-attention over the positions of x (B, C, *size), and multiply the sum by `skip_scale`."""

    def __init__(
        self, channels: int, groups: int, num_heads: int, norm_eps: float = 1e-5, skip_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.skip_scale = skip_scale
        self.norm = nn.GroupNorm(groups, channels, norm_eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        b, c, *size = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, positions, C)
        qkv = self.qkv(tokens).view(b, -1, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv)  # (B, heads, positions, C / heads)
        out: Tensor = self.out(attended.transpose(1, 2).reshape(b, -1, c))
        out = x + out.transpose(1, 2).view(b, c, *size)
        return out if self.skip_scale == 1 else self.skip_scale * out


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention (B, L, C) of queries (B, heads, L, C / heads); `mask` (B, keys) is False for padding."""
    attn_mask = None if mask is None else mask[:, None, None]  # the same for all heads and positions
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)
    return attended.transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """Add multi-head attention from the positions of x (B, C, *size) to tokens (B, L, token_width).

    `mask` (B, L) is True for tokens and False for padding, with at least one token per sample; None means no padding.
    """

    def __init__(self, channels: int, groups: int, num_heads: int, token_width: int, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(groups, channels, norm_eps)
        self.query = nn.Linear(channels, channels)
        self.kv = nn.Linear(token_width, 2 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        b, c, *size = x.shape
        query = self.query(self.norm(x).flatten(2).transpose(1, 2))  # (B, positions, C)
        query = query.view(b, -1, self.num_heads, c // self.num_heads).transpose(1, 2)
        keys, values = self.kv(tokens).view(b, -1, 2, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        out: Tensor = self.out(attend(query, keys, values, mask))
        return x + out.transpose(1, 2).view(b, c, *size)


class Downsample(nn.Module):
    """Halve the size of (B, C, *size) by a strided convolution.

    `padding` 1 pads both sides by a zero, and 0 only the end, as TensorFlow and therefore Ho et al. 2020 do.
    """

    def __init__(self, channels: int, dims: int = 2, padding: int = 1) -> None:
        super().__init__()
        if padding not in (0, 1):
            raise ValueError(f"model.downsample_padding={padding} must be 0 or 1")
        self.conv = CONVS[dims](channels, channels, 3, stride=2, padding=padding)
        self.pad = [] if padding else [0, 1] * dims

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, self.pad) if self.pad else x)
        return out


class Upsample(nn.Module):
    """Double the size of (B, C, *size) by nearest neighbors, then apply a convolution."""

    def __init__(self, channels: int, conv_backend: ConvBackend = "auto", dims: int = 2) -> None:
        super().__init__()
        self.conv = conv3(dims, channels, channels, conv_backend)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(resample(x, "up"))
        return out


def resample(x: Tensor, direction: Resample) -> Tensor:
    """Double the size of x (B, C, *size) by nearest neighbors, or halve it by averaging."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if direction == "up" else AVG_POOLS[x.ndim - 2](x, 2)


def conv3(dims: int, in_channels: int, out_channels: int, backend: ConvBackend = "auto") -> nn.Module:
    """Return a zero-padded convolution with 3 taps in each of `dims` dimensions; `backend` is for two dimensions."""
    if dims == 2:
        return Conv3x3(in_channels, out_channels, backend)
    return CONVS[dims](in_channels, out_channels, 3, padding=1)


def space_to_depth(x: Tensor, patch_size: int) -> Tensor:
    """Move patches with sides of `patch_size` positions into channels: (B, C, *size) -> (B, C * P, *size / patch_size).

    P is patch_size^dims. Channels are in the order (channel, position in the patch) of `F.pixel_unshuffle`.
    """
    if x.ndim == 4:
        return F.pixel_unshuffle(x, patch_size)
    b, c, *size = x.shape
    dims = len(size)
    split = x.reshape(b, c, *(part for n in size for part in (n // patch_size, patch_size)))
    positions, offsets = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
    return split.permute(0, 1, *offsets, *positions).reshape(b, -1, *(n // patch_size for n in size))


def depth_to_space(x: Tensor, patch_size: int) -> Tensor:
    """Undo `space_to_depth`: (B, C * P, *size) -> (B, C, *size * patch_size)."""
    if x.ndim == 4:
        return F.pixel_shuffle(x, patch_size)
    b, _, *size = x.shape
    dims = len(size)
    split = x.reshape(b, -1, *[patch_size] * dims, *size)
    order = [axis for k in range(dims) for axis in (2 + dims + k, 2 + k)]
    return split.permute(0, 1, *order).reshape(b, -1, *(n * patch_size for n in size))


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """Remove the padding at the end of (B, C, ...) beyond `size`."""
    for axis, n in enumerate(size, 2):
        if x.shape[axis] != n:  # Sharded networks warn if the output is a view.
            x = x.narrow(axis, 0, n)
    return x


def check_positive(**sizes: int | Sequence[int]) -> None:
    """Raise ValueError for an argument of a network, a number or a list, that is not at least 1."""
    for name, value in sizes.items():
        if (value if isinstance(value, int) else min(value, default=0)) < 1:
            rule = "be at least 1" if isinstance(value, int) or value else "not be empty"
            raise ValueError(f"model.{name}={value} must {rule}; see conf/model for usual values")


def fit_groups(channels: int) -> int:
    """Return the largest divisor of `channels` up to 32 with at least 4 channels per group, or 1."""
    return max((g for g in range(1, 33) if channels % g == 0 and channels // g >= 4), default=1)


def zero_init(module: M) -> M:
    """Set every parameter of `module` to 0, so that its residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
