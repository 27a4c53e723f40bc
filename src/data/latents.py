"""Latents of images by a frozen autoencoder, encoded once into a cache on disk, as data of a diffusion model."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from src.cache import digest
from src.data.batches import Batch
from src.data.images import ImageDataModule
from src.data.latent_source import CachedLatents, LatentSource, write_latents
from src.data.module import BaseDataModule
from src.data.pixel_store import default_cache_dir, fill_cache
from src.data.sources import Source
from src.data.split import hash_ids, sample_ids
from src.errors import format_override, memory_errors

VERSION = 1
"""Changes whenever the same images and the same autoencoder give other latents."""
NUM_AT_ONCE = 16
"""Images that are encoded or decoded at once, unless `autoencoder.batch_size` is set."""
MAX_MEASURED = 10_000
"""Training images on which scale and shift are measured."""
OTHER_SETTINGS = (
    *("batch_size", "microbatch_size", "num_workers", "seed", "split_seed", "val_fraction", "skip_unreadable"),
    *("balance_classes", "coupling", "repeats", "cache", "cache_dir", "flip", "dtype", "file_type"),
)
"""Settings of the data that do not change the latents of an image, or that the key of the cache has in another form."""


class Autoencoder(Protocol):
    """A frozen autoencoder of images (B, channels, H, W) in [-1, 1]."""

    channels: int
    latent_channels: int
    factor: int
    """A side of the images divided by that of their latents."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents, each (B, latent_channels, H / factor, W / factor).

        The standard deviation is 0 for a deterministic encoder.
        """
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Return the images of latents, about in [-1, 1]."""
        ...

    def to(self, device: torch.device) -> Self: ...


