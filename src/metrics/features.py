"""Feature extractors: pixels, the FID network and DINOv2. `classifier` and `efficientnet` define two more.

An extractor takes uint8 images (N, C, H, W) with 1 or 3 channels on its own device.
"""

import hashlib
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from src.cache import digest
from src.errors import one_line, optional_package

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"


class Features(NamedTuple):
    """Features (N, F) float64, and class probabilities (N, K) float64 if the extractor has classes."""

    features: Tensor
    probabilities: Tensor | None = None


class Extractor(Protocol):
    """A feature extractor; `fingerprint` identifies everything except the images that determines its features."""

    name: str
    fingerprint: str

    def __call__(self, images: Tensor, /) -> Features:
        """Extract features of images (N, C, H, W) uint8."""
        ...


class Pixels:
    """Use pixels 0..255 as features: for small images, and to find copies."""

    name = fingerprint = "pixels"

    def __call__(self, images: Tensor) -> Features:
        return Features(images.flatten(1).double())


class Values:
    """Use the values of points and tables (N, D) as features, divided by `scale` (D,) if not None.

    A column with `num_categories` above 0 holds indices of categories: it becomes a one-hot vector, so that two
    categories differ as much as two independent numbers do.
    """

    name = "values"

    def __init__(self, scale: Tensor | None = None, num_categories: Sequence[int] = ()) -> None:
        self.scale = scale
        self.num_categories = list(num_categories) if any(num_categories) else []
        self.fingerprint = f"values over {scale if scale is None else scale.tolist()}, {self.num_categories}"

    def __call__(self, samples: Tensor) -> Features:
        values = samples.flatten(1).double()
        scaled = values if self.scale is None else values / self.scale.to(values)
        columns = [
            F.one_hot(values[:, k].long(), count).double() if count else scaled[:, [k]]
            for k, count in enumerate(self.num_categories)
        ]
        return Features(torch.cat(columns, dim=1) if columns else scaled)


class Inception:
    """Use torch-fidelity's Inception network, the one of FID, KID and the Inception score: F = 2048.

    It resizes like the original, so metrics are comparable with published ones. `weights` is the path of the file
    `INCEPTION`, whose SHA-256 must begin with `sha256`; None uses torch's download folder, and downloads it if missing.

    Raises ValueError if the file or torch-fidelity is missing, or if it is another file.

    Source: Szegedy et al. 2015 (arXiv 1512.00567).
    """

    name = "inception"

    def __init__(
        self, weights: Path | None = None, device: torch.device | str = "cpu", sha256: str = INCEPTION_SHA256
    ) -> None:
        with optional_package("features=inception", "torch-fidelity"):
            from torch_fidelity import feature_extractor_inceptionv3 as fidelity
        path = weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
        try:
            if weights is None and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(fidelity.URL_INCEPTION_V3, str(path), INCEPTION_SHA256, progress=False)
            contents = path.read_bytes()
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"no file {path} ({one_line(error)}): put {INCEPTION} there, or type inception_weights=FILE"
            ) from error
        self.fingerprint = hashlib.sha256(contents).hexdigest()
        if not self.fingerprint.startswith(sha256):
            raise ValueError(
                f"{path} has the sha256 {self.fingerprint[:8]}..., {INCEPTION} has {sha256}...: download it again"
            )
        # torch-fidelity unpickles its file without restrictions, so it receives a copy that holds tensors only.
        safe = io.BytesIO()
        try:
            torch.save(torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True), safe)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path} holds more than weights: download {INCEPTION} again") from error
        safe.seek(0)
        net = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], safe)
        self.net = net.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        features, logits = self.net(to_rgb(images))
        return Features(features.double(), logits.double().softmax(1))


class DinoV2:
    """Use the class token of DINOv2, whose distances agree better with human ratings than Inception's.

    `model` is a local folder or a Hugging Face name; its safetensors file is read. Images are resized to
    `size` x `size` without cropping. Raises ValueError if the model is not available.

    Source: Oquab et al. 2023 (arXiv 2304.07193); Stein et al. 2023 (arXiv 2306.04675).
    """

    name = "dinov2"

    def __init__(
        self, model: str = "facebook/dinov2-large", device: torch.device | str = "cpu", size: int = 224
    ) -> None:
        with optional_package("features=dinov2", "transformers"):
            from transformers import AutoModel
        try:
            net = AutoModel.from_pretrained(model, use_safetensors=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"dinov2_model={model} is not available and could not be downloaded ({one_line(error)}): set it to a "
                "folder with config.json and model.safetensors"
            ) from error
        self.net = net.to(device).eval()
        self.size = size
        self.fingerprint = digest(size, *(part for item in net.state_dict().items() for part in item))
        self._mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)  # ImageNet statistics
        self._std = torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        return Features(self._tokens(images)[:, 0].double())

    @torch.no_grad()
    def feature_map(self, images: Tensor) -> Tensor:
        """Return features of the patches of the resized images, (N, F, size / patch, size / patch)."""
        side = self.size // self.net.config.patch_size
        patches = self._tokens(images)[:, -(side**2) :]  # after the class token and registers
        return patches.transpose(1, 2).reshape(len(images), -1, side, side)

    def to(self, device: torch.device) -> None:
        """Move the network to a device."""
        self.net.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)

    def _tokens(self, images: Tensor) -> Tensor:
        x = to_rgb(images).float() / 255
        x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        tokens: Tensor = self.net((x - self._mean) / self._std).last_hidden_state
        return tokens


def to_rgb(images: Tensor) -> Tensor:
    """Return images (N, 1 or 3, H, W) uint8 as (N, 3, H, W); gray channels are repeated."""
    return images.expand(-1, 3, -1, -1)
