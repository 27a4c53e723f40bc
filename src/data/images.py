"""The image data module, and its sources that are not folders: scikit-learn's digits and torchvision's datasets."""

import pickle
import re
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from src.data.augment import EDM_LABELS, ColorJitter, EdmAugmentation, horizontal_flip, rotate, vertical_flip
from src.data.decode import from_pillow
from src.data.decoded import Array
from src.data.fit import ImageSpec, height_and_width, prepare_image, spatial_size
from src.data.module import BaseDataModule, Coupling
from src.data.read_errors import read_with_retries
from src.data.sources import Covariates, InMemory, Labels, Source, normalize, to_uint8
from src.errors import format_override
from src.rng import StepRng

HORIZONTAL = r"\b(left|right)"
VERTICAL = r"\b(top|bottom|above|below|upper|lower|up|down|upside)\b"
"""Words of captions that mirroring and rotating make wrong."""

MAX_CAPTIONS = 10_000
"""Captions that are searched for these words."""
RESIZED_AT_ONCE = 4096
"""Images of a dataset in memory that are resized together."""


class OpenImages(Protocol):
    """Opens a source of images (N, channels, H, W) from `root`, uint8 or float32; `image_size` is H = W, or (H, W).

    `prepare`, set once per machine before training, downloads the files or checks that each can be read. A source of
    float32 images, or of fewer values than 256, has the attributes `value_range` and `dtype` of `ImageSource`.
    """

    def __call__(self, root: Any, image_size: int | Sequence[int], channels: int, prepare: bool = False) -> Source: ...


