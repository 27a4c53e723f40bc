"""The magnitude-preserving U-Net of EDM2 (Karras et al. 2024, arXiv 2312.02696, app. B, config G)."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models.conditioning import Embedding
from src.models.layers import Resample, resample, shape_of_data
from src.models.unet import attended_resolutions, pad_to_multiple, stage_resolutions

EPS = 1e-4


class UNetEDM2(nn.Module):
    """Map x (B, C, H, W), time (B,) in [0, 1] and cond (B, ...) to (B, C * outputs, H, W).

    Every layer keeps the expected magnitude of its input: weights have unit norm, sums and concatenations are scaled,
    and there are neither norms with weights nor biases. Stage i has model_channels * channel_mult[i] channels.

    - `attention_resolutions` and `num_head_channels` are those of `UNet`.
    - `residual_balance` and `attention_balance`: share of a block's branch in its sum with the input (eq. 88).
    - `skip_balance`: share of the skip connection in a concatenation (eq. 103).
    - `condition_balance`: share of the condition in its sum with the time embedding.
    - `clip`: bound on the outputs of blocks, for half precision.
    - The noise embedding sees time_scale * time + time_offset.
    - `condition` maps the width of the embedding to the embedding of conditions; tokens are ignored.
    """

    def __init__(
        self,
        channels: int | None,
        image_size: int | Sequence[int] | None,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_res_blocks: int = 3,
        attention_resolutions: Sequence[int] = (16, 8),
        num_head_channels: int = 64,
        dropout: float = 0.0,
        residual_balance: float = 0.3,
        attention_balance: float = 0.3,
        skip_balance: float = 0.5,
        condition_balance: float = 0.5,
        clip: float = 256.0,
        outputs: int = 1,
        time_scale: float = 1.0,
        time_offset: float = 0.0,
        condition: Callable[[int], Embedding] | None = None,
    ) -> None:
        super().__init__()
        channels, size = shape_of_data(channels, image_size)
        if len(size) != 2:
            raise ValueError(f"model.image_size={list(size)} must be that of images for UNetEDM2; use model=unet_small")
        widths = [model_channels * m for m in channel_mult]
        if wrong := [w for w in widths if w < 1 or w % num_head_channels]:
            raise ValueError(
                f"model.num_head_channels={num_head_channels} must divide {wrong[0]}, the channels of a stage; change "
                "it or model.model_channels"
            )
        shares = {"residual": residual_balance, "attention": attention_balance, "skip": skip_balance}
        for name, share in (shares | {"condition": condition_balance}).items():
            if not 0 <= share <= 1:
                raise ValueError(f"model.{name}_balance={share} must be in [0, 1]; see conf/model/unet_edm2.yaml")
        resolutions = stage_resolutions(size, 1, len(widths))
        attended = attended_resolutions(attention_resolutions, resolutions)
        self.factor = 2 ** (len(widths) - 1)
        self.time_scale, self.time_offset = time_scale, time_offset
        self.skip_balance, self.condition_balance = skip_balance, condition_balance
        emb_dim = max(widths)
        self.fourier = FourierFeatures(widths[0])
        self.noise = MPConv(widths[0], emb_dim, 0)
        self.condition = None if condition is None else condition(emb_dim)

        def block(c_in: int, c_out: int, decoder: bool, attends: bool, way: Resample | None = None) -> Block:
            heads = c_out // num_head_channels if attends else 0
            return Block(c_in, c_out, emb_dim, decoder, heads, way, dropout, residual_balance, attention_balance, clip)

        self.conv_in = MPConv(channels + 1, widths[0], 3)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, skips = widths[0], [widths[0]]
        for i, (width, resolution) in enumerate(zip(widths, resolutions, strict=True)):
            if i > 0:
                self.down.append(block(c, c, False, False, "down"))
                skips.append(c)
            for _ in range(num_res_blocks):
                self.down.append(block(c, width, False, resolution in attended))
                c = width
                skips.append(c)
        self.middle = nn.ModuleList([block(c, c, True, True), block(c, c, True, False)])
        for i, (width, resolution) in reversed(list(enumerate(zip(widths, resolutions, strict=True)))):
            if i < len(widths) - 1:
                self.up.append(block(c, c, True, False, "up"))
            for _ in range(num_res_blocks + 1):
                self.up.append(block(c + skips.pop(), width, True, resolution in attended))
                c = width
        self.conv_out = MPConv(c, channels * outputs, 3)
        self.gain_out = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        height, width = x.shape[2:]
        x = pad_to_multiple(x.to(self.conv_in.weight.dtype), self.factor)
        emb = self.noise(self.fourier(self.time_scale * time.float() + self.time_offset).to(x.dtype))
        if self.condition is not None:
            assert cond is not None
            emb = mp_sum(emb, self.condition(cond).vector.to(x.dtype), self.condition_balance)
        emb = mp_silu(emb)
        h = self.conv_in(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))  # ones in place of biases
        skips = [h]
        for block in self.down:
            h = block(h, emb)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for block in self.up:
            h = block(h if block.way == "up" else mp_cat(h, skips.pop(), self.skip_balance), emb)
        out: Tensor = self.conv_out(h, self.gain_out)
        return out[..., :height, :width].contiguous()


class Block(nn.Module):
    """A residual block of the encoder or decoder, with self-attention if `heads` > 0 (fig. 21)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int,
        decoder: bool,
        heads: int,
        way: Resample | None,
        dropout: float,
        residual_balance: float,
        attention_balance: float,
        clip: float,
    ) -> None:
        super().__init__()
        self.decoder, self.heads, self.way, self.clip = decoder, heads, way, clip
        self.residual_balance, self.attention_balance = residual_balance, attention_balance
        self.conv1 = MPConv(in_channels if decoder else out_channels, out_channels, 3)
        self.emb = MPConv(emb_dim, out_channels, 0)
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(dropout)
        self.conv2 = MPConv(out_channels, out_channels, 3)
        self.shortcut = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.qkv = MPConv(out_channels, 3 * out_channels, 1) if heads else None
        self.out = MPConv(out_channels, out_channels, 1) if heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = x if self.way is None else resample(x, self.way)
        if not self.decoder:
            x = normalize(self.shortcut(x), dim=1)
        h = self.conv1(mp_silu(x))
        h = mp_silu(h * (self.emb(emb, self.emb_gain) + 1)[:, :, None, None])
        h = self.conv2(self.dropout(h))
        x = mp_sum(self.shortcut(x) if self.decoder else x, h, self.residual_balance)
        if self.qkv is not None and self.out is not None:
            b, c, height, width = x.shape
            qkv = self.qkv(x).view(b, 3, self.heads, c // self.heads, height * width)
            query, key, value = normalize(qkv, dim=3).transpose(-1, -2).unbind(1)  # (B, heads, positions, C / heads)
            attended = F.scaled_dot_product_attention(query, key, value).transpose(-1, -2)
            x = mp_sum(x, self.out(attended.reshape(x.shape)), self.attention_balance)
        return x.clamp(-self.clip, self.clip)


class MPConv(nn.Module):
    """A linear layer (`kernel` 0) or convolution whose weights have unit norm per output, times `gain` (eq. 47, 66)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *[kernel] * (2 if kernel else 0)))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = self.weight.float()
        if self.training and self.weight.requires_grad:
            with torch.no_grad():
                self.weight.copy_(normalize(weight))  # forced weight normalization (sec. 2.3)
        weight = (normalize(weight) * (gain / math.sqrt(weight[0].numel()))).to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class FourierFeatures(nn.Module):
    """Map x (B,) to (B, width): sqrt(2) cos(frequency x + phase), with random constants (eq. 75)."""

    frequency: Tensor
    phase: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequency", 2 * math.pi * torch.randn(width))
        self.register_buffer("phase", 2 * math.pi * torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = math.sqrt(2) * torch.cos(x[:, None] * self.frequency + self.phase)
        return features


def normalize(x: Tensor, dim: int | None = None) -> Tensor:
    """Scale x to unit average square over `dim`, or over all dimensions but the first."""
    dims = list(range(1, x.ndim)) if dim is None else [dim]
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    normalized: Tensor = x / (EPS + norm / math.sqrt(math.prod(x.shape[axis] for axis in dims))).to(x.dtype)
    return normalized


def mp_silu(x: Tensor) -> Tensor:
    """SiLU, scaled to keep the magnitude of a standard normal input (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return the sum of a and b with shares 1 - t and t, scaled to keep their magnitude (eq. 88)."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenate the channels of a and b so that they contribute 1 - t and t to the magnitude (eq. 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt(n_a + n_b) / math.hypot(1 - t, t)
    return torch.cat([a * (scale * (1 - t) / math.sqrt(n_a)), b * (scale * t / math.sqrt(n_b))], dim=1)