class LatentDataModule(BaseDataModule):
    """Latents of `images` by `autoencoder`, minus `shift` and times `scale` per channel.

    A training sample is drawn anew in each step from the posterior of the image, keyed by (seed, step, position); a
    validation sample is always the same. Samples of the network are decoded, and then displayed and saved as images.

    Args:
        fingerprint: identifies the weights of the autoencoder.
        settings: the settings of the images, part of the key of the cache.
        scale, shift: one number, or one per channel; None until `measure` is called.
        dtype: type of the cached latents: float32, or float16 for half the size.
        num_at_once: images that are encoded or decoded at once.
        device: encodes and decodes. None encodes on an accelerator if there is one, and decodes where the samples are.
        is_cached: encode all images once, into `cache_dir`; otherwise encode those that are fetched, unless the cache
            has them.
        image_steps: the training steps whose batches have the `images` of the latents, too.

    Raises ValueError for images that the autoencoder does not take, and for random changes of images.
    """

    def __init__(
        self,
        images: ImageDataModule,
        autoencoder: Autoencoder,
        fingerprint: str,
        settings: Mapping[str, Any],
        scale: float | Sequence[float] | None = None,
        shift: float | Sequence[float] | None = None,
        dtype: str | None = None,
        num_at_once: int | None = None,
        cache_dir: str | None = None,
        device: torch.device | None = None,
        is_cached: bool = True,
        image_steps: range = range(0),
    ) -> None:
        check_augmentation(images, settings)
        shape = latent_shape(autoencoder, images.shape)
        super().__init__(
            self._open, shape, images.batch_size, images.val_fraction, images.split_seed, images.seed,
            images.num_workers,
        )  # fmt: skip
        self.images = images
        self.autoencoder = autoencoder
        self.fingerprint = fingerprint
        self.settings = settings
        self.scale = None if scale is None else per_channel("scale", scale, shape[0])
        self.shift = None if shift is None else per_channel("shift", shift, shape[0])
        self.dtype = dtype or "float32"
        self.num_at_once = num_at_once or NUM_AT_ONCE
        self.cache_dir = default_cache_dir().with_name("latents") if cache_dir is None else Path(cache_dir)
        self.device = device
        self.is_cached = is_cached
        self.image_steps = image_steps
        self.balance_classes = images.balance_classes
        self.coupling = images.coupling
        self.read_errors = images.read_errors

    @property
    def inferred(self) -> Mapping[str, Any]:
        return self.images.inferred

    @property
    def displayed(self) -> BaseDataModule:
        return self.images

    def prepare_data(self) -> None:
        self.images.prepare_data()
        self._set_up_images()
        if not self.is_cached:
            return
        folder = self._folder()
        try:
            CachedLatents.find(folder) or fill_cache(folder, CachedLatents.find, self._encode_all)
        except OSError as error:
            setting = format_override("autoencoder.cache_dir", self.cache_dir)
            raise ValueError(f"{setting} cannot hold the latents ({error}); set it to a folder with room") from error

    def setup(self, stage: str | None = None) -> None:
        self._set_up_images(stage)
        if self.source is None:
            self.source = self._open()
            self.train_indices, self.val_indices = self.images.train_indices, self.images.val_indices
            self.threshold = self.images.threshold

    def training_indices(self) -> list[int]:
        return self.images.training_indices()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if "images" in batch:
            batch["images"] = self.images.preprocess(batch["images"])
        return super().on_after_batch_transfer(batch, dataloader_idx)

    def preprocess(self, x: Tensor) -> Tensor:
        scale, shift = self._scaling(x.device)
        return (x.float() - shift) * scale

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        device = self.device or x.device
        scale, shift = self._scaling(x.device)
        autoencoder = self.autoencoder.to(device)
        parts = torch.split(x.float() / scale + shift, self.num_at_once)
        with memory_errors(self._explain_memory):
            return torch.cat([autoencoder.decode(part.to(device)).float().to(x.device) for part in parts])

    def displayed_examples(self, count: int) -> Tensor:
        return self.images.displayed_examples(count)

    def postprocess(self, x: Tensor) -> Tensor:
        return self.images.postprocess(self.decode(x))

    def denormalize(self, x: Tensor) -> Tensor:
        return self.images.denormalize(self.decode(x))

    def display(self, samples: Tensor) -> Tensor:
        return self.images.display(samples)

    def measure(self) -> None:
        """Set scale and shift, unless they are set, so that training latents have mean 0 and standard deviation 1."""
        source, channels = self._source(), self.shape[0]
        assert isinstance(source, LatentSource)
        if self.scale is not None and self.shift is not None:
            return
        sums, count = torch.zeros(2, channels, dtype=torch.float64), 0
        for mirrored in range(1 + source.flips):
            for part in torch.split(torch.tensor(self.train_indices[:MAX_MEASURED]), 256):
                mean, *std = source.read(part.tolist(), [mirrored] * len(part)).double().unbind(1)
                square = mean.square() + (std[0].square() if std else 0)
                sums += torch.stack([x.sum((0, 2, 3)) for x in (mean, square)])
                count += mean[:, 0].numel()
        mean, square = sums / count
        std = (square - mean.square()).clamp(min=1e-12).sqrt()
        if self.scale is None:
            self.scale = per_channel("scale", [float(f"{x:.6g}") for x in (1 / std).tolist()], channels)
        if self.shift is None:
            self.shift = per_channel("shift", [float(f"{x:.6g}") for x in mean.tolist()], channels)

    def _scaling(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return scale and shift (C, 1, 1)."""
        assert self.scale is not None and self.shift is not None
        scale, shift = (torch.tensor(x, device=device).view(-1, 1, 1) for x in (self.scale, self.shift))
        return scale, shift

    def _set_up_images(self, stage: str | None = None) -> None:
        self.images.fingerprint_path, self.images.condition = self.fingerprint_path, self.condition
        self.images.setup(stage)

    def _open(self) -> LatentSource:
        images, read = self._images_source(), CachedLatents.find(self._folder())
        if read is None and self.is_cached:
            raise FileNotFoundError(f"{self._folder()} does not exist; encode the images first")
        summary, shape = getattr(images, "summary", ""), "x".join(map(str, self.shape))
        return LatentSource(
            read or self._encode_some,
            self.images.flip,
            len(images),
            images.labels,
            images.covariates,
            images.captions,
            images.ids,
            images.stamps(),
            f"{summary}; latents of shape {shape}" if summary else "",
            getattr(images, "unreadable", {}),
            images,
            self.image_steps,
        )

    def _images_source(self) -> Source:
        source = self.images.source
        assert source is not None
        if hasattr(source, "fetch_training"):
            raise ValueError(f"data.source={type(source).__name__} {AT_RANDOM}; choose another source")
        return source

    def _folder(self) -> Path:
        """Return the folder of the cache, whose name changes with the autoencoder, the images and their settings."""
        source = self._images_source()
        stamps, identity = source.stamps(), getattr(getattr(source, "found", source), "identity", None)
        settings = {name: value for name, value in self.settings.items() if name not in OTHER_SETTINGS}
        if stamps is not None:  # which identify the images in any folder
            settings.pop("root", None)
        settings |= self.images.inferred
        text = json.dumps([settings, self.dtype, self.images.flip], sort_keys=True, default=str)
        contents = None if stamps is None else torch.tensor(stamps), None if identity is None else identity()
        ids = torch.from_numpy(hash_ids(sample_ids(source), 0).view(np.int64))
        return self.cache_dir / digest(VERSION, self.fingerprint, text, ids, *contents)

    def _encode_all(self, folder: Path) -> None:
        write_latents(folder, self._images_source(), self._encode, self.dtype, self.num_at_once, self.num_workers)

    def _encode_some(self, indices: Sequence[int], mirrored: Sequence[int]) -> Tensor:
        parts = torch.split(self._images_source().fetch(indices), self.num_at_once)
        return torch.cat([self._encode(part) for part in parts])[range(len(indices)), mirrored]

    @torch.no_grad()
    def _encode(self, raw: Tensor) -> Tensor:
        """Return mean and standard deviation (B, orientations, 2, C, h, w) of images of the source."""
        device = self.device or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        autoencoder = self.autoencoder.to(device)
        x = self.images.preprocess(raw.to(device))
        views = [x, x.flip(-1)] if self.images.flip else [x]
        with memory_errors(self._explain_memory):
            latents = [torch.stack(autoencoder.encode(view), dim=1).float().cpu() for view in views]
        return torch.stack(latents, dim=1)

    def _explain_memory(self) -> str:
        setting = "autoencoder.batch_size" if self.is_cached else "batch_size"  # of a trained run
        fix = f"{setting}={max(1, self.num_at_once // 4)}"
        return f"autoencoder.batch_size={self.num_at_once} images at once need more memory; type {fix}"


class ScaledDecoder(nn.Module):
    """The decoder of an autoencoder for latents (B, C, h, w) that have a shift and a scale per channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, autoencoder: Any, scale: Sequence[float], shift: Sequence[float]) -> None:
        super().__init__()
        self.autoencoder = copy.deepcopy(autoencoder).cpu()
        getattr(self.autoencoder, "net", self.autoencoder).encoder = None
        self.register_buffer("scale", torch.tensor(scale).view(-1, 1, 1))
        self.register_buffer("shift", torch.tensor(shift).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        images: Tensor = self.autoencoder.decode(x / self.scale + self.shift)
        return images


AT_RANDOM = "changes images at random in training, and their latents are encoded once"


def check_augmentation(images: ImageDataModule, settings: Mapping[str, Any]) -> None:
    """Raise ValueError for settings of random changes of images other than horizontal flips."""
    fit = (settings.get("source") or {}).get("fit")
    changes = {
        "data.vertical_flip=true": images.vertical_flip and "data.vertical_flip=false",
        "data.rotations=true": images.rotations and "data.rotations=false",
        **{
            f"data.color_jitter.{name}={strength}": strength and f"data.color_jitter.{name}=0"
            for name, strength in images.color_jitter._asdict().items()
        },
        f"data.edm_augment={settings.get('edm_augment')}": images.edm is not None and "data.edm_augment=0",
        f"data.source.fit={fit}": fit in ("random_crop", "buckets") and "data.source.fit=crop",
    }
    for setting, fix in changes.items():
        if fix:
            raise ValueError(f"{setting} {AT_RANDOM}; type {fix}, or leave autoencoder out")


def latent_shape(autoencoder: Autoencoder, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape (C, h, w) of the latents of images of `shape`.

    Raises ValueError for images that the autoencoder does not take.
    """
    channels, *size = shape
    if channels != autoencoder.channels:
        raise ValueError(
            f"data.channels={channels} must be {autoencoder.channels}, the channels of the autoencoder; type "
            f"data.channels={autoencoder.channels}, or choose another autoencoder"
        )
    factor = autoencoder.factor
    if any(side % factor for side in size):
        near = [max(1, round(side / factor)) * factor for side in size]
        shown = format_override("data.image_size", near[0] if len({*near}) == 1 else near)
        override = format_override("data.image_size", size)
        raise ValueError(f"{override} must be a multiple of {factor}, the factor of the autoencoder; type {shown}")
    return (autoencoder.latent_channels, *(side // factor for side in size))


def per_channel(name: str, value: float | Sequence[float], channels: int) -> list[float]:
    """Return a setting as one number per channel. Raises ValueError for another number of values, or a scale <= 0."""
    try:
        values = [float(value)] * channels if isinstance(value, int | float) else [float(x) for x in value]
    except (TypeError, ValueError):
        values = []
    if len(values) != channels or (name == "scale" and min(values) <= 0):
        rule = " of more than 0" if name == "scale" else ""
        override = format_override(f"autoencoder.{name}", value)
        raise ValueError(
            f"{override} must be one number{rule}, or {channels}, one per channel of the latents; "
            "correct it, or leave it out"
        )
    return values
