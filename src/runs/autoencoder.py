"""Build the autoencoder that a run trains, and open a trained one."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from src.config.arguments import check_arguments
from src.quoting import format_override
from src.runs.checkpoints import check_fit, find_checkpoint, has_averages
from src.runs.components import instantiate_node, to_plain
from src.runs.trust import check_targets, check_texts, known_targets
from src.training.checkpoints import read_checkpoint, weights_of

if TYPE_CHECKING:
    from src.models.autoencoder import KLAutoencoder
    from src.training.autoencoder import AutoencoderModule


NO_AUTOENCODER = ("SampleGrid", "BitsPerDim", "LossByNoise", "Quality")
"""Callbacks of diffusion models."""


def is_autoencoder(settings: Mapping[Any, Any]) -> bool:
    """Return whether the configuration of a run trains an autoencoder."""
    return settings.get("task") == "autoencoder"


def check_task(cfg: DictConfig) -> None:
    """Raise ValueError for a network, a loss or a callback of another task than that of the run."""
    nodes = {"model": cfg.model, "loss": cfg.loss}
    nodes |= {f"callbacks.{name}": node for name, node in (cfg.callbacks or {}).items() if node}
    for name, node in nodes.items():
        kind = str(node.get("_target_")).rpartition(".")[2]
        if is_autoencoder(cfg) and kind in NO_AUTOENCODER:
            raise ValueError(f"{name} is for diffusion models; leave callbacks=... out, or add ~{name}")
        if not is_autoencoder(cfg) and kind in ("KLAutoencoder", "AutoencoderLoss", "Reconstructions"):
            raise ValueError(f"{name}._target_={node._target_} is for autoencoders; add task=autoencoder")


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
            raise ValueError(f"{name}._target_={cfg[name]._target_} is for diffusion models; leave {name}=... out")
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
    )
    module.prepare_optimizer(1)  # The optimizer and the scheduler reject invalid values here, before training.
    return module


def open_autoencoder(location: str, trust: bool = False, setting: str = "autoencoder") -> "KLAutoencoder":
    """Return the autoencoder of a run folder, a checkpoint or an exported model, for inference, on the CPU.

    It has the averaged weights if there are any. `setting` is the name of `location` in messages. Without `trust`, only
    classes that conf/ names are instantiated. Raises FileNotFoundError or ValueError if there is no such model.
    """
    path = find_checkpoint(location, None, setting=setting)
    checkpoint = read_checkpoint(path)
    settings = checkpoint["hyper_parameters"]
    if not is_autoencoder(settings):
        raise ValueError(
            f"{format_override(setting, location)} needs a run of task=autoencoder, and {path} holds a diffusion "
            "model; train one with: python -m src.train task=autoencoder"
        )
    if not trust:
        check_texts(settings["model"], path)
        check_targets({"model": settings["model"]}, known_targets(), path)
    config = OmegaConf.create(settings["model"])
    assert isinstance(config, DictConfig)
    check_arguments(config, "model")
    net: KLAutoencoder = instantiate_node(config)
    weights = weights_of(checkpoint, has_averages(checkpoint), path)
    own = {name.removeprefix("net."): value for name, value in weights.items() if name.startswith("net.")}
    check_fit(own, net, path)
    net.load_state_dict(own)
    return net.eval().requires_grad_(False)
