"""Read trained models of this project and of others as checkpoints."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from src.config.search_path import CONF
from src.interop.hub_models import SIDECAR
from src.runs.nodes import to_plain
from src.training.checkpoints import OPENED_KEYS, read_checkpoint

if TYPE_CHECKING:
    from src.interop.imported import ImportedModel

MODELS = {"UNet": "unet_ddpm", "UNetEDM2": "unet_edm2", "DiT": "dit_xl"}
"""Files in conf/model by the class of their network."""
IMAGES = {"num_values": 256, "value_range": [0, 255], "dtype": "uint8", "file_type": ".png"}
LATENTS = {"value_range": [-1, 1], "dtype": "float32", "file_type": ".npy"}


def read_model(path: Path, flags: str | None = None) -> dict[str, Any]:
    """Return a trained model as a checkpoint with `state_dict` and `hyper_parameters`.

    `path` is a checkpoint or an exported model of this project, a folder of diffusers, a `.pt` file of OpenAI, weights
    of DiT or SiT, whose scripts have `flags`, or weights of EDM and EDM2 as safetensors. Only tensors and plain values
    are read. Raises ValueError if the file is not such a model, or if this project has no such network.
    """
    from src.interop import diffusers_pipeline, dit, edm, edm2, openai
    from src.interop.imported import read_pt, tensor_names

    is_pt, is_safetensors = path.suffix in (".pt", ".pth"), path.suffix == ".safetensors"
    is_dit = is_safetensors and dit.FIRST in tensor_names(path)
    if flags is not None and not (is_pt or is_dit):
        raise ValueError(
            f"init_from.flags={flags!r} is for files of OpenAI, DiT and SiT, and {path} is another; leave it out"
        )
    if (path / SIDECAR).is_file():
        return read_exported_pipeline(path)
    if path.is_dir():
        return as_checkpoint(diffusers_pipeline.read_pipeline(path))
    if is_pt:
        weights = read_pt(path)
        read_weights = dit.read_dit if dit.FIRST in weights else openai.read_openai
        return as_checkpoint(read_weights(weights, flags or ""))
    if is_dit:
        from safetensors.torch import load_file

        return as_checkpoint(dit.read_dit(load_file(path), flags or ""))
    if path.suffix == ".pkl":
        raise edm.pickle_error(path)
    if is_safetensors and (found := edm.read_converted(path)):
        read = edm2.read_edm2 if edm.read_arguments(found[1])[0] == "Precond" else edm.read_edm
        return as_checkpoint(read(*found))
    return read_checkpoint(path)


def read_exported_pipeline(folder: Path) -> dict[str, Any]:
    """Return the model that `src.export format=diffusers` wrote, also if its network has been trained since.

    Raises ValueError if its network is not one of diffusers.
    """
    from src.interop import diffusers_dit, diffusers_pipeline, diffusers_unet

    if (network := diffusers_pipeline.network_folder(folder)) == folder:
        raise ValueError(f"{folder} holds a traced network, which cannot be read; use format=safetensors for it")
    checkpoint = read_checkpoint(folder / SIDECAR)
    kept, model = checkpoint["state_dict"], checkpoint["hyper_parameters"]["model"]
    theirs, config = diffusers_pipeline.read_weights(network), diffusers_pipeline.read_config(network / "config.json")
    if network.name == "unet":
        ours = diffusers_unet.from_diffusers(theirs, config, model)
    else:
        outputs = config["out_channels"] // config["in_channels"]
        ours = diffusers_dit.from_diffusers(theirs, model | {"outputs": outputs})
        if (checkpoint["hyper_parameters"].get("conditioning") or {}).get("encode") is None:
            del ours[diffusers_dit.TABLE]  # zeros
    if (time := diffusers_unet.original_time(ours[diffusers_unet.TIME], kept, model)) is None:
        model["time_offset"] = -1.0  # The new weights are for steps from 0.
    else:
        ours[diffusers_unet.TIME] = time
    rest = {name: value for name, value in kept.items() if name != diffusers_unet.TIME}
    return checkpoint | {"state_dict": rest | {f"net.{name}": value for name, value in ours.items()}}


def as_checkpoint(imported: "ImportedModel") -> dict[str, Any]:
    """Return a model of another project as a checkpoint of this one, with averaged weights.

    Its data are a folder of 8-bit images that `data.root` names, or arrays, the latents of a DiT.
    """
    import torch

    weights = dict(imported.weights)
    if imported.num_classes is not None and not imported.has_null_class:
        table = weights["condition.table.weight"]
        weights["condition.table.weight"] = torch.cat([table, table.new_zeros(1, table.shape[1])])
    settings = compose_settings(imported)
    return {
        "state_dict": {f"net.{name}": value for name, value in weights.items()},
        "hyper_parameters": settings,
        "averaged": True,  # what other projects publish are averages
        "imported": True,
    }


def compose_settings(imported: "ImportedModel") -> dict[str, Any]:
    """Return the configuration of an imported model: conf/ with its network, schedule and diffusion process."""
    in_latents = MODELS[imported.network.__name__] == "dit_xl" and imported.model["channels"] not in (1, 3)
    overrides = [
        f"sampler={imported.sampler}",
        f"data={'array' if in_latents else 'folder'}",
        "data.root=null",
        f"model={MODELS[imported.network.__name__]}",
    ]
    overrides += [] if imported.num_classes is None else ["conditioning=class"]
    model = {name: value for name, value in imported.model.items() if name != "outputs"}
    data = {name: model[name] for name in ("channels", "image_size")}
    changes: dict[str, Any] = {
        "model": model,
        "diffusion": imported.diffusion,
        "zero_terminal_snr": imported.zero_terminal_snr,
        "data": data | (LATENTS if in_latents else IMAGES),
    }
    if imported.num_classes is not None:
        names = [str(k) for k in range(imported.num_classes)]
        dropped = 0.1 if imported.has_null_class else 0.0
        changes["conditioning"] = {"encode": {"names": names}, "cond_drop_prob": dropped}
    cfg = compose_train(overrides)
    OmegaConf.set_struct(cfg, False)
    cfg.schedule = imported.schedule
    merged = OmegaConf.merge(cfg, changes)
    assert isinstance(merged, DictConfig)
    plain = to_plain(OmegaConf.masked_copy(merged, [*OPENED_KEYS, "weighting"]))  # `loss` refers to `weighting`
    return {name: plain[name] for name in OPENED_KEYS if name in plain}


def compose_train(overrides: list[str]) -> DictConfig:
    """Return the configuration of src.train with these overrides, inside and outside of a command."""
    if GlobalHydra.instance().is_initialized():
        return hydra.compose("train", overrides)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return hydra.compose("train", overrides)
