"""Train a part of a network: frozen weights, learning rates by name, and low-rank adapters (LoRA)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from src.errors import did_you_mean, optional_package
from src.models.winograd import Conv3x3

ADAPTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The classes of layers that can have adapters."""


def match_names(
    names: Iterable[str], patterns: Sequence[str], setting: str, kind: str = "parameter of the network"
) -> list[str]:
    """Return the names, of things of this `kind`, that match any of the shell patterns.

    Raises ValueError for a pattern that matches none.
    """
    names = list(names)
    if patterns and not names:
        raise ValueError(f"{setting}={list(patterns)}: the network has no {kind}; leave it out")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            parts = [name.split(".") for name in names]
            groups = {".".join(p[:k]) + ".*": k for k in range(1, max(map(len, parts))) for p in parts if k < len(p)}
            raise ValueError(f"{setting}: {pattern} matches no {kind}; {did_you_mean(pattern, [*groups, *names])}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def freeze(net: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude the parameters with matching names from training. Raises ValueError if none would be trained."""
    parameters = dict(net.named_parameters())
    for name in match_names(parameters, patterns, "freeze"):
        parameters[name].requires_grad = False
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"freeze={list(patterns)} leaves no parameter to train; remove a pattern")


def group_by_multiplier(
    parameters: Mapping[str, nn.Parameter], multipliers: Mapping[str, float]
) -> list[tuple[float, list[nn.Parameter]]]:
    """Return factors of the learning rate with their parameters, first those with factor 1.

    Each key is a shell pattern; the last one that matches a name decides. Raises ValueError for a pattern that matches
    no trained parameter, or if every parameter matches.
    """
    patterns = dict.fromkeys(parameters, "")
    for pattern in multipliers:
        patterns |= dict.fromkeys(match_names(parameters, [pattern], "lr_multipliers", "trained parameter"), pattern)
    if "" not in patterns.values():
        raise ValueError(
            f"lr_multipliers={dict(multipliers)} match every trained parameter; change optimizer.lr instead"
        )
    groups = {
        pattern: [p for name, p in parameters.items() if patterns[name] == pattern] for pattern in ("", *multipliers)
    }
    return [(multipliers.get(pattern, 1.0), group) for pattern, group in groups.items() if group]


def add_adapters(
    net: nn.Module, rank: int, alpha: float, targets: Sequence[str], train: Sequence[str], dropout: float
) -> None:
    """Freeze the network and add trained low-rank adapters to the linear layers and convolutions that match `targets`.

    A layer with weight W becomes one with W + alpha / rank * B A. B starts at 0, so that predictions do not change.
    Parameters whose names match `train` are trained, too. Source: Hu et al. 2021 (arXiv 2106.09685), sec. 4.1.

    Raises ValueError without the library peft, or for a pattern that matches nothing.
    """
    with optional_package("lora=default", "peft"):
        from peft import LoraConfig, inject_adapter_in_model
    further = match_names([name for name, _ in net.named_parameters()], train, "lora.train")
    layers = [n for n, layer in net.named_modules() if isinstance(layer, ADAPTED) and getattr(layer, "groups", 1) == 1]
    adapted = match_names(layers, targets, "lora.targets", "linear layer or convolution")
    if not adapted:
        raise ValueError("lora.targets=[] selects no layer; ['*'] selects all")
    pattern = "|".join(map(re.escape, adapted))  # of a list, peft would also take names that end like one of it
    ours = [layer for layer in map(net.get_submodule, adapted) if isinstance(layer, Conv3x3)]
    for layer in ours:  # peft calls the class of a layer with the arguments of PyTorch's
        layer.__class__ = nn.Conv2d  # type: ignore[assignment]
    settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": pattern}
    inject_adapter_in_model(LoraConfig(**settings), net)
    for layer in ours:
        layer.__class__ = Conv3x3
    for name, parameter in net.named_parameters():
        parameter.requires_grad |= plain_name(name) in further


def plain_name(name: str) -> str:
    """Return the name that a weight of an adapted layer has without adapters."""
    return name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Return whether a weight of this name belongs to an adapter."""
    return ".lora_" in name


def merge_adapters(weights: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return the weights of the same network without adapters, W + alpha / rank * B A instead of W, A and B."""
    merged = {}
    for name, weight in weights.items():
        layer, is_adapted, _ = name.rpartition(".base_layer.weight")
        if is_adapted:
            a, b = (weights[f"{layer}.lora_{factor}.default.weight"] for factor in "AB")
            weight = weight + alpha / len(a) * (b.flatten(1) @ a.flatten(1)).view(weight.shape)
        if not is_adapter(name):
            merged[plain_name(name)] = weight
    return merged
