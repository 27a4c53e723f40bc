"""Open an autoencoder that this project has trained."""

from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from src.config.arguments import check_arguments
from src.quoting import format_override
from src.runs.checkpoints import check_fit, find_checkpoint, has_averages
from src.runs.components import instantiate_node
from src.runs.trust import check_targets, check_texts, known_targets
from src.training.checkpoints import read_checkpoint, weights_of

if TYPE_CHECKING:
    from src.models.autoencoder import KLAutoencoder


def open_autoencoder(location: str, trust: bool = False, setting: str = "autoencoder") -> "KLAutoencoder":
    """Return the autoencoder of a run folder, a checkpoint or an exported model, for inference, on the CPU.

    It has the averaged weights if there are any. `setting` is the name of `location` in messages. Without `trust`, only
    classes that conf/ names are instantiated. Raises FileNotFoundError or ValueError if there is no such model.
    """
    path = find_checkpoint(location, None, setting=setting)
    checkpoint = read_checkpoint(path)
    settings = checkpoint["hyper_parameters"]
    if settings.get("task") != "autoencoder":
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
