"""Open a trained run from its folder or from a checkpoint."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from src.config.arguments import check_arguments
from src.errors import command, format_override, sentence
from src.runs.autoencoder import AutoencoderError, is_autoencoder
from src.runs.checkpoints import check_fit, choose_weights, find_checkpoint, record_path
from src.runs.components import build_condition, build_module, build_sampler
from src.runs.imported import read_model
from src.runs.latents import INFERRED, build_data, in_images
from src.runs.resolve import relocate
from src.runs.trainer import quiet_libraries
from src.runs.trust import check_targets, check_texts, known_targets
from src.training.checkpoints import MODEL_KEYS, OPENED_KEYS

if TYPE_CHECKING:
    import torch

    from src.data.module import BaseDataModule
    from src.diffusion.guidance import Conditional
    from src.training.module import DiffusionModule, Sampler


class OpenedRun(NamedTuple):
    """A trained run: its module with the trained weights, and its data, not loaded yet."""

    config: DictConfig
    checkpoint: Path
    module: "DiffusionModule"
    data: "BaseDataModule"
    averaged: bool
    """Whether the weights are averages."""
    length: float | None = None
    """Length of the average that `ema` named, see `training.power_ema`; else None."""

    def to(self, device: "torch.device") -> None:
        """Move the network to a device, on which images are encoded, too, if the run is in latents."""
        from src.data.latents import LatentDataModule

        self.module.to(device)
        if isinstance(self.data, LatentDataModule):
            self.data.device = device


def open_run(
    run: str | None,
    ckpt: str | None = None,
    ema: bool | float | None = None,
    trust: bool = False,
    data_root: str | None = None,
    encoder: str | None = None,
    init_from: DictConfig | None = None,
    autoencoder: str | None = None,
    device: str | None = None,
) -> OpenedRun:
    """Return a trained run from its folder `run` or from the file `ckpt`, or the model of another project, `init_from`.

    `run` may be on the Hub (`hf://user/name`).

    It has the averaged weights, or with `ema=False` the raw ones; None takes the averaged ones if the run has them, and
    else warns; a number takes the average of that length (`training.power_ema`). `data_root`, `encoder` and
    `autoencoder` replace the paths of the data, of the pretrained text encoder and of the autoencoder. The text encoder
    runs on `device`; None prefers an accelerator. Without `trust`, only classes and functions that conf/ names are
    instantiated. Raises FileNotFoundError or ValueError if the run does not exist or cannot be read.
    """
    path = find_checkpoint(run, ckpt, None if init_from is None else init_from.path)
    quiet_libraries()
    checkpoint = read_model(path, None if init_from is None else init_from.flags)
    settings = checkpoint["hyper_parameters"]
    if is_autoencoder(settings):
        train = command("train", format_override("autoencoder", run or path))
        raise AutoencoderError(
            f"{path} is an autoencoder, which draws no samples; train a diffusion model of its latents with: {train}"
        )
    if not trust:
        check_texts(settings, path)
        check_targets(
            {name: settings.get(name) for name in (*MODEL_KEYS, "conditioning", "autoencoder")}, known_targets(), path
        )
    if checkpoint.get("imported") and autoencoder is not None:
        settings = in_images(settings, autoencoder, trust)
    config = OmegaConf.create(settings)
    assert isinstance(config, DictConfig)
    config = relocate(config, data_root, encoder, path, autoencoder, device)
    built = OmegaConf.masked_copy(config, list(OPENED_KEYS))
    check_arguments(built)
    try:
        data = build_data(config, is_cached=False, trust=trust)
        data.fingerprint_path = record_path(path)
        data.condition = build_condition(built)
        module = build_module(built, data.shape, data.num_values, data.condition, data.augment_labels)
        weights, averaged = choose_weights(checkpoint, path, ema)
        check_fit(weights, module, path)
        module.load_state_dict(weights)
    except (AssertionError, AttributeError, LookupError, RuntimeError) as error:  # a file with objects of wrong types
        raise ValueError(f"{path} is not a model of this project ({sentence(error)}): use another one") from error
    import torch

    from src.training.memory import keep_freed_memory

    keep_freed_memory(torch.device("cpu"))
    if ema is None and not averaged:
        warnings.warn(f"{path} has no averaged weights; using the raw ones, as ema=false does", stacklevel=2)
    return OpenedRun(config, path, module.eval(), data, averaged, None if isinstance(ema, bool | None) else ema)


def configure_inference(opened: OpenedRun, precision: str, compile_mode: str | bool | None) -> None:
    """Set the precision and the compilation of an opened run's network. Raises ValueError for unknown ones."""
    from src.training.compile import autocast_dtype, compile_network

    opened.module.sampling_dtype = autocast_dtype(precision)
    opened.module.compiled_sampling = compile_network(opened.module.net, compile_mode)