class ImageDataModule(BaseDataModule):
    """Images (channels, H, W): values of the files until on the device, then float32 in [-1, 1].

    Args:
        source: opens the images under `root`.
        image_size: H = W, or (H, W), in pixels.
        num_values: the number of values of a pixel, from 0 on, such as 256 for 8 bits. None takes those of the source.
        value_range: the values that become -1 and 1. None takes `num_values`, or those of the source.
        dtype: the type of the values in the files. None takes that of the source.
        file_type: the suffix of the files, for saved samples. None takes that of the source.
        flip: mirror half of the training images left to right.
        vertical_flip: mirror half of the training images top to bottom.
        rotations: rotate each training image by 0, 90, 180 or 270 degrees.
        color_jitter: the arguments of `src.data.augment.ColorJitter`.
        edm_augment: the probability of each change of `src.data.augment.EdmAugmentation`; 0 turns it off.
        balance_classes: draw the class of each training image uniformly, then an image of that class.

    The other arguments are those of `BaseDataModule`.
    """

    inferred_settings: ClassVar[Sequence[str]] = ("value_range", "dtype", "file_type")

    def __init__(
        self,
        source: OpenImages,
        root: Any,
        channels: int,
        image_size: int | Sequence[int],
        num_values: int | None = None,
        value_range: Sequence[float] | None = None,
        dtype: str | None = None,
        file_type: str | None = None,
        flip: bool = False,
        vertical_flip: bool = False,
        rotations: bool = False,
        color_jitter: Mapping[str, float] | None = None,
        edm_augment: float = 0.0,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        microbatch_size: int | Literal["auto"] | None = None,
        skip_unreadable: bool = False,
        balance_classes: bool = False,
        coupling: Coupling = "independent",
    ) -> None:
        super().__init__(
            partial(source, root, image_size, channels), (channels, *spatial_size(image_size)), batch_size,
            val_fraction, split_seed, seed, num_workers, microbatch_size, skip_unreadable,
        )  # fmt: skip
        if channels < 1:
            raise ValueError(f"data.channels={channels} must be at least 1; 1 is gray, 3 is RGB")
        if num_values is not None and not 2 <= num_values <= 65536:
            raise ValueError(f"data.num_values={num_values} must be in [2, 65536]; 8-bit images have 256")
        if num_values is not None and value_range is None:
            value_range, dtype = (0.0, num_values - 1.0), dtype or "uint8"
        self._prepare = partial(source, root, image_size, channels, prepare=True)
        self._prepared = False
        self._scaled = num_values is not None
        self.color_jitter = ColorJitter.of(color_jitter or {}, channels)
        size = list(spatial_size(image_size))
        if rotations and len({*size}) > 1:
            raise ValueError(f"data.rotations=true needs square images, and data.image_size={size}; set one number")
        if not 0 <= edm_augment <= 1:
            raise ValueError(f"data.edm_augment={edm_augment} must be in [0, 1]; 0.12 is usual, 0 turns it off")
        self.flip = flip
        self.vertical_flip = vertical_flip
        self.rotations = rotations
        self.edm = EdmAugmentation(edm_augment) if edm_augment else None
        self.augment_labels = EDM_LABELS if edm_augment else 0
        self.balance_classes = balance_classes
        self.coupling = coupling
        self.value_range = value_range
        self.dtype = dtype
        self.file_type = file_type

    @property
    def num_values(self) -> int | None:  # type: ignore[override]
        """The number of values of a pixel, or None for floats."""
        low, high = self._range()
        return None if np.dtype(self.dtype or "uint8").kind == "f" else round(high - low) + 1

    @property
    def inferred(self) -> Mapping[str, Any]:
        if self._scaled:  # `num_values` says all
            return {}
        if self.value_range is None or self.dtype is None:
            self.prepare_once_per_node()
        return {"value_range": list(self._range()), "dtype": self.dtype, "file_type": self.file_type}

    def prepare_data(self) -> None:
        if not self._prepared:  # Lightning calls this at each fit and validate
            self._prepared = True
            self._prepare()

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        self.read_errors.names |= {*getattr(self.source, "unreadable", ())}
        if self.rotations and hasattr(self.source, "buckets"):
            raise ValueError("data.rotations=true excludes data.source.fit=buckets; leave one out")
        if stage == "fit":
            self._warn_about_captions()
        self.value_range = self.value_range or getattr(self.source, "value_range", (0.0, 255.0))
        self.dtype = self.dtype or getattr(self.source, "dtype", "uint8")
        self.file_type = self.file_type or getattr(self.source, "suffix", ".png")

    def preprocess(self, x: Tensor) -> Tensor:
        return normalize(x, self._range())

    def postprocess(self, x: Tensor) -> Tensor:
        """Return images to look at: uint8 (N, 1 or 3, H, W). RGBA is composed on white; of other channels, three."""
        shown = to_uint8(x, min(self.num_values or 256, 256))
        channels = shown.shape[-3]
        if channels == 4:
            share = shown[..., 3:, :, :].float() / 255
            return (shown[..., :3, :, :] * share + 255 * (1 - share)).round().to(torch.uint8)
        return shown if channels in (1, 3) else shown[..., : 1 if channels == 2 else 3, :, :]

    def denormalize(self, x: Tensor) -> Tensor:
        """Return samples with the values of the files: uint8 for 8 bits, else float32, rounded for integers."""
        if self._scaled:
            return self.postprocess(x)
        low, high = self._range()
        values = (x.float().clamp(-1, 1) + 1) * ((high - low) / 2) + low
        if self.num_values is None:
            return values
        integers = values.round()
        return integers.to(torch.uint8) if low >= 0 and high <= 255 else integers

    def display(self, samples: Tensor) -> Tensor:
        return samples if self._scaled else self.postprocess(self.preprocess(samples))

    def augment(self, x: Tensor, rng: StepRng) -> tuple[Tensor, Tensor | None]:
        if self.flip:
            x = horizontal_flip(x, rng)
        if self.vertical_flip:
            x = vertical_flip(x, rng)
        if self.rotations:
            x = rotate(x, rng)
        if any(self.color_jitter):
            x = self.color_jitter(x, rng)
        return (x, None) if self.edm is None else self.edm(x, rng)

    def _warn_about_captions(self) -> None:
        """Warn if images are mirrored or rotated whose captions name sides."""
        changes = {"flip": self.flip, "vertical_flip": self.vertical_flip, "rotations": self.rotations}
        captions = None if self.source is None else self.source.captions
        if captions is None or self.condition is None or not any(changes.values()):
            return
        mirrors_only = self.flip and not (self.vertical_flip or self.rotations)
        pattern = re.compile(HORIZONTAL if mirrors_only else f"{HORIZONTAL}|{VERTICAL}", re.IGNORECASE)
        texts = [each[0] for each in islice(captions, MAX_CAPTIONS) if each]
        if named := [text for text in texts if pattern.search(text)]:
            settings = " ".join(f"data.{name}=true" for name, value in changes.items() if value)
            warnings.warn(
                f"{settings} changes sides, and {len(named)} of {len(texts)} captions name one, such as {named[0]!r}; "
                + " ".join(f"data.{name}=false" for name, value in changes.items() if value),
                stacklevel=2,
            )

    def _range(self) -> tuple[float, float]:
        if self.value_range is None:
            self.setup()
        assert self.value_range is not None
        low, high = self.value_range
        return float(low), float(high)


