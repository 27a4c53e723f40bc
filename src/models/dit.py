"""The diffusion transformer of Peebles & Xie 2022 (DiT, arXiv 2212.09748), and its later improvements as options."""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.models.attention import Norm, RotaryAttention, TokenAttention, make_norm, rotary_table, sincos_positions
from src.models.conditioning import Embedded, Embedding
from src.models.layers import (
    TimeEmbedding,
    check_positive,
    crop,
    depth_to_space,
    shape_of_data,
    space_to_depth,
    zero_init,
)
from src.models.unet import pad_to_multiple

Activation = Literal["swiglu", "gelu"]
Positions = Literal["rope", "sincos"]
Text = Literal["cross", "joint"]


class DiT(nn.Module):
    """Map x (B, C, *size), time (B,) in [0, 1] and cond (B, ...) to (B, C * outputs, *size), for any size.

    Patches with sides of `patch_size` positions become L tokens of width `hidden_size` for `depth` blocks of
    self-attention and MLP. The time embedding and the vector of the condition shift and scale the norms of each block,
    and gate its branches, which start at 0 (adaLN-Zero). Sizes that `patch_size` does not divide are padded by
    repeating the edge, and the output is cropped.

    - `image_size` is [L] for signals, [H, W] for images and [D, H, W] for volumes; one number is the side of an image.
    - `positions`: "rope" rotates queries and keys by their position along each axis (Heo et al. 2024, arXiv
      2403.13298), so that samples of other sizes are possible; pairs of channels that the axes leave over stay as they
      are. "sincos" adds fixed embeddings to the tokens (DiT).
    - `activation`: "swiglu" (Shazeer 2020, arXiv 2002.05202), with two thirds of the hidden width of "gelu" (DiT).
    - `norm`: RMS norm (Zhang & Sennrich 2019, arXiv 1910.07467) or layer norm (DiT).
    - `qk_norm` normalizes queries and keys (Dehghani et al. 2023, arXiv 2302.05442).
    - `registers`: learned tokens besides the patches (Darcet et al. 2023, arXiv 2309.16588).
    - `bottleneck`: width of a linear layer before the patch embedding, for large patches (Li & He 2025, JiT, arXiv
      2511.13720); None has none.
    - `shared_modulation`: the blocks share the layer that computes shifts, scales and gates, and each adds learned
      constants (Chen et al. 2023, PixArt, arXiv 2310.00426, sec. 2.3).
    - `text`: tokens of the condition enter by cross-attention after each self-attention, or "joint"ly with the patches
      in self-attention.
    - For `time_offset` and `freq_shift` see `UNet`.
    - `mlp_norm_eps` is the epsilon of the norm before each MLP, which is 1e-5 in diffusers; other norms have 1e-6.
    - `gradient_checkpointing` stores the input of each block only (Chen et al. 2016, arXiv 1604.06174).
    """

    def __init__(
        self,
        channels: int | None,
        image_size: int | Sequence[int] | None,
        patch_size: int = 2,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        activation: Activation = "swiglu",
        norm: Norm = "rms",
        qk_norm: bool = True,
        positions: Positions = "rope",
        registers: int = 0,
        bottleneck: int | None = None,
        shared_modulation: bool = False,
        text: Text = "cross",
        dropout: float = 0.0,
        outputs: int = 1,
        time_scale: float = 1000.0,
        time_offset: float = 0.0,
        freq_shift: int = 0,
        mlp_norm_eps: float = 1e-6,
        gradient_checkpointing: bool = False,
        condition: Callable[[int], Embedding] | None = None,
    ) -> None:
        super().__init__()
        channels, size = shape_of_data(channels, image_size)
        check_positive(patch_size=patch_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads)
        if registers < 0:
            raise ValueError(f"model.registers={registers} must be at least 0; 4 is usual")
        if bottleneck is not None:
            check_positive(bottleneck=bottleneck)
        for name, value, usual in (("mlp_ratio", mlp_ratio, 4), ("mlp_norm_eps", mlp_norm_eps, 1e-6)):
            if not 0 < value < float("inf"):
                raise ValueError(f"model.{name}={value} must be positive; {usual} is usual")
        if patch_size > (side := max(size)):
            raise ValueError(f"model.patch_size={patch_size} must be at most {side}, the longest side; 2 is usual")
        for name, choice, choices in (
            ("activation", activation, Activation),
            ("norm", norm, Norm),
            ("positions", positions, Positions),
            ("text", text, Text),
        ):
            if choice not in get_args(choices):
                raise ValueError(f"model.{name}={choice} must be one of {', '.join(get_args(choices))}")
        least = 2 * len(size) * num_heads
        unit = 2 * num_heads if positions == "rope" else least
        if hidden_size % unit or hidden_size < least:
            near = max(least, round(hidden_size / unit) * unit)
            raise ValueError(
                f"model.hidden_size={hidden_size} must be a multiple of {unit} and at least {least}, two per head and "
                f"dimension of the data; set model.hidden_size={near}"
            )
        self.patch_size, self.head_size = patch_size, hidden_size // num_heads
        self.positions: Positions = positions
        self.gradient_checkpointing = gradient_checkpointing
        values = channels * patch_size ** len(size)
        self.time = TimeEmbedding(256, hidden_size, time_scale, time_offset, freq_shift)
        self.condition = None if condition is None else condition(hidden_size)
        token_width = None if self.condition is None else self.condition.token_width
        self.bottleneck = None if bottleneck is None else nn.Linear(bottleneck, hidden_size)
        self.linear_in = nn.Linear(values, hidden_size if bottleneck is None else bottleneck)
        self.registers = nn.Parameter(0.02 * torch.randn(registers, hidden_size)) if registers else None
        self.tokens_in = nn.Linear(token_width, hidden_size) if token_width and text == "joint" else None
        self.modulation = zero_init(nn.Linear(hidden_size, 6 * hidden_size)) if shared_modulation else None
        hidden = round(mlp_ratio * hidden_size * (2 / 3 if activation == "swiglu" else 1))
        cross_width = token_width if text == "cross" else None
        self.blocks = nn.ModuleList(
            DiTBlock(
                *(hidden_size, num_heads, hidden, activation, norm, qk_norm, shared_modulation, cross_width, dropout),
                mlp_norm_eps,
            )
            for _ in range(depth)
        )
        self.norm_out = make_norm(norm, hidden_size)
        self.modulation_out = zero_init(nn.Linear(hidden_size, 2 * hidden_size))
        self.linear_out = zero_init(nn.Linear(hidden_size, values * outputs))

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        size = x.shape[2:]
        x = space_to_depth(pad_to_multiple(x.to(self.linear_in.weight.dtype), self.patch_size), self.patch_size)
        grid, num_patches = x.shape[2:], x.shape[2:].numel()
        h = self.linear_in(x.flatten(2).transpose(1, 2))  # (B, L, hidden)
        h = h if self.bottleneck is None else self.bottleneck(h)
        context = Embedded(self.time(time))
        if self.condition is not None:
            assert cond is not None
            vector, tokens, mask = self.condition(cond)
            context = Embedded(context.vector + vector, tokens, mask)
        vector = F.silu(context.vector)
        shared = None if self.modulation is None else self.modulation(vector)
        rotation = None
        if self.positions == "sincos":
            h = h + sincos_positions(grid, h.shape[-1], h.device).to(h.dtype)
        else:
            rotation = rotary_table(grid, self.head_size, h.device)
        mask = None
        if self.registers is not None:
            h = torch.cat([h, self.registers.expand(h.shape[0], -1, -1)], dim=1)
        if self.tokens_in is not None and context.tokens is not None:
            mask = context.mask
            if mask is not None:  # patches and registers are never masked
                mask = torch.cat([mask.new_ones(h.shape[:2]), mask], dim=1)
            h = torch.cat([h, self.tokens_in(context.tokens)], dim=1)
        inputs = (vector if shared is None else shared, rotation, mask, context.tokens, context.mask)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, *inputs, use_reentrant=False)
            else:
                h = block(h, *inputs)
        shift, scale = self.modulation_out(vector)[:, None].chunk(2, dim=-1)
        out = self.linear_out(self.norm_out(h[:, :num_patches]) * (1 + scale) + shift)
        out = depth_to_space(out.transpose(1, 2).unflatten(2, grid), self.patch_size)
        return crop(out, size)


