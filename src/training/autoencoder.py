"""Train an autoencoder of images (Rombach et al. 2022, arXiv 2112.10752, sec. 3.1, without the discriminator)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from src.data.batches import Batch
from src.data.samplers import VALIDATION
from src.metrics.efficientnet import PerceptualDistance
from src.models.autoencoder import KLAutoencoder, Reconstruction, kl_divergence
from src.training.base import TrainingModule


class AutoencoderLoss:
    """Add mean absolute error, KL divergence in nats per value of the image, and perceptual distance, with weights.

    Latent diffusion sums both over the image, so `kl_weight` has its meaning there. Raises ValueError for a negative
    weight.
    """

    def __init__(self, kl_weight: float = 1e-6, perceptual_weight: float = 0.0) -> None:
        for name, value in {"kl_weight": kl_weight, "perceptual_weight": perceptual_weight}.items():
            if value < 0:
                raise ValueError(f"loss.{name}={value} must be at least 0")
        self.kl_weight = kl_weight
        self.perceptual_weight = perceptual_weight
        self.perceptual = PerceptualDistance() if perceptual_weight else None

    def __call__(self, x: Tensor, out: Reconstruction) -> dict[str, Tensor]:
        """Return the terms of images x (B, C, H, W) in [-1, 1], each (B,), including "loss"."""
        l1 = (out.images - x).abs().flatten(1).mean(1)
        kl = kl_divergence(out.mean, out.logvar) / x[0].numel()
        terms = {"l1": l1, "kl": kl}
        loss = l1 + self.kl_weight * kl
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(out.images, x)
            loss = loss + self.perceptual_weight * terms["perceptual"]
        return {"loss": loss, **terms}


class LatentStatistics(Metric):
    """Mean and standard deviation of each channel of latents, over all samples and positions."""

    sums: Tensor  # (3, K) sums of ones, values and squares

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(3, latent_channels), dist_reduce_fx="sum")

    def update(self, z: Tensor) -> None:
        """Add latents (B, K, H, W)."""
        z = z.float()
        self.sums += torch.stack([part.sum((0, 2, 3)) for part in (torch.ones_like(z), z, z.square())])

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return means (K,) and standard deviations (K,)."""
        mean, square = self.sums[1:] / self.sums[0]
        return mean, (square - mean.square()).clamp(min=0).sqrt()


class AutoencoderModule(TrainingModule):
    """Train the autoencoder `net` of images of `shape` (C, H, W).

    `TrainingModule.prepare_training` describes `optimizer`, `lr_scheduler`, `lr_multipliers` and
    `decay_matrices_only`.
    """

    net: KLAutoencoder

    def __init__(
        self,
        net: KLAutoencoder,
        loss_fn: AutoencoderLoss,
        shape: Sequence[int],
        seed: int = 0,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
        lr_multipliers: Mapping[str, float] | None = None,
        decay_matrices_only: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.loss_fn = loss_fn
        self.shape = tuple(shape)
        self.compiled_training = None
        self.latents = LatentStatistics(net.latent_channels)
        perceptual = ["perceptual"] if loss_fn.perceptual_weight else []
        terms = ["loss", "l1", "kl", *perceptual, "psnr"]
        self.prepare_training(terms, seed, optimizer, lr_scheduler, lr_multipliers, decay_matrices_only)

    def hidden_matrices(self) -> dict[nn.Parameter, str]:
        """Return the weight matrices but those of the first and the last layer of the encoder and of the decoder."""
        parts = {"encoder": self.net.encoder, "decoder": self.net.decoder}
        ends = [f"{name}.{k}." for name, part in parts.items() for k in (0, len(part) - 1)]
        return {p: name for p, name in super().hidden_matrices().items() if not name.startswith(tuple(ends))}

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Return the loss of one batch, and its terms, each (B,)."""
        terms = self.loss_fn(batch["x"], self.reconstruct(batch, self.global_step))
        return {"loss": terms["loss"].mean(), "terms": {name: x.detach() for name, x in terms.items()}}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        out = self.reconstruct(batch, VALIDATION)
        self.log_validation({**self.loss_fn(batch["x"], out), "psnr": psnr(batch["x"], out.images)})
        self.latents.update(out.latents)

    def on_validation_epoch_end(self) -> None:
        """Log mean and standard deviation of each channel of the latents."""
        for name, values in zip(("mean", "std"), self.latents.compute(), strict=True):
            self.log_dict({f"val/latent_{name}_{k}": value for k, value in enumerate(values)}, sync_dist=True)
        self.latents.reset()

    def reconstruct(self, batch: Batch, step: int) -> Reconstruction:
        """Decode samples of the posterior, with noise keyed by step and position in the global batch."""
        x = batch["x"].contiguous(memory_format=torch.channels_last)
        latent = (self.net.latent_channels, *self.net.size_of_latents(x.shape[2:]))
        net = self.compiled_training if self.compiled_training is not None and torch.is_grad_enabled() else self.net
        out: Reconstruction = net(x, self.step_rng(batch, step).normal("posterior", latent))
        return out


def psnr(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image (B, C, H, W) in dB (B,).

    The data range is 2, that of [-1, 1]; the reconstruction is clipped to it. At most 100 dB.
    """
    error = (reconstruction.clamp(-1, 1) - x).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=4e-10))
