"""Open a trained run from its folder or from one checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from src.config.arguments import check_arguments
from src.errors import sentence
from src.quoting import format_override
from src.runs.build import record_path
from src.runs.checkpoints import check_fit, find_checkpoint
from src.runs.components import build_condition, build_module, build_sampler, make
from src.runs.trainer import quiet_libraries
from src.runs.trust import check_targets, check_texts, known_targets
from src.training.checkpoints import CONDITION_KEYS, MODEL_KEYS, read_checkpoint, weights_of

if TYPE_CHECKING:
    import torch

    from src.data.module import BaseDataModule
    from src.diffusion.guidance import Conditional
    from src.diffusion.noise import NoiseLevel
    from src.training.module import DiffusionModule, Sampler


class OpenedRun(NamedTuple):
    """A trained run: its module with the weights in place, and its data, not loaded yet."""

    config: DictConfig
    checkpoint: Path
    module: "DiffusionModule"
    data: "BaseDataModule"


def open_run(
    run: str | None,
    ckpt: str | None = None,
    ema: bool = True,
    trust: bool = False,
    data_root: str | None = None,
    encoder: str | None = None,
) -> OpenedRun:
    """A trained run from its folder or from one file, with the averaged weights (or the raw ones).

    The data lie in `data_root`, and a pretrained encoder of texts in `encoder`, or where they lay. Of what the file
    names, only what conf/ has is built, unless with `trust`. From then on the process keeps the memory that it frees.
    Raises FileNotFoundError or ValueError if there is no such run or it cannot be read.
    """
    path = find_checkpoint(run, ckpt)
    quiet_libraries()
    checkpoint = read_checkpoint(path)
    settings = checkpoint["hyper_parameters"]
    if not trust:
        check_texts(settings, path)
        check_targets({name: settings.get(name) for name in (*MODEL_KEYS, "conditioning")}, known_targets(), path)
    config = OmegaConf.create(settings)
    assert isinstance(config, DictConfig)
    if data_root is not None:
        setting = "path" if "path" in config.data else "root"  # a table is one file
        if setting not in config.data:
            raise ValueError(
                f"{format_override('data.root', data_root)} is for images, and {path} was trained on points: leave it out"
            )
        config.data[setting] = data_root
    infer_encoder_settings(config, encoder, path)
    built = OmegaConf.masked_copy(config, [*MODEL_KEYS, *CONDITION_KEYS, "seed", "snr_shift", "zero_terminal_snr"])
    check_arguments(built)
    try:
        data = make(config.data)
        data.fingerprint_path = record_path(path)
        data.condition = build_condition(built)
        module = build_module(built, data.shape, data.num_values, data.condition)
        weights = weights_of(checkpoint, ema, path)
        check_fit(weights, module, path)
        module.load_state_dict(weights)
    except (AssertionError, AttributeError, LookupError, RuntimeError) as error:  # kinds of things in others' places
        raise ValueError(f"{path} describes no model of this project ({sentence(error)}): use another one") from error
    import torch

    from src.training.memory import keep_freed_memory

    keep_freed_memory(torch.device("cpu"))  # for samples; what a GPU draws needs next to nothing there
    return OpenedRun(config, path, module.eval(), data)


def configure_inference(opened: OpenedRun, precision: str, compile_mode: str | bool | None) -> None:
    """Have an opened run sample in a precision, and by a compiled network. Raises ValueError for unknown ones."""
    from src.training.compile import compiled, product_dtype

    opened.module.sampling_dtype = product_dtype(precision)
    opened.module.compiled_sampling = compiled(opened.module.net, compile_mode)


def infer_encoder_settings(config: DictConfig, encoder: str | None, path: Path) -> None:
    """Where a pretrained encoder is looked for, and its answers are kept: never where the file says."""
    node = OmegaConf.select(config, "conditioning.encode")
    if node is None or "fingerprint" not in node:
        if encoder is not None:
            raise ValueError(
                f"{format_override('encoder', encoder)} is for runs with conditioning=pretrained, as {path} is not: leave it out"
            )
        return
    node.cache, node.device = "outputs/cache", "auto"
    node.model = encoder or node.model
    if node.model is None:
        raise ValueError(f"{path} does not say where its text encoder lies: give its folder or hub name by encoder=...")


def sampler_of(opened: OpenedRun, settings: DictConfig, guidance: DictConfig) -> "Sampler":
    """A sampler by its settings and those of its guidance, for which null means what the run was trained with."""
    own = OmegaConf.create({"scale": 1.0, "interval": None, "rescale": 0.0})
    asked = {k: v for k, v in guidance.items() if v is not None and k != "model"}
    merged = OmegaConf.merge(own, opened.config.get("guidance") or {}, asked)
    assert isinstance(merged, DictConfig)
    check_arguments(settings, "sampler")
    sampler = build_sampler(settings, merged)
    if guidance.model is not None:
        sampler = sampler._replace(
            guidance=sampler.guidance._replace(model=open_guidance_model(opened, guidance.model))
        )
    opened.module.check_sampler(sampler)
    return sampler


def open_guidance_model(opened: OpenedRun, where: str) -> "Conditional":
    """The network to lead away from: that of another run's folder, or of another checkpoint.

    Raises ValueError if its output means something else than the run's, or it is asked in another way.
    """
    path = Path(where)
    encoder = OmegaConf.select(opened.config, "conditioning.encode.model")
    other_run = open_run(None if path.is_file() else where, where if path.is_file() else None, encoder=encoder)
    remedy = "choose an earlier checkpoint, or a smaller network that was trained with the same"
    own, theirs = (meaning(each.config) for each in (opened, other_run))
    if changed := next((name for name in {**own, **theirs} if own.get(name) != theirs.get(name)), None):
        raise ValueError(
            f"{format_override('guidance.model', where)} has another {changed} than the run, so its outputs differ: {remedy}"
        )
    if other_run.module.shape != opened.module.shape:
        raise ValueError(
            f"{format_override('guidance.model', where)} makes samples of shape {other_run.module.shape}, the run "
            f"{opened.module.shape}: {remedy}"
        )

    other_run.module.sampling_dtype = opened.module.sampling_dtype

    def denoise(x: "torch.Tensor", t: "NoiseLevel", cond: "torch.Tensor | None") -> "torch.Tensor":
        return other_run.module.to(x.device).denoise_for_sampling(x, t, cond)

    return denoise


def meaning(config: DictConfig) -> dict[str, Any]:
    """The settings on which it depends what a network is given, and what its outputs mean."""
    names = ("diffusion.prediction", "diffusion.variance", "diffusion.sigma_data", "schedule", "snr_shift")
    settings = {name: OmegaConf.select(config, name) for name in (*names, "zero_terminal_snr")}
    for name, value in (OmegaConf.select(config, "conditioning.encode") or {}).items():
        if name not in ("examples", "cache", "device", "model"):  # of an encoder its fingerprint tells
            settings[f"conditioning.encode.{name}"] = value
    return settings


def pick_device(name: str) -> "torch.device":
    """The device of that name, or for "auto" the best there is. Raises ValueError if it does not exist."""
    import torch

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={name} does not exist here ({sentence(error)}): use device=auto or cpu") from error
    return device
