"""The U-Net of DDPM and ADM (Ho et al. 2020, app. B; Dhariwal & Nichol 2021, sec. 3)."""

import math
import warnings
from collections.abc import Callable, Sequence, Set
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.models.conditioning import Embedded, Embedding
from src.models.layers import (
    CONVS,
    CrossAttention,
    Downsample,
    Resample,
    ResidualBlock,
    SelfAttention,
    TimeConditioning,
    TimeEmbedding,
    Upsample,
    check_positive,
    crop,
    depth_to_space,
    fit_groups,
    shape_of_data,
    space_to_depth,
    zero_init,
)
from src.models.winograd import ConvBackend

DecoderAttention = Literal["all", "last"]


class UNet(nn.Module):
    """Map x (B, C, *size), time (B,) in [0, 1] and cond (B, ...) to (B, C * outputs, *size), for any size.

    `image_size` is [L] for signals, [H, W] for images and [D, H, W] for volumes; one number is the side of a square
    image. Its length chooses convolutions of one, two or three dimensions. Stage i has model_channels * channel_mult[i]
    channels, resolution image_size / (patch_size * 2^i), `num_res_blocks` residual blocks on the way down and one more
    on the way up.

    - `attention_resolutions`, in pixels of the feature map: each entry selects the stage of the nearest resolution,
      within a factor of sqrt(2), so that 16 selects 14x14 for 28x28 images. The resolution of a stage is the geometric
      mean of its sides, so that 16 selects 8x32, too. The blocks of a selected stage end in self-attention over all
      positions. An entry without such a stage is ignored, as in ADM, with a warning. The middle always attends.
    - Attention has `num_heads` heads, or heads of `num_head_channels` channels.
    - `resblock_updown` resamples inside residual blocks (ADM) instead of by plain convolutions (DDPM).
    - `patch_size`: side in pixels of the patches that the first stage sees (Hoogeboom et al. 2023, arXiv 2301.11093,
      sec. 3.3). Other sizes are padded by repeating the edge, and the output is cropped.
    - `condition` maps the width of the time embedding to the embedding of conditions. Its vector is added to the time
      embedding; cross-attention to its tokens follows each self-attention (Rombach et al. 2022, arXiv 2112.10752).
    - `augment_labels`: the number of labels of augmentations (src.data.augment). The network then takes `augment` (B,
      augment_labels), by default 0, and adds a linear map of them to the time embedding (Karras et al. 2022, app. F.2).
    - `gradient_checkpointing` stores the input of each block only and recomputes the block in the backward pass (Chen
      et al. 2016, arXiv 1604.06174).
    - `norm_groups` is the number of groups of each GroupNorm, and None chooses up to 32; `norm_eps` is its epsilon.
    - The time embedding sees time_scale * time + time_offset; for `freq_shift` see `sinusoidal_embedding`, and for
      `downsample_padding` see `Downsample`. With these, networks of other projects have the same weights.
    - So have those of DDPM++ (Song et al. 2021, arXiv 2011.13456) with `skip_scale` and `resample_proj`, see
      `ResidualBlock`, with `decoder_attention` last: on the way up, only the last block of a stage attends, and with
      `cond_in_time_mlp`: the vector of the condition is added to the hidden layer of the time embedding.
    - `time_channels` is the number of sinusoids, model_channels by default; the embedding has four times as many.
    - `conv_backend` selects the algorithm of the 3x3 convolutions of images: see `src.models.winograd.Conv3x3`.

    With `num_head_channels`, or one head, it has the weights of `UNet2DModel` of the diffusers library.
    """

    def __init__(
        self,
        channels: int | None,
        image_size: int | Sequence[int] | None,
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
        conv_backend: ConvBackend = "auto",
        augment_labels: int = 0,
        norm_groups: int | None = None,
        norm_eps: float = 1e-5,
        downsample_padding: int = 1,
        time_offset: float = 0.0,
        freq_shift: int = 1,
        skip_scale: float = 1.0,
        resample_proj: bool = False,
        decoder_attention: DecoderAttention = "all",
        cond_in_time_mlp: bool = False,
        time_channels: int | None = None,
    ) -> None:
        super().__init__()
        if decoder_attention not in get_args(DecoderAttention):
            raise ValueError(f"model.decoder_attention={decoder_attention} must be all or last")
        channels, size = shape_of_data(channels, image_size)
        dims = len(size)
        if dims not in CONVS:
            raise ValueError(f"model.image_size={list(size)} must be a number, [L], [H,W] or [D,H,W]")
        check_positive(
            channels=channels,
            image_size=image_size if isinstance(image_size, int) else list(size),
            model_channels=model_channels,
            num_res_blocks=num_res_blocks,
            num_heads=num_heads,
            patch_size=patch_size,
            channel_mult=list(channel_mult),
        )
        if conv_backend == "winograd" and dims != 2:
            raise ValueError(f"model.conv_backend=winograd is for images, and model.image_size={list(size)}; use auto")
        widths = [model_channels * m for m in channel_mult]
        resolutions = stage_resolutions(size, patch_size, len(widths))
        attended = attended_resolutions(attention_resolutions, resolutions)
        self.patch_size = patch_size
        self.factor = patch_size * 2 ** (len(widths) - 1)
        self.gradient_checkpointing = gradient_checkpointing
        groups = fit_groups(model_channels) if norm_groups is None else norm_groups
        if groups < 1 or any(width % groups for width in widths):
            raise ValueError(f"model.norm_groups={groups} must divide the channels of each stage, {widths}; use null")
        time_channels = model_channels if time_channels is None else time_channels
        emb_dim = 4 * time_channels
        self.cond_in_time_mlp = cond_in_time_mlp
        self.condition = None if condition is None else condition(emb_dim)
        blocks = Blocks(
            emb_dim, groups, time_conditioning, dropout, conv_backend, dims, norm_eps, skip_scale, resample_proj,
            num_heads, num_head_channels, None if self.condition is None else self.condition.token_width, attended,
        )  # fmt: skip

        self.time = TimeEmbedding(time_channels, emb_dim, time_scale, time_offset, freq_shift)
        self.conv_in = CONVS[dims](channels * patch_size**dims, model_channels, 3, padding=1)

        stages = list(enumerate(zip(widths, resolutions, strict=True)))
        self.down = nn.ModuleList()
        skips = [model_channels]
        c = model_channels
        for i, (c_out, resolution) in stages:
            for _ in range(num_res_blocks):
                self.down.append(blocks.layer(c, c_out, resolution))
                c = c_out
                skips.append(c)
            if i < len(widths) - 1:
                halve = (
                    Downsample(c, dims, downsample_padding) if not resblock_updown else blocks.residual(c, c, "down")
                )
                self.down.append(halve)
                skips.append(c)

        self.middle = blocks.middle(c)

        self.up = nn.ModuleList()
        for i, (c_out, resolution) in reversed(stages):
            for k in range(num_res_blocks + 1):
                attends = decoder_attention == "all" or k == num_res_blocks
                self.up.append(blocks.layer(c + skips.pop(), c_out, resolution, attends))
                c = c_out
            if i > 0:
                self.up.append(blocks.residual(c, c, "up") if resblock_updown else Upsample(c, conv_backend, dims))

        self.norm_out = nn.GroupNorm(groups, c, norm_eps)
        self.conv_out = zero_init(CONVS[dims](c, channels * outputs * patch_size**dims, 3, padding=1))
        # Last and without bias: the other weights start, and labels of 0 act, as without it.
        self.augment = zero_init(nn.Linear(augment_labels, emb_dim, bias=False)) if augment_labels else None

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        size = x.shape[2:]
        x = pad_to_multiple(x.to(self.conv_in.weight.dtype), self.factor)
        context = Embedded(self.time(time))
        if self.condition is not None:
            assert cond is not None
            vector, tokens, mask = self.condition(cond)
            embedding = self.time(time, vector) if self.cond_in_time_mlp else context.vector + vector
            context = Embedded(embedding, tokens, mask)
        if self.augment is not None and augment is not None:
            context = context._replace(vector=context.vector + self.augment(augment.to(context.vector.dtype)))
        h = self.conv_in(x if self.patch_size == 1 else space_to_depth(x, self.patch_size))
        skips = [h]
        for module in self.down:
            h = self._run(module, h, context)
            skips.append(h)
        for module in self.middle:
            h = self._run(module, h, context)
        for module in self.up:
            h = self._run(module, h, context, skips.pop() if isinstance(module, Layer) else None)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        out = out if self.patch_size == 1 else depth_to_space(out, self.patch_size)
        return crop(out, size)

    def _run(self, module: nn.Module, h: Tensor, context: Embedded, skip: Tensor | None = None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled() and not isinstance(module, Downsample | Upsample):
            out: Tensor = checkpoint(_apply, module, h, context, skip, use_reentrant=False)
            return out
        return _apply(module, h, context, skip)


class Blocks(NamedTuple):
    """Makes the blocks of a U-Net, whose settings are those of `UNet`."""

    emb_dim: int
    groups: int
    time_conditioning: TimeConditioning
    dropout: float
    conv_backend: ConvBackend
    dims: int
    norm_eps: float
    skip_scale: float
    resample_proj: bool
    num_heads: int
    num_head_channels: int | None
    token_width: int | None
    """Width of the tokens for cross-attention; None for no cross-attention."""
    attended: Set[float]
    """Resolutions with self-attention."""

    def residual(self, c_in: int, c_out: int, resample: Resample | None = None) -> ResidualBlock:
        return ResidualBlock(
            c_in, c_out, self.emb_dim, self.groups, self.time_conditioning, self.dropout, resample, self.conv_backend,
            self.dims, self.norm_eps, self.skip_scale, self.resample_proj,
        )  # fmt: skip

    def heads(self, c: int) -> int:
        """Return the number of heads of attention over `c` channels."""
        per_head = self.num_head_channels
        name, divisor = ("num_heads", self.num_heads) if per_head is None else ("num_head_channels", per_head)
        if divisor < 1 or c % divisor:
            raise ValueError(f"model.{name}={divisor} must divide {c} channels; choose a divisor of {c}")
        return self.num_heads if per_head is None else c // per_head

    def attention(self, c: int) -> SelfAttention:
        return SelfAttention(c, self.groups, self.heads(c), self.norm_eps, self.skip_scale)

    def cross_attention(self, c: int) -> CrossAttention | None:
        width = self.token_width
        return None if width is None else CrossAttention(c, self.groups, self.heads(c), width, self.norm_eps)

    def layer(self, c_in: int, c_out: int, resolution: float, attends: bool = True) -> "Layer":
        if resolution not in self.attended or not attends:
            return Layer(self.residual(c_in, c_out), None)
        return Layer(self.residual(c_in, c_out), self.attention(c_out), self.cross_attention(c_out))

    def middle(self, c: int) -> nn.ModuleList:
        cross = self.cross_attention(c)  # first, which decides its initial weights
        cross_layers = [] if cross is None else [cross]
        return nn.ModuleList([self.residual(c, c), self.attention(c), *cross_layers, self.residual(c, c)])


class Layer(nn.Module):
    """A residual block, followed by self-attention and cross-attention if given."""

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


def stage_resolutions(size: Sequence[int], patch_size: int, num_stages: int) -> list[float]:
    """Return the geometric mean of the sides of each stage's feature map, which are rounded up, in pixels."""
    stages = [[-(-n // (patch_size * 2**i)) for n in size] for i in range(num_stages)]
    return [sides[0] if len(set(sides)) == 1 else math.prod(sides) ** (1 / len(sides)) for sides in stages]


def attended_resolutions(requested: Sequence[int], resolutions: Sequence[float]) -> set[float]:
    """Return the stage resolution nearest to each requested one; warn about those further than a factor of sqrt(2)."""
    if min(requested, default=1) < 1:
        raise ValueError(f"model.attention_resolutions={list(requested)} must be at least 1; use [] for no stage")
    nearest = {r: min(resolutions, key=lambda s: abs(math.log(s / r))) for r in requested}
    ignored = [r for r, s in nearest.items() if not r / math.sqrt(2) <= s <= r * math.sqrt(2)]
    if ignored:
        accepted = ",".join(str(r) for r in requested if r not in ignored)
        nearby = ",".join(str(round(s)) for s in sorted({*nearest.values()}, reverse=True))
        warnings.warn(
            f"model.attention_resolutions={list(requested)}: {ignored} ignored, the stages have resolutions "
            f"{[round(r, 1) for r in resolutions]}; set 'model.attention_resolutions=[{accepted}]' for this network, "
            f"or [{nearby}] for more attention",
            stacklevel=3,
        )
    return {s for r, s in nearest.items() if r not in ignored}


def pad_to_multiple(x: Tensor, factor: int) -> Tensor:
    """Repeat the last values of x (B, C, *size) in each dimension until `factor` divides its size."""
    margins = [margin for n in reversed(x.shape[2:]) for margin in (0, -n % factor)]
    return F.pad(x, margins, mode="replicate") if any(margins) else x


def _apply(module: nn.Module, h: Tensor, context: Embedded, skip: Tensor | None) -> Tensor:
    """Run a block with the parts of the context that it uses."""
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
