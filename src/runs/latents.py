"""Build the data of a run: images, points and tables, or the latents of images by an autoencoder."""

import functools
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from src.errors import command, format_override
from src.interop.hub_models import SCHEME, local_copy
from src.runs.autoencoder import is_autoencoder, open_autoencoder
from src.runs.imported import IMAGES, LATENTS, compose_train
from src.runs.nodes import instantiate_node, is_typed, to_plain
from src.runs.trust import check_texts

if TYPE_CHECKING:
    from src.data.latents import Autoencoder, ScaledDecoder
    from src.data.module import BaseDataModule
    from src.interop.diffusers_export import Latents


SETTINGS = ("path", "scale", "shift", "dtype", "batch_size", "cache_dir", "fingerprint")
"""Settings of the node `autoencoder`."""
ARRAYS = "src.data.arrays.ArrayDataModule"
"""Data that may be latents already."""
INFERRED = ("scale", "shift", "fingerprint")
"""Settings of the node `autoencoder` that a run stores and keeps."""


def has_autoencoder(settings: Mapping[Any, Any]) -> bool:
    """Return whether the configuration of a run trains in latents."""
    node = settings.get("autoencoder") or {"path": None, "fingerprint": None}
    return node["path"] is not None or node["fingerprint"] is not None


def build_data(cfg: DictConfig, is_cached: bool = True, trust: bool = False) -> "BaseDataModule":
    """Return the data module of a configuration: that of its data, or of their latents if it has an autoencoder.

    With `is_cached`, for training, all images are encoded once. Raises FileNotFoundError or ValueError if the
    autoencoder does not exist, is not the one of the run, or does not take the images.
    """
    data: BaseDataModule = instantiate_node(cfg.data)
    if not has_autoencoder(cfg):
        return data
    import torch

    from src.data.latents import LatentDataModule

    autoencoder, fingerprint = open_recorded(cfg.autoencoder, trust)
    node = to_plain(cfg.autoencoder)
    return LatentDataModule(
        data,  # type: ignore[arg-type]
        autoencoder,
        fingerprint,
        to_plain(cfg.data),
        scale=node["scale"],
        shift=node["shift"],
        dtype=node["dtype"],
        num_at_once=node["batch_size"],
        cache_dir=node["cache_dir"],
        device=torch.device("cpu") if is_cached and cfg.trainer.accelerator == "cpu" else None,
        is_cached=is_cached,
        image_steps=range(cfg.repa.stop_step or sys.maxsize) if cfg.get("repa") else range(0),
    )


def open_recorded(node: DictConfig, trust: bool = False) -> "tuple[Autoencoder, str]":
    """Return the autoencoder of a node and its fingerprint. Raises ValueError if the node has another fingerprint."""
    if node.path is None:
        raise ValueError("the run does not name its autoencoder; add autoencoder=FOLDER or autoencoder=NAME of the Hub")
    autoencoder, fingerprint = open_any(str(node.path), trust)
    if node.fingerprint not in (None, fingerprint):
        raise ValueError(
            f"{format_override('autoencoder', node.path)} is not the autoencoder that this run was trained with; type "
            "autoencoder=FOLDER with that one, or train a new run"
        )
    return autoencoder, fingerprint


@functools.cache
def open_any(location: str, trust: bool = False) -> "tuple[Autoencoder, str]":
    """Return an autoencoder and a hash of its weights. Opens each location once.

    `location` is a run of task=autoencoder, its checkpoint or export, or a folder or a name on the Hub of diffusers.
    """
    from src.interop.autoencoders import PATTERNS, autoencoder_folder, read_diffusers_autoencoder

    path = Path(location).expanduser()
    is_name = len(path.parts) == 2 and not (path.is_absolute() or path.parent.exists())
    if location.startswith(SCHEME) or is_name:
        path = local_copy(location, "autoencoder", PATTERNS)
    if not path.exists():
        raise FileNotFoundError(
            f"{format_override('autoencoder', location)} does not exist; type autoencoder=FOLDER with the run or the "
            f"model of diffusers, or train one with: {command('train', 'task=autoencoder')}"
        )
    if (path / "checkpoints").is_dir() and not (path / "metrics.json").is_file():
        warnings.warn(
            f"{format_override('autoencoder', location)} has not finished training; to continue it first, type "
            f"{command('train', format_override('resume', path))}",
            stacklevel=2,
        )
    folder = autoencoder_folder(path) if path.is_dir() else None
    net: Any = open_autoencoder(str(path), trust) if folder is None else read_diffusers_autoencoder(folder)
    return net, fingerprint_of(net)