@dataclass(eq=False)
class ImageFiles:
    """A source that decodes images at every access: `open_image(i)` returns image i, of any size and mode.

    `fetch` raises DataReadError.
    """

    open_image: Callable[[int], Image.Image]
    count: int
    spec: ImageSpec
    labels: Labels | None = None
    covariates: Covariates | None = None
    captions: Sequence[Sequence[str]] | None = None
    ids: Sequence[str] | None = None

    def __len__(self) -> int:
        return self.count

    def stamps(self) -> None:
        return None

    def fetch(self, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([read_with_retries(f"image {i}", partial(self._read, i)) for i in indices]))

    def _read(self, i: int) -> Array:
        with self.open_image(i) as image:
            return prepare_image(from_pillow(image), self.spec).pixels


def digits(root: str | None, image_size: int | Sequence[int], channels: int, prepare: bool = False) -> Source:
    """Open scikit-learn's 1,797 handwritten digits, 8x8 with pixel values 0 to 16; needs no download."""
    from sklearn.datasets import load_digits

    wanted = (*height_and_width(image_size), channels)
    if wanted != (8, 8, 1):
        raise ValueError("data=digits are 8x8 and gray; set data.image_size=8 data.channels=1")
    loaded = load_digits()
    labels = Labels(torch.from_numpy(loaded.target).long(), [str(name) for name in loaded.target_names])
    return InMemory(torch.from_numpy(loaded.images.astype(np.uint8))[:, None], labels)


def torchvision_images(
    root: str | None,
    image_size: int | Sequence[int],
    channels: int,
    prepare: bool = False,
    *,
    dataset: Callable[..., Any],
) -> Source:
    """Open a torchvision dataset, `dataset(root=..., download=...)`: in memory if it holds arrays, else lazily.

    Raises ValueError if the files are missing and cannot be downloaded.
    """
    opened = open_dataset(dataset, root, prepare)
    labels = _labels_of(opened)
    height, width = height_and_width(image_size)
    data = getattr(opened, "data", None)
    if data is None:
        return ImageFiles(partial(_image_of, opened), len(opened), ImageSpec((height, width), channels), labels)
    images = torch.as_tensor(data)
    if images.ndim == 3:
        images = images[:, None]  # (N, H, W)
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)  # (N, H, W, 3)
    if images.shape[-2:] != (height, width):
        # In parts, since resizing takes several times the memory.
        parts = [TF.resize(part, [height, width], antialias=True) for part in torch.split(images, RESIZED_AT_ONCE)]
        images = torch.cat(parts)
    if images.shape[1] != channels:
        images = TF.rgb_to_grayscale(images) if channels == 1 else images.expand(-1, 3, -1, -1)
    return InMemory(images.contiguous(), labels)


def open_dataset(dataset: Callable[..., Any], root: str | None, prepare: bool) -> Any:
    """Return a torchvision dataset, after downloading its files if `prepare` is true and they are missing.

    Raises ValueError if the files are missing and cannot be downloaded.
    """
    inner: Any = dataset
    while isinstance(inner, partial):
        inner = inner.func
    name = getattr(inner, "__name__", "dataset")
    if root is None:
        raise ValueError(f"data.root=null is not a folder; set data.root to the folder of {name}")
    try:
        return dataset(root=root, download=prepare)
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, pickle.UnpicklingError, zlib.error) as error:
        # Torchvision has no single error for missing files without network, nor for incomplete files.
        reason = " ".join(str(error).split())[:200].rstrip(": ") or type(error).__name__
        raise ValueError(
            f"{format_override('data.root', Path(root).resolve())} "
            f"has no complete {name}, and it cannot be downloaded ({reason}); "
            "connect to the network, put the dataset's original files there, or set data.root to their folder"
        ) from error


def _labels_of(dataset: Any) -> Labels | None:
    """Return the labels of a torchvision dataset, its `targets` or `labels`; None if it has none for some images."""
    targets = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if targets is None:
        return None
    targets = torch.as_tensor(targets).long()
    if (targets < 0).any():
        return None
    classes = getattr(dataset, "classes", None) or range(int(targets.max()) + 1)
    return Labels(targets, [str(name) for name in classes])


def _image_of(dataset: Any, i: int) -> Image.Image:
    """Return the image of a torchvision dataset's pair of image and target."""
    image: Image.Image = dataset[i][0]
    return image
