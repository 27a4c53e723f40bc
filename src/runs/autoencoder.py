"""Build the autoencoder that a run trains, and open a trained one."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from src.config.arguments import check_arguments
from src.config.output import relative, start_output
from src.config.search_path import search_path_overrides
from src.errors import command, format_override
from src.interop.hub_models import MODEL_FILE
from src.runs.checkpoints import check_fit, choose_weights, find_checkpoint
from src.runs.nodes import instantiate_node, to_plain, typed_option
from src.runs.trust import check_targets, check_texts, known_targets
from src.training.checkpoints import exportable_settings, read_checkpoint, write_exported

if TYPE_CHECKING:
    from src.models.autoencoder import KLAutoencoder
    from src.training.autoencoder import AutoencoderModule


class AutoencoderError(ValueError):
    """A run of an autoencoder was opened as a diffusion model."""


def is_autoencoder(settings: Mapping[Any, Any]) -> bool:
    """Return whether the configuration of a run trains an autoencoder."""
    return settings.get("task") == "autoencoder"


def build_autoencoder(cfg: DictConfig, shape: tuple[int, ...], augment_labels: int = 0) -> "AutoencoderModule":
    """Return the LightningModule that trains an autoencoder of images of `shape` (C, H, W), with new weights.

    Raises ValueError for settings that do not suit the data or the task.
    """
    import torch

    from src.models.autoencoder import KLAutoencoder
    from src.training.autoencoder import AutoencoderLoss, AutoencoderModule
    from src.training.finetuning import add_adapters, freeze

    if augment_labels:
        raise ValueError(
            f"data.edm_augment={cfg.data.edm_augment} labels its changes for a diffusion model, and task=autoencoder "
            "takes no labels; set data.edm_augment=0"
        )
    net, loss = instantiate_node(cfg.model), instantiate_node(cfg.loss)
    for name, value, kind in (("model", net, KLAutoencoder), ("loss", loss, AutoencoderLoss)):
        if not isinstance(value, kind):
            raise ValueError(
                f"{name}._target_={cfg[name]._target_} is for diffusion models; leave {typed_option(name)} out"
            )
    if cfg.get("lora"):
        add_adapters(net, **to_plain(cfg.lora))
    freeze(net, cfg.get("freeze") or [])
    module = AutoencoderModule(
        net=net.to(memory_format=torch.channels_last),
        loss_fn=loss,
        shape=shape,
        seed=cfg.seed,
        optimizer=instantiate_node(cfg.optimizer),
        lr_scheduler=instantiate_node(cfg.lr_scheduler),
        lr_multipliers=cfg.get("lr_multipliers"),
        decay_matrices_only=bool(cfg.get("decay_matrices_only")),
    )
    module.prepare_optimizer(1)  # The optimizer and the scheduler reject invalid values here, before training.
    return module


class OpenedAutoencoder(NamedTuple):
    """A trained autoencoder for inference, with the settings of its run."""

    net: "KLAutoencoder"
    settings: dict[str, Any]
    averaged: bool
    """Whether the weights are averages."""
    checkpoint: Path


def open_autoencoder(location: str, trust: bool = False) -> "KLAutoencoder":
    """Return the autoencoder of a run folder, a checkpoint or an exported model, for inference, on the CPU.

    It has the averaged weights if there are any. Without `trust`, only classes that conf/ names are instantiated.
    Raises FileNotFoundError if it does not exist, and ValueError for another kind of model.
    """
    return read_autoencoder(find_checkpoint(location, None, setting="autoencoder"), trust).net


def read_autoencoder(path: Path, trust: bool = False, ema: bool | float | None = None) -> OpenedAutoencoder:
    """Return the autoencoder of a file, with the weights that `ema` names (`choose_weights`).

    Raises ValueError as `open_autoencoder` does.
    """
    checkpoint = read_checkpoint(path)
    settings = checkpoint["hyper_parameters"]
    if not is_autoencoder(settings):
        raise ValueError(
            f"{path} is a diffusion model, not an autoencoder; train one with: {command('train', 'task=autoencoder')}"
        )
    if not trust:
        check_texts(settings["model"], path)
        check_targets({"model": settings["model"]}, known_targets(), path)
    config = OmegaConf.create(settings["model"])
    assert isinstance(config, DictConfig)
    check_arguments(config, "model")
    net: KLAutoencoder = instantiate_node(config)
    weights, averaged = choose_weights(checkpoint, path, ema)
    own = {name.removeprefix("net."): value for name, value in weights.items() if name.startswith("net.")}
    check_fit(own, net, path)
    net.load_state_dict(own)
    return OpenedAutoencoder(net.eval().requires_grad_(False), settings, averaged, path)


def export_autoencoder(cfg: DictConfig) -> tuple[Path, str, OpenedAutoencoder]:
    """Write the autoencoder that the configuration of `src.export` names as `model.safetensors`.

    Return the file, a line about its use, and the autoencoder. Raises ValueError for another format.
    """
    if cfg.format != "safetensors" or cfg.hub is not None:
        typed = f"hub={cfg.hub}" if cfg.format == "safetensors" else f"format={cfg.format}"
        raise ValueError(f"{typed} is for diffusion models, and this is an autoencoder; leave it out")
    opened = read_autoencoder(find_checkpoint(cfg.run, cfg.ckpt, cfg.init_from.path), cfg.trust, cfg.ema)
    path = start_output(Path(cfg.run_dir)) / MODEL_FILE
    weights = {f"net.{name}": value for name, value in opened.net.state_dict().items()}
    write_exported(path, weights, opened.averaged, exportable_settings(opened.settings)[0])
    train = command("train", *search_path_overrides(), format_override("autoencoder", relative(path)))
    return path, f"Exported to {relative(path)}. Train a diffusion model of its latents: {train}", opened