def fingerprint_of(autoencoder: Any) -> str:
    """Return a hash of the weights of an autoencoder by the names of diffusers, which an export does not change."""
    from src.cache import digest
    from src.interop.autoencoders import DiffusersAutoencoder, diffusers_weights

    weights = sorted(diffusers_weights(autoencoder).items())
    return digest(DiffusersAutoencoder.__name__, *(part for name, value in weights for part in (f"net.{name}", value)))


def measure_latents(data: "BaseDataModule") -> dict[str, list[float]]:
    """Return scale and shift of latents, one per channel, after encoding all images once and measuring missing ones."""
    from src.data.latents import LatentDataModule

    assert isinstance(data, LatentDataModule)
    data.prepare_once_per_node()
    data.measure()
    assert data.scale is not None and data.shift is not None
    return {"scale": data.scale, "shift": data.shift}


def infer_latents(cfg: DictConfig, checkpoint: Mapping[str, Any] | None) -> None:
    """Infer the settings that depend on the autoencoder alone, except where the command line sets them.

    The network sees latents: their channels and size. They have no bounds, and a standard deviation of 1. A shift of
    the noise levels that suits the size of the images becomes that of the latents. A resumed run keeps its scaling.
    """
    from src.data.fit import height_and_width
    from src.data.latents import latent_shape

    node, size, channels = cfg.autoencoder, cfg.data.get("image_size"), cfg.data.get("channels")
    override = format_override("autoencoder", node.path)
    if is_autoencoder(cfg):
        raise ValueError(f"{override} is for diffusion models, and task=autoencoder trains one; leave one out")
    if {"channels", "image_size"} <= cfg.data.keys() and (size is None or channels is None):  # those of the files
        channels, *size = instantiate_node(cfg.data).shape
    if size is None or channels is None or (not isinstance(size, int) and len(size) != 2):
        raise ValueError(
            f"{override} needs images with data.channels and data.image_size; choose data=folder, or leave it out"
        )
    if not {"channels", "image_size"} <= cfg.model.keys():
        raise ValueError(f"{override} needs a network of images; choose model=unet_* or dit_*, or leave it out")
    if checkpoint is not None:
        before = checkpoint["hyper_parameters"].get("autoencoder") or {}
        inferred = {name: before.get(name) for name in INFERRED if node[name] is None}
        check_texts({"autoencoder": inferred}, "the run that is resumed")
        node.update(inferred)
    autoencoder, node.fingerprint = open_recorded(node, bool(cfg.get("trust")))
    for name in ("scale", "shift"):
        if node[name] is None:
            node[name] = getattr(autoencoder, name, None)
    height, width = height_and_width(size)
    latent = latent_shape(autoencoder, (channels, height, width))
    patch = cfg.model.get("patch_size") or 1
    if any(side % patch for side in latent[1:]):
        fix = max(n for n in range(1, patch) if not any(side % n for side in latent[1:]))
        raise ValueError(
            f"model.patch_size={patch} must divide the sides of the latents, {'x'.join(map(str, latent[1:]))}; type "
            f"model.patch_size={fix}"
        )
    cfg.model.channels, cfg.model.image_size = latent[0], list(latent[1:])
    if isinstance(size, int):
        cfg.model.image_size = latent[1]
    for name, of_pixels, of_latents in (("clip_x0", 1.0, None), ("sigma_data", 0.5, 1.0)):
        if cfg.diffusion[name] == of_pixels and not is_typed(f"diffusion.{name}"):
            cfg.diffusion[name] = of_latents
    side, latent_side = ((h * w) ** 0.5 for h, w in ((height, width), latent[1:]))
    if cfg.snr_shift == 64 / side and not is_typed("snr_shift"):
        cfg.snr_shift = min(1.0, 64 / latent_side)


