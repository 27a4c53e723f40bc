"""The U-Net of DDPM and ADM (Ho et al. 2020, App. B; Dhariwal & Nichol 2021, sec. 3)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.models.conditioning import Embedded, Embedding
from src.models.layers import (
    CrossAttention,
    Downsample,
    ResidualBlock,
    SelfAttention,
    TimeConditioning,
    TimeEmbedding,
    Upsample,
    fit_groups,
    zero_init,
)


class UNet(nn.Module):
    """x (B, C, H, W), time (B,) in [0, 1], cond (B, ...) if it takes any -> (B, C * outputs, H, W), for any H and W.

    Level i has model_channels * channel_mult[i] channels at image_size / (patch_size 2^i), with `num_res_blocks` residual blocks going down
    and one more coming up; those at a resolution in `attention_resolutions` (in pixels, at `image_size`) are followed by
    self-attention, and so is the middle. Attention has `num_heads` heads, or heads of `num_head_channels` channels.
    `resblock_updown` changes resolution inside residual blocks (ADM) rather than by plain convolutions (DDPM).
    `patch_size` x `patch_size` pixels are one position of level 0, which for small networks holds most of the work (Hoogeboom et
    al. 2023, arXiv 2301.11093, sec. 3.3, have it for large images). Sizes that the levels do not divide are padded by
    repeating the edge, and the output is cropped back.
    `condition`, given the width of the time embedding, makes the network for conditions: its vector joins the time
    embedding, and its tokens, if it has any, are attended to wherever there is self-attention (Rombach et al. 2022).
    `gradient_checkpointing` keeps only what goes into each block, and computes its inside again in the backward pass (Chen et
    al. 2016, arXiv 1604.06174).

    With num_head_channels (or one head) it is weight for weight the diffusers library's `UNet2DModel`.
    """

    def __init__(
        self,
        channels: int,
        image_size: int,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        num_heads: int = 1,
        num_head_channels: int | None = None,
        time_conditioning: TimeConditioning = "add",
        resblock_updown: bool = False,
        dropout: float = 0.0,
        outputs: int = 1,
        time_scale: float = 1000.0,
        gradient_checkpointing: bool = False,
        condition: Callable[[int], Embedding] | None = None,
        patch_size: int = 1,
    ) -> None:
        """Raises ValueError if attention is asked for at a resolution that no level has, or heads do not fit."""
        super().__init__()
        if (
            min(channels, image_size, model_channels, num_res_blocks, num_heads, patch_size, *channel_mult) < 1
            or not channel_mult
        ):
            raise ValueError(
                "channels, image_size, model_channels, num_res_blocks, num_heads, patch_size and channel_mult must be at least 1, got "
                f"{channels}, {image_size}, {model_channels}, {num_res_blocks}, {num_heads}, {patch_size}, {list(channel_mult)}: see conf/model"
            )
        widths = [model_channels * m for m in channel_mult]
        sizes = [-(-image_size // (patch_size * 2**i)) for i in range(len(widths))]
        if unknown := set(attention_resolutions) - set(sizes):
            raise ValueError(
                f"attention_resolutions at {sorted(unknown)} does not occur: at image_size {image_size} the {len(sizes)} levels "
                f"have resolutions {sizes}; set model.attention_resolutions to some of these"
            )
        self.patch_size = patch_size
        self.factor = patch_size * 2 ** (len(widths) - 1)
        self.gradient_checkpointing = gradient_checkpointing
        groups = fit_groups(model_channels)
        emb_dim = 4 * model_channels
        self.condition = None if condition is None else condition(emb_dim)
        token_width = None if self.condition is None else self.condition.token_width

        def residual(c_in: int, c_out: int) -> ResidualBlock:
            return ResidualBlock(c_in, c_out, emb_dim, groups, time_conditioning, dropout)

        def heads_of(c: int) -> int:
            n = num_heads if num_head_channels is None else c // num_head_channels
            if n < 1 or c % n or (num_head_channels is not None and c % num_head_channels):
                raise ValueError(
                    f"{c} channels do not split into heads (num_heads={num_heads}, num_head_channels={num_head_channels}): "
                    "choose a divisor for model.num_head_channels"
                )
            return n

        def attend(c: int) -> SelfAttention:
            return SelfAttention(c, groups, heads_of(c))

        def look_up(c: int) -> CrossAttention | None:
            return None if token_width is None else CrossAttention(c, groups, heads_of(c), token_width)

        def layer(c_in: int, c_out: int, size: int) -> Layer:
            if size not in attention_resolutions:
                return Layer(residual(c_in, c_out), None)
            return Layer(residual(c_in, c_out), attend(c_out), look_up(c_out))

        self.time = TimeEmbedding(model_channels, emb_dim, time_scale)
        self.conv_in = nn.Conv2d(channels * patch_size**2, model_channels, 3, padding=1)

        self.down = nn.ModuleList()
        skips = [model_channels]
        c = model_channels
        for i, (c_out, size) in enumerate(zip(widths, sizes, strict=True)):
            for _ in range(num_res_blocks):
                self.down.append(layer(c, c_out, size))
                c = c_out
                skips.append(c)
            if i < len(widths) - 1:
                shrink = (
                    ResidualBlock(c, c, emb_dim, groups, time_conditioning, dropout, "down")
                    if resblock_updown
                    else None
                )
                self.down.append(shrink or Downsample(c))
                skips.append(c)

        looking = look_up(c)
        middle = [residual(c, c), attend(c), *([] if looking is None else [looking]), residual(c, c)]
        self.middle = nn.ModuleList(middle)

        self.up = nn.ModuleList()
        for i, (c_out, size) in reversed(list(enumerate(zip(widths, sizes, strict=True)))):
            for _ in range(num_res_blocks + 1):
                self.up.append(layer(c + skips.pop(), c_out, size))
                c = c_out
            if i > 0:
                grow = (
                    ResidualBlock(c, c, emb_dim, groups, time_conditioning, dropout, "up") if resblock_updown else None
                )
                self.up.append(grow or Upsample(c))

        self.norm_out = nn.GroupNorm(groups, c)
        self.conv_out = zero_init(nn.Conv2d(c, channels * outputs * patch_size**2, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        height, width = x.shape[-2:]
        x = pad_to_multiple(x.to(self.conv_in.weight.dtype), self.factor)
        context = Embedded(self.time(time))
        if self.condition is not None:
            assert cond is not None
            vector, tokens, mask = self.condition(cond)
            context = Embedded(context.vector + vector, tokens, mask)
        h = self.conv_in(x if self.patch_size == 1 else F.pixel_unshuffle(x, self.patch_size))
        skips = [h]
        for module in self.down:
            h = self._run(module, h, context)
            skips.append(h)
        for module in self.middle:
            h = self._run(module, h, context)
        for module in self.up:
            h = self._run(module, h, context, skips.pop() if isinstance(module, Layer) else None)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        out = out if self.patch_size == 1 else F.pixel_shuffle(out, self.patch_size)
        # A view of all of it, which sharded networks warn of, is spared where nothing was padded.
        return out if out.shape[-2:] == (height, width) else out[..., :height, :width]

    def _run(self, module: nn.Module, h: Tensor, context: Embedded, skip: Tensor | None = None) -> Tensor:
        """Run a block; with gradient_checkpointing, the inside of those that are more than one convolution is let go."""
        if self.gradient_checkpointing and torch.is_grad_enabled() and not isinstance(module, Downsample | Upsample):
            out: Tensor = checkpoint(_apply, module, h, context, skip, use_reentrant=False)
            return out
        return _apply(module, h, context, skip)


class Layer(nn.Module):
    """A residual block, and attention after it where the resolution has it, to tokens too where there are any."""

    def __init__(
        self, residual: ResidualBlock, attention: SelfAttention | None, cross: CrossAttention | None = None
    ) -> None:
        super().__init__()
        self.residual = residual
        self.attention = attention
        self.cross = cross

    def forward(self, x: Tensor, context: Embedded) -> Tensor:
        h: Tensor = self.residual(x, context.vector)
        h = h if self.attention is None else self.attention(h)
        return h if self.cross is None else self.cross(h, context.tokens, context.mask)


def pad_to_multiple(x: Tensor, factor: int) -> Tensor:
    """x (B, C, H, W) with its bottom and right edges repeated until `factor` divides H and W."""
    bottom, right = (-x.shape[-2]) % factor, (-x.shape[-1]) % factor
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x


def _apply(module: nn.Module, h: Tensor, context: Embedded, skip: Tensor | None) -> Tensor:
    """Run a block, on its input and the skip connection's if there is one, with what it takes of the context."""
    h = h if skip is None else torch.cat([h, skip], dim=1)
    match module:
        case Layer():
            out: Tensor = module(h, context)
        case ResidualBlock():
            out = module(h, context.vector)
        case CrossAttention():
            out = module(h, context.tokens, context.mask)
        case _:
            out = module(h)
    return out