class DiTBlock(nn.Module):
    """Self-attention, cross-attention if `token_width` is given, and MLP, on tokens x (B, L, hidden_size)."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_width: int,
        activation: Activation,
        norm: Norm,
        qk_norm: bool,
        shared_modulation: bool,
        token_width: int | None,
        dropout: float,
        mlp_norm_eps: float,
    ) -> None:
        super().__init__()
        size = 6 * hidden_size
        self.modulation = None if shared_modulation else zero_init(nn.Linear(hidden_size, size))
        self.constants = nn.Parameter(torch.zeros(size)) if shared_modulation else None
        self.norm1, self.norm2 = make_norm(norm, hidden_size), make_norm(norm, hidden_size, mlp_norm_eps)
        self.attention = RotaryAttention(hidden_size, num_heads, qk_norm)
        self.cross = None if token_width is None else TokenAttention(hidden_size, num_heads, token_width, norm)
        gated = activation == "swiglu"
        self.gated = gated
        self.linear1 = nn.Linear(hidden_size, mlp_width * (2 if gated else 1))
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(mlp_width, hidden_size)

    def forward(
        self,
        x: Tensor,
        vector: Tensor,
        rotation: Tensor | None,
        mask: Tensor | None,
        tokens: Tensor | None,
        token_mask: Tensor | None,
    ) -> Tensor:
        """Return the tokens after the block.

        `vector` (B, hidden_size) is the activated embedding of time and condition, or with a shared modulation its
        output (B, 6 * hidden_size). `mask` (B, L) and `token_mask` (B, M) are False for padding.
        """
        modulation = vector if self.modulation is None else self.modulation(vector)
        modulation = modulation if self.constants is None else modulation + self.constants
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, rotation, mask)
        if self.cross is not None:
            x = x + self.cross(x, tokens, token_mask)
        h = self.linear1(self.norm2(x) * (1 + scale2) + shift2)
        if self.gated:
            gate, value = h.chunk(2, dim=-1)
            h = F.silu(gate) * value
        else:
            h = F.gelu(h, approximate="tanh")
        out: Tensor = x + gate2 * self.linear2(self.dropout(h))
        return out
