"""Settings that exclude each other, have no effect, or do not suit the task; the checks need no torch."""

import re
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from omegaconf import DictConfig, OmegaConf

from src.config.rules import OPTIONAL
from src.errors import UsageError, literal

DIFFUSION_ONLY = (
    *("schedule", "diffusion", "timestep_sampler", "weighting", "sampler", "guidance", "conditioning", "neighbors"),
    *("snr_shift", "zero_terminal_snr", "repa", "autoencoder", "data.coupling"),
)
"""Settings of a diffusion model that have no meaning for `task=autoencoder`."""

AUTOENCODER_TARGETS = {
    "model": "src.models.autoencoder.KLAutoencoder",
    "loss": "src.training.autoencoder.AutoencoderLoss",
    "callbacks.reconstructions": "src.training.callbacks.reconstructions.Reconstructions",
}
"""Network, loss and callback of `task=autoencoder`."""

DIFFUSION_CALLBACKS = (
    *("src.training.callbacks.samples.SampleGrid", "src.training.callbacks.loss_by_noise.LossByNoise"),
    *("src.evaluation.callbacks.BitsPerDim", "src.evaluation.callbacks.Quality"),
)
"""Callbacks that `task=autoencoder` does not have."""


def check_required(
    command: str, default: DictConfig, cfg: DictConfig, groups: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Raise UsageError for a default setting that `cfg` lacks, or a default node that has lost its `_target_`.

    `groups` has the options of all groups, for the message.
    """
    for name in map(str, default.keys() - set(OPTIONAL)):
        before, now = (
            OmegaConf.select(c, f"{name}._target_", throw_on_resolution_failure=False) for c in (default, cfg)
        )
        if name not in cfg or (before and not now):
            options = (groups or {}).get(name)
            fix = f"choose one of {', '.join(options)}" if options else "give it a value"
            raise UsageError(f"{name}=null and ~{name} leave src.{command} without {name}; {fix}")


def check_combinations(command: str, typed: Mapping[str, str], cfg: DictConfig) -> None:
    """Raise UsageError or warn if typed settings exclude each other or have no effect in the command.

    `typed` has the override of each setting that is not null, by the name of the setting.
    """
    one, other = "validate_every", "trainer.val_check_interval"
    if {one, other} <= typed.keys():
        raise UsageError(f"{typed[one]} and {typed[other]} exclude each other; leave one out, or type {other}=null")
    if command == "train":
        check_task(cfg, typed)
        if OmegaConf.select(cfg, "model._target_") == "src.models.mlp.MLP" and "image_size" in cfg.data:
            line, data = typed.get("model", "model=mlp"), typed.get("data", "these data")
            raise UsageError(f"{line} needs points or rows, unlike {data}; choose model=unet_tiny, for example")
        if "model.num_heads" in typed and (channels := OmegaConf.select(cfg, "model.num_head_channels")) is not None:
            other = f"model.num_head_channels={channels}; add model.num_head_channels=null"
            warnings.warn(f"{typed['model.num_heads']} has no effect with {other}", stacklevel=2)
        if "trainer.max_steps" in typed and (count := cfg.trainer.get("fast_dev_run")):
            fix = f"trainer.fast_dev_run={literal(count)}, which sets the number of steps"
            warnings.warn(f"{typed['trainer.max_steps']} has no effect with {fix}", stacklevel=2)
        if "model.text" in typed and cfg.get("conditioning") is None:
            warnings.warn(f"{typed['model.text']} has no effect without conditioning=text or pretrained", stacklevel=2)
    of_latents = sorted(name for name in typed if name.startswith("autoencoder.") and name != "autoencoder.path")
    if of_latents and OmegaConf.select(cfg, "autoencoder.path") is None:
        raise UsageError(
            f"{typed[of_latents[0]]} has no effect without an autoencoder; leave it out, or add autoencoder=FOLDER"
        )
    formats = f"{cfg.get('format')} {typed.get('format')}"  # also those of a sweep
    if command == "export" and cfg.get("aot") and "torch_export" not in formats:
        raise UsageError(f"aot=true has no effect with format={cfg.format}; leave it out, or type format=torch_export")
    if command == "export" and "diffusers" not in formats:
        for name in sorted(typed):
            if name.split(".")[0] in ("guidance", "sampler"):
                fix = "leave it out, or type format=diffusers"
                raise UsageError(f"{typed[name]} has no effect with format={cfg.format}; {fix}")
    if command == "evaluate":
        others = sorted(n for n in typed if not re.match(r"hydra[./]|analytic|seed$", n))
        of_analytic = sorted(name for name in typed if name.startswith("analytic_"))
        if cfg.get("analytic") and others:
            raise UsageError(
                f"{typed[others[0]]} has no effect with {typed.get('analytic', 'analytic')}, which needs no run; "
                "leave one out"
            )
        if of_analytic and not cfg.get("analytic"):
            raise UsageError(f"{typed[of_analytic[0]]} has no effect for a run; leave it out, or add analytic=mixture")


def check_task(cfg: DictConfig, typed: Mapping[str, str] = MappingProxyType({})) -> None:
    """Raise UsageError for settings of src.train that the task does not have. Messages repeat the `typed` overrides."""
    is_autoencoder = cfg.get("task") == "autoencoder"
    nodes = {"model": cfg.model, "loss": cfg.loss}
    nodes |= {f"callbacks.{name}": node for name, node in (cfg.get("callbacks") or {}).items()}
    for name, node in nodes.items():
        target = str(node.get("_target_")) if isinstance(node, DictConfig) else ""
        line = typed.get(name) or typed.get("experiment") or f"{name}._target_={target}"
        if name.startswith("callbacks.") and "callbacks" in typed:
            line = f"{name} of {typed['callbacks']}"
        own = AUTOENCODER_TARGETS.get(name)
        of_diffusion = target in DIFFUSION_CALLBACKS if own is None else target.startswith("src.") and target != own
        if is_autoencoder and of_diffusion:
            raise UsageError(f"{line} is for diffusion models; leave it out, or task=autoencoder")
        if not is_autoencoder and target in AUTOENCODER_TARGETS.values():
            raise UsageError(f"{line} is for autoencoders; add task=autoencoder")
    if not is_autoencoder:
        return
    composed = {"repa": "repa=default"} if cfg.get("repa") else {}
    composed |= {"data.coupling": "data.coupling=ot"} if cfg.data.get("coupling") == "ot" else {}
    settings = {name: line for name, line in typed.items() if name != "data.coupling"}  # "independent" changes nothing
    for name, line in sorted({**composed, **settings}.items()):
        if name.split(".")[0] in DIFFUSION_ONLY or name in DIFFUSION_ONLY:
            raise UsageError(f"{line} has no effect with task=autoencoder; leave it out")
    if "image_size" not in cfg.data:
        raise UsageError(
            f"task=autoencoder needs images, unlike {typed.get('data', 'these data')}; choose data=folder, for example"
        )