def check_same_latents(cfg: DictConfig, initial: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError unless the model of `init_from` in `path` is for the latents, or the pixels, of this run.

    `initial` has its settings. Arrays may hold any latents.
    """
    theirs, ours = (initial.get("autoencoder") or {}), cfg.autoencoder
    if theirs.get("fingerprint") == ours.fingerprint:
        return
    if any(
        node.get("fingerprint") is None and each["data"]["_target_"] == ARRAYS
        for node, each in ((theirs, initial), (ours, cfg))
    ):
        return
    own = path / "vae"
    place = str(own) if own.is_dir() else theirs.get("path")
    fix = "autoencoder=FOLDER with that one" if place is None else format_override("autoencoder", place)
    model, override = format_override("init_from", cfg.init_from.path), format_override("autoencoder", ours.path)
    if ours.path is None:
        raise ValueError(f"{model} needs latents of its autoencoder, and this run has none; add {fix}")
    if theirs.get("fingerprint") is None:
        raise ValueError(f"{model} was trained without an autoencoder, and this run has {override}; leave one out")
    raise ValueError(f"{override} is not the autoencoder of {model}; type {fix}")


def in_images(settings: dict[str, Any], location: str, trust: bool) -> dict[str, Any]:
    """Return the settings of an imported network of latents for images, which the autoencoder at `location` decodes.

    Raises ValueError if the network is not for its latents.
    """
    autoencoder, fingerprint = open_any(location, trust)
    model, override = settings["model"], format_override("autoencoder", location)
    is_latent = settings["data"]["file_type"] == LATENTS["file_type"]
    inputs = f"{model['channels']} of {'latents' if is_latent else 'pixels'}"
    if not is_latent or model["channels"] != autoencoder.latent_channels:
        raise ValueError(
            f"{override} has latents of {autoencoder.latent_channels} channels, and the network takes {inputs}; choose "
            "another autoencoder, or leave it out"
        )
    size = [f"data.image_size={model['image_size'] * autoencoder.factor}", f"data.channels={autoencoder.channels}"]
    data = to_plain(compose_train(["data=folder", "data.root=null", *size]).data) | IMAGES
    scale, shift = (getattr(autoencoder, name, default) for name, default in (("scale", 1.0), ("shift", 0.0)))
    node = {"path": location, "fingerprint": fingerprint, "scale": scale, "shift": shift}
    return settings | {"data": data, "autoencoder": settings["autoencoder"] | node}


def decoder_of(data: "BaseDataModule") -> "ScaledDecoder | None":
    """Return the decoder of latents, with scale and shift; None for data without an autoencoder."""
    from src.data.latents import LatentDataModule, ScaledDecoder

    if not isinstance(data, LatentDataModule):
        return None
    assert data.scale is not None and data.shift is not None
    return ScaledDecoder(data.autoencoder, data.scale, data.shift)


def vae_of(data: "BaseDataModule") -> "tuple[Any, Latents | None]":
    """Return the autoencoder of latents, as diffusers has it, and what a pipeline needs to decode; None without one."""
    from src.data.latents import LatentDataModule
    from src.interop.autoencoders import as_diffusers
    from src.interop.diffusers_export import Latents

    if not isinstance(data, LatentDataModule):
        return None, None
    net = as_diffusers(data.autoencoder)
    assert data.scale is not None and data.shift is not None
    return net, Latents(type(net).__name__, data.autoencoder.channels, data.scale, data.shift)