def sampler_of(opened: OpenedRun, settings: DictConfig, guidance: DictConfig | None) -> "Sampler":
    """Return the sampler of a node with guidance. Null in `guidance` means the value used in training."""
    defaults = {"scale": 1.0, "interval": None, "rescale": 0.0}
    guidance = guidance or OmegaConf.create({"model": None})
    typed = {k: v for k, v in guidance.items() if v is not None and k != "model"}
    check_arguments(settings, "sampler")
    sampler = build_sampler(settings, OmegaConf.create({**defaults, **(opened.config.get("guidance") or {}), **typed}))
    if guidance.model is not None:
        model = open_guidance_model(opened, guidance.model)
        sampler = sampler._replace(guidance=sampler.guidance._replace(model=model))
    opened.module.check_sampler(sampler)
    return sampler


def open_guidance_model(opened: OpenedRun, location: str) -> "Conditional":
    """Return the weaker network of autoguidance, from a run folder, a checkpoint or a model of the Hub.

    Raises ValueError if its inputs or outputs do not match those of the opened run.
    """
    path = find_checkpoint(location, None, setting="guidance.model")
    places = {"encoder": "conditioning.encode.model", "autoencoder": "autoencoder.path"}
    places["device"] = "conditioning.encode.device"
    weak = open_run(None, str(path), **{k: OmegaConf.select(opened.config, name) for k, name in places.items()})
    override = format_override("guidance.model", location)
    fix = "choose an earlier checkpoint, or a smaller network that was trained with the same settings"
    own, others = (output_settings(each.config) for each in (opened, weak))
    if changed := next((name for name in {**own, **others} if own.get(name) != others.get(name)), None):
        raise ValueError(f"{override} has another {changed} than the run, so its outputs differ: {fix}")
    if weak.module.shape != opened.module.shape:
        raise ValueError(
            f"{override} makes samples of shape {weak.module.shape}, and the run {opened.module.shape}: {fix}"
        )
    weak.module.sampling_dtype = opened.module.sampling_dtype
    return lambda x, t, cond: weak.module.to(x.device).denoise_for_sampling(x, t, cond)


def output_settings(config: DictConfig) -> dict[str, Any]:
    """Return the settings that determine the meaning of a network's inputs and outputs."""
    names = ("diffusion.prediction", "diffusion.variance", "diffusion.sigma_data", "schedule", "snr_shift")
    scaling = (f"autoencoder.{name}" for name in INFERRED)
    settings = {name: OmegaConf.select(config, name) for name in (*names, "zero_terminal_snr", *scaling)}
    encode = OmegaConf.select(config, "conditioning.encode") or {}
    places = ("examples", "cache", "device", "model")  # The fingerprint identifies an encoder.
    return settings | {f"conditioning.encode.{name}": value for name, value in encode.items() if name not in places}


def pick_device(name: str) -> "torch.device":
    """Return the device of that name; for "auto" the accelerator, or else the CPU. Raises ValueError without it."""
    import torch

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(str(name))  # device=1 arrives as an integer
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={name} is not available here ({sentence(error)}): use device=auto or cpu") from error
    return device
