"""Representation alignment (REPA): hidden features of the network learn those of a frozen encoder of images."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.data.batches import Batch
from src.distributed.sharding import shard
from src.errors import did_you_mean, format_override
from src.metrics.efficientnet import EfficientNet
from src.metrics.features import DinoV2
from src.training.checkpoints import PROJECTION
from src.training.module import DiffusionModule


class Encoder(Protocol):
    """A frozen encoder of images with 1 or 3 channels."""

    def feature_map(self, images: Tensor) -> Tensor:
        """Return features (N, F, h, w) of images (N, C, H, W) with values in [0, 255]."""

    def to(self, device: torch.device) -> Any:
        """Move to a device."""


@dataclass(eq=False)
class HiddenFeatures:
    """A forward hook that keeps the output of a module while `enabled`."""

    enabled: bool = False
    output: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.enabled:
            self.output = output


class AlignedModule(DiffusionModule):
    """A DiffusionModule whose loss also aligns hidden features of the network with those of an encoder.

    The outputs of the module `layer` of the network, projected by an MLP with two hidden layers of `width`, should
    have the directions of the features of the clean images. The term is `weight` times minus their mean cosine
    similarity. `layer` None takes the block that ends the first third of a transformer, or the middle of a U-Net.
    Samples are images, or latents of the images of shape `image_shape` in "images" of a batch.

    From the optimizer step `stop_step` on, the encoder and the projection are not used (None: never). Validation and
    samples do not use them either. The encoder is not part of the checkpoint. The projection is, to resume, but not
    part of an opened or exported model.

    Source: Yu et al. 2024 (arXiv 2410.06940), eq. 8; stopping early: Wang et al. 2025 (HASTE, arXiv 2505.16792).
    """

    def __init__(
        self,
        *args: Any,
        encoder: Encoder,
        layer: str | None = None,
        weight: float = 0.5,
        width: int = 512,
        stop_step: int | None = None,
        image_shape: tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.image_shape = image_shape
        shape = image_shape or self.shape
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(f"repa=default needs images with 1 or 3 channels, not of shape {shape}; leave it out")
        self.encoder = encoder
        self.repa_weight = weight
        self.stop_step = stop_step
        self.hidden = HiddenFeatures()
        layer = find_layer(self.net, layer)
        hidden = trial_output(self.net, layer, [torch.zeros(1, *self.shape), torch.zeros(1), self.null])
        setting = f"repa.layer={layer}"
        if not isinstance(hidden, Tensor) or hidden.ndim not in (3, 4):
            raise ValueError(f"{setting} must return tokens (B, L, C) or a feature map (B, C, h, w); name a block")
        num_patches = math.prod(self.patch_grid(self.shape))
        if hidden.ndim == 3 and hidden.shape[1] < num_patches:
            raise ValueError(
                f"{setting} returns {hidden.shape[1]} tokens, fewer than {num_patches} patches; name a block"
            )
        features = encoder.feature_map(torch.zeros(1, *shape)).shape[1]
        sizes = [hidden.shape[1 if hidden.ndim == 4 else 2], width, width, features]
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        self.repa = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])
        self.net.get_submodule(layer).register_forward_hook(self.hidden)
        self.find_weights()

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard(self.repa, self.device_mesh["data_parallel"])
        super().configure_model()

    def find_weights(self) -> None:
        super().find_weights()
        own = {id(p) for p in self.projection_weights}
        self.weights = tuple(p for p in self.weights if id(p) not in own)

    @property
    def projection_weights(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if name.startswith(PROJECTION)]

    def parameter_groups(self) -> list[dict[str, Any]]:
        projection = self.projection_weights  # empty in the constructor of the base class
        return [*super().parameter_groups(), *([{"params": projection}] if projection else [])]

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Clip the projection separately, so that it does not change the steps of the network."""
        nn.utils.clip_grad_norm_(self.projection_weights, max_norm)
        return super().clip_grad_norm(max_norm)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Add the alignment to the loss, and as the term "repa" to those that are logged."""
        if self.stop_step is not None and self.global_step >= self.stop_step:
            out = super().training_step(batch, batch_idx)
            # Several processes wait for the gradient of every weight.
            first, *_ = self.projection_weights
            idle = self.repa(torch.zeros(1, first.shape[1], device=first.device, dtype=first.dtype)).sum()
            return {**out, "loss": out["loss"] + 0 * idle}
        self.hidden.enabled = True
        try:
            out = super().training_step(batch, batch_idx)
        finally:
            self.hidden.enabled = False
        hidden, self.hidden.output = self.hidden.output, None
        assert hidden is not None
        distance = -self.similarity(batch["images" if self.image_shape else "x"], hidden)
        loss = out["loss"] + self.repa_weight * (out["weight"] * distance).mean()
        return {**out, "loss": loss, "terms": {**out["terms"], "repa": distance.detach()}}

    def patch_grid(self, shape: Sequence[int]) -> list[int]:
        """Return the number of patches along each side of data of `shape` (..., H, W), which differs in buckets."""
        return [-(-n // getattr(self.net, "patch_size", 1)) for n in shape[-2:]]

    def similarity(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Return the mean cosine similarity (B,) of images (B, C, H, W) in [-1, 1] and their hidden features.

        The features of the encoder are interpolated to the positions of the hidden ones, tokens (B, L, C) whose first
        ones are the patches, or a map (B, C, h, w).
        """
        self.encoder.to(images.device)
        target = self.encoder.feature_map(((images.float() + 1) * 127.5).clamp(0, 255)).float()
        data_shape = self.shape if self.image_shape else images.shape
        grid = list(hidden.shape[2:]) if hidden.ndim == 4 else self.patch_grid(data_shape)
        target = F.interpolate(target, grid, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
        tokens = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden[:, : target.shape[1]]
        return F.cosine_similarity(self.repa(tokens).float(), target, dim=2).mean(1)


def make_encoder(name: str) -> Encoder:
    """Return the packaged EfficientNet-Lite0, or the DINOv2 model in a folder. Raises ValueError if it is missing."""
    override = format_override("repa.encoder", name)
    if name != "efficientnet" and not Path(name).is_dir():
        raise ValueError(
            f"{override} must be efficientnet, or a folder with a DINOv2 model (config.json, model.safetensors)"
        )
    try:
        return EfficientNet() if name == "efficientnet" else DinoV2(name)
    except ValueError as error:
        raise ValueError(f"{override} cannot be loaded ({error})") from error


def find_layer(net: nn.Module, layer: str | None) -> str:
    """Return the name of the module to align. Raises ValueError for an unknown name, or if None finds none."""
    names = [name for name, _ in net.named_modules() if name]
    if layer is None:
        for container, fraction in (("blocks", 1 / 3), ("middle", 1)):
            count = sum(name.rpartition(".")[0] == container for name in names)
            if count:
                return f"{container}.{max(1, round(count * fraction)) - 1}"
        raise ValueError(f"repa.layer=null needs a network with blocks or a middle; name one of {', '.join(names[:8])}")
    if layer not in names:
        raise ValueError(f"repa.layer={layer} is not a module of the network; {did_you_mean(layer, names)}")
    return layer


def trial_output(net: nn.Module, layer: str, inputs: Sequence[Tensor | None]) -> Any:
    """Return the output of a module of the network, on the meta device; None if the network does not call it."""
    trial, kept = copy.deepcopy(net).to("meta"), HiddenFeatures(enabled=True)
    trial.get_submodule(layer).register_forward_hook(kept)
    with torch.no_grad():
        trial(*(x.to("meta") for x in inputs if x is not None))
    return kept.output
