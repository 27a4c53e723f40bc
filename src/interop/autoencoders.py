"""Autoencoders of the diffusers library, an optional extra, as this project uses them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.errors import first_names, one_line
from src.interop.diffusers_pipeline import read_config

CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
PATTERNS = (
    *("model.safetensors", "config.json", "diffusion_pytorch_model*.safetensors"),
    *("vae/config.json", "vae/diffusion_pytorch_model*.safetensors"),
)
"""The files of an autoencoder on the Hub, alone or in a pipeline."""


class DiffusersAutoencoder(nn.Module):
    """An `AutoencoderKL`, `AutoencoderTiny` or `AutoencoderDC` for images in [-1, 1].

    `scale` and `shift`, one number or one per channel, are those of its configuration: (z - shift) * scale has a
    standard deviation of about 1.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        config = net.config
        stages = config.get("encoder_block_out_channels") or config["block_out_channels"]
        self.channels: int = config["in_channels"]
        self.latent_channels: int = config["latent_channels"]
        self.factor: int = 2 ** (len(stages) - 1)
        self.scale: float | list[float] = config["scaling_factor"]
        self.shift: float | list[float] = config.get("shift_factor") or 0.0
        if config.get("latents_std") and config.get("latents_mean"):
            self.shift = list(config["latents_mean"])
            self.scale = [config["scaling_factor"] / std for std in config["latents_std"]]

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents of x; the latter is 0 for a deterministic encoder."""
        encoded = self.net.encode(x)
        if (posterior := getattr(encoded, "latent_dist", None)) is not None:
            return posterior.mean, posterior.std
        mean: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        return mean, torch.zeros_like(mean)

    def decode(self, z: Tensor) -> Tensor:
        """Return the images of latents."""
        images: Tensor = self.net.decode(z).sample
        return images


def autoencoder_folder(folder: Path) -> Path | None:
    """Return the folder of the autoencoder in a folder of diffusers: itself, or `vae` of a pipeline; None for others.

    Raises ValueError for a model of diffusers that is not an autoencoder of images.
    """
    for each in (folder, folder / "vae"):
        if (name := read_config(each / "config.json").get("_class_name")) in CLASSES:
            return each
        if name is not None and (name.startswith("Autoencoder") or each != folder):
            known = ", ".join(CLASSES)
            raise ValueError(f"autoencoder={each} holds {name} and must hold one of {known}; name another model")
    return None


def read_autoencoder(folder: Path) -> DiffusersAutoencoder:
    """Return the autoencoder in a folder of diffusers, in float32. Only JSON and tensors are read.

    Raises ValueError without the library, or for weights that cannot be read.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(
            f"autoencoder={folder} needs the package diffusers; pip install diffusers, or train an autoencoder with "
            "task=autoencoder"
        ) from error
    kind = getattr(diffusers, read_config(folder / "config.json")["_class_name"])
    try:
        net, loaded = kind.from_pretrained(
            str(folder),
            local_files_only=True,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"autoencoder={folder} cannot be read ({one_line(error)}); save it again") from error
    if missing := loaded["missing_keys"]:
        raise ValueError(f"autoencoder={folder} has no weights for {first_names(sorted(missing))}; save it again")
    return DiffusersAutoencoder(net)


def as_diffusers(autoencoder: Any) -> Any:
    """Return an autoencoder as a model of diffusers. Raises ValueError if it is not one."""
    if isinstance(autoencoder, DiffusersAutoencoder):
        return autoencoder.net
    raise ValueError(
        "format=diffusers needs an autoencoder of diffusers, and this one was trained here; type format=safetensors"
    )
