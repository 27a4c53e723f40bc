"""A convolutional autoencoder with a Gaussian posterior (Rombach et al. 2022, arXiv 2112.10752, sec. 3.1)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from src.models.layers import (
    Downsample,
    ResidualBlock,
    SelfAttention,
    Upsample,
    check_positive,
    fit_groups,
    shape_of_data,
)

MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0
"""Bounds of the logarithm of the posterior's variance, as in the code of latent diffusion."""


class Reconstruction(NamedTuple):
    """Images (B, C, H, W), and a latent, mean and log-variance of the posterior, each (B, latent_channels, h, w)."""

    images: Tensor
    latents: Tensor
    mean: Tensor
    logvar: Tensor


class KLAutoencoder(nn.Module):
    """Encode images (B, channels, H, W) in [-1, 1] as normal distributions of latents, and decode latents.

    Latents have shape (B, latent_channels, H / factor, W / factor), with factor = 2^(stages - 1). Stage i has
    model_channels * channel_mult[i] channels, `num_res_blocks` residual blocks in the encoder and one more in the
    decoder; each but the last halves the size. Between the stages and the latents are two residual blocks with
    self-attention between them.

    Raises ValueError for a size that `factor` does not divide.
    """

    def __init__(
        self,
        channels: int | None,
        image_size: int | Sequence[int] | None,
        latent_channels: int = 4,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 4),
        num_res_blocks: int = 2,
    ) -> None:
        super().__init__()
        channels, size = shape_of_data(channels, image_size)
        check_positive(channels=channels, latent_channels=latent_channels, model_channels=model_channels)
        check_positive(num_res_blocks=num_res_blocks, channel_mult=channel_mult)
        self.channels = channels
        self.latent_channels = latent_channels
        self.factor = 2 ** (len(channel_mult) - 1)
        self.latent_size = self.size_of_latents(size)
        widths = [model_channels * m for m in channel_mult]
        deepest, eps = widths[-1], 1e-6

        def residual(c_in: int, c_out: int) -> ResidualBlock:
            return ResidualBlock(c_in, c_out, None, fit_groups(model_channels), norm_eps=eps)

        def middle() -> list[nn.Module]:
            attention = SelfAttention(deepest, fit_groups(model_channels), num_heads=1, norm_eps=eps)
            return [residual(deepest, deepest), attention, residual(deepest, deepest)]

        def output(c: int, channels: int) -> list[nn.Module]:
            return [nn.GroupNorm(fit_groups(model_channels), c, eps), nn.SiLU(), nn.Conv2d(c, channels, 3, padding=1)]

        c = widths[0]
        down: list[nn.Module] = [nn.Conv2d(channels, c, 3, padding=1)]
        for i, width in enumerate(widths):
            for _ in range(num_res_blocks):
                down.append(residual(c, width))
                c = width
            if i < len(widths) - 1:
                down.append(Downsample(c, padding=0))
        up: list[nn.Module] = []
        for i, width in reversed(list(enumerate(widths))):
            for _ in range(num_res_blocks + 1):
                up.append(residual(c, width))
                c = width
            if i > 0:
                up.append(Upsample(c))
        self.encoder = nn.Sequential(*down, *middle(), *output(deepest, 2 * latent_channels))
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, deepest, 3, padding=1), *middle(), *up, *output(c, channels)
        )

    def forward(self, x: Tensor, noise: Tensor) -> Reconstruction:
        """Decode a sample of the posterior of x, mean + std * noise; noise has the shape of the latents."""
        mean, logvar = self.posterior(x)
        z = mean + (0.5 * logvar).exp() * noise
        return Reconstruction(self.decode(z), z, mean, logvar)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the posterior of x in float32, each of the shape of the latents."""
        self.size_of_latents(x.shape[2:])
        mean, logvar = self.encoder(x.to(self.dtype)).float().chunk(2, dim=1)
        return mean, logvar.clamp(MIN_LOGVAR, MAX_LOGVAR)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the posterior of x, each of the shape of the latents."""
        mean, logvar = self.posterior(x)
        return mean, (0.5 * logvar).exp()

    def decode(self, z: Tensor) -> Tensor:
        """Return the images of latents z in float32, about in [-1, 1]."""
        out: Tensor = self.decoder(z.to(self.dtype))
        return out.float()

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype

    def size_of_latents(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the sides of the latents of images. Raises ValueError if `factor` does not divide the sides."""
        if len(size) != 2 or any(n % self.factor for n in size):
            near = [max(1, round(n / self.factor)) * self.factor for n in size]
            shown, fix = (f"'data.image_size=[{','.join(map(str, sides))}]'" for sides in (size, near))
            raise ValueError(
                f"{shown} must be two sides that {self.factor} divides, the factor of this autoencoder; "
                + (f"set '{fix}'" if len(size) == 2 else "choose data of images")
            )
        return tuple(n // self.factor for n in size)


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return KL(N(mean, exp(logvar)) || N(0, 1)) in nats, summed over each sample: (B, *latent) -> (B,).

    Source: Kingma & Welling 2013 (arXiv 1312.6114), app. B.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
