"""A model of another project in the terms of this one."""

import shlex
from argparse import SUPPRESS, ArgumentError, ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from src.errors import did_you_mean, first_names
from src.models.conditioning import ClassEmbedding
from src.models.dit import DiT
from src.models.unet import UNet
from src.models.unet_edm2 import UNetEDM2


class ImportedModel(NamedTuple):
    """A network of another project: how this project builds it, and its weights."""

    model: dict[str, Any]
    """Arguments of `network` without `condition`, with `channels`, `image_size` and `outputs`."""
    schedule: dict[str, Any]
    """A node like those of conf/schedule, with `_target_`."""
    diffusion: dict[str, Any]
    """Arguments of `GaussianDiffusion`, such as prediction and variance."""
    weights: dict[str, Tensor]
    """The weights by the names of our network; those of a class embedding start with `condition.`."""
    num_classes: int | None = None
    """Classes of a class-conditional model, without the empty one; None for an unconditional one."""
    zero_terminal_snr: bool = False
    """Whether the schedule is rescaled to end at SNR 0."""
    sampler: str = "ancestral"
    """The name of a file in conf/sampler."""
    has_null_class: bool = False
    """Whether the last row of the class embedding was trained as the empty class, as guidance needs it."""
    network: type[UNet] | type[UNetEDM2] | type[DiT] = UNet


def read_pt(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.pt` file, a zip archive or an older pickle, without running code from it.

    Of a checkpoint of training, as the scripts of DiT and SiT write it, these are its averaged weights, `ema`.

    Raises ValueError if the file holds anything but named tensors.
    """
    try:
        with torch.serialization.safe_globals([Namespace]):  # their arguments, which only have values
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # untrusted bytes can raise anything
        raise ValueError(
            f"init_from={path} must be a file of torch.save that holds tensors only; download it again, or save its "
            "state_dict() alone"
        ) from error
    if isinstance(weights, dict) and "ema" in weights:
        weights = weights["ema"]
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"init_from={path} must hold named tensors only; save the state_dict() of the model alone")
    return {str(name): value for name, value in weights.items()}


def parse_flags(
    flags: str, kinds: Mapping[str, Callable[[str], Any]], projects: str, fix: str, words: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the typed flags of a script of `projects`, by name with underscores; `kinds` has the type of each.

    `words` may stand beside them. Raises ValueError, with a `fix`, for flags that cannot be read, and for unknown ones.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=SUPPRESS)
    for flag, kind in kinds.items():
        parser.add_argument(f"--{flag}", type=kind)
    try:
        parsed, unknown = parser.parse_known_args(shlex.split(flags))
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"init_from.flags={flags!r} cannot be read: {error}; {fix}") from error
    if unknown := [word for word in unknown if word not in words]:
        flag = unknown[0].partition("=")[0]
        hint = did_you_mean(flag, [f"--{known}" for known in kinds])
        raise ValueError(f"init_from.flags: {flag} is not a flag of {projects}; {hint}")
    return vars(parsed)


def tensor_names(path: Path) -> frozenset[str]:
    """Return the names of the tensors in a safetensors file; empty for a corrupted file."""
    try:
        with safe_open(path, "pt") as file:
            return frozenset(file.keys())
    except (SafetensorError, OSError):
        return frozenset()


def check_weights(imported: ImportedModel, names: Mapping[str, str]) -> ImportedModel:
    """Return the argument; raise ValueError unless its weights are those of the network that it describes.

    `names` maps the names of our weights to those in the file.
    """
    condition: Any = None
    if imported.num_classes is not None:  # ClassEmbedding has one more row, for the empty class
        rows = imported.num_classes + imported.has_null_class
        condition = partial(ClassEmbedding, num_classes=rows - 1)
    with torch.device("meta"):
        net = imported.network(**imported.model, condition=condition)
    expected = {name: value.shape for name, value in net.state_dict().items()}
    present = {name: value.shape for name, value in imported.weights.items()}
    if missing := sorted(names.get(name, name) for name in expected.keys() - present.keys()):
        raise ValueError(f"init_from: the file has no weights for {first_names(missing)}; download it again")
    if unknown := sorted(names.get(name, name) for name in present.keys() - expected.keys()):
        raise ValueError(
            f"init_from: {first_names(unknown)} are weights of no layer of this network; choose another file"
        )
    for name, shape in expected.items():
        if present[name] != shape:
            raise ValueError(
                f"init_from: {names.get(name, name)} has shape {list(present[name])}, and this network needs "
                f"{list(shape)}; choose another file"
            )
    return imported
