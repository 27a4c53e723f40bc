"""Start a network from the weights of a trained one."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from src.errors import first_names
from src.training.finetuning import is_adapter, plain_name

FIRST, LAST = ("conv_in", "linear_in"), ("conv_out", "linear_out")
"""The layers whose inputs and outputs are the channels of the data."""


class InitialWeights(NamedTuple):
    """The names of a network's weights, by what it took from another network."""

    loaded: list[str]
    partial: list[str]
    """Weights of the first and the last layer that were loaded for the channels that both networks have."""
    new: list[str]
    """Weights of this network that the other one lacks, or has in another shape: they keep their initial values."""
    unused: list[str]
    """Weights of the other network for which this one has no place."""

    def __str__(self) -> str:
        lists = {"loaded in part": self.partial, "initialized anew": self.new, "not used": self.unused}
        parts = [f"{len(names)} {what} ({first_names(names)})" for what, names in lists.items() if names]
        return ", ".join([f"{len(self.loaded)} weights loaded", *parts])


@torch.no_grad()
def load_matching(net: nn.Module, weights: Mapping[str, Tensor]) -> InitialWeights:
    """Copy into `net` each of the `weights` that has the name and the shape of one of its own.

    The data may have further channels: the weights of the shared channels are copied, and those by which the network
    reads a further channel are 0, so that its predictions start as those of the trained network. The last layer may
    have another number of outputs per channel (a learned variance); the first one is the prediction. Adapters stay, and
    names are those without adapters.
    """
    own = {plain_name(name): weight for name, weight in net.state_dict().items() if not is_adapter(name)}
    patch = int(getattr(net, "patch_size", 1))
    theirs, ours = _channels(weights, patch), _channels(own, patch)
    report = InitialWeights([], [], [], [name for name in weights if name not in own])
    for name, target in own.items():
        source = weights.get(name)
        if source is not None and source.shape == target.shape:
            target.copy_(source)
            report.loaded.append(name)
        elif source is not None and _copy_channels(name, source, target, theirs, ours):
            report.partial.append(f"{name} {_shape(source)} -> {_shape(target)}")
        else:
            report.new.append(f"{name} {_shape(target)}" + ("" if source is None else f", not {_shape(source)}"))
    return report


def _channels(weights: Mapping[str, Tensor], patch: int) -> tuple[int, int]:
    """Return the number of channels of the data, and of positions in a patch; 0 channels if no first layer is known."""
    first = next((weights[f"{name}.weight"] for name in FIRST if f"{name}.weight" in weights), None)
    if first is None:
        return 0, 1
    positions = patch ** (first.ndim - 2)
    return (first.shape[1] // positions if first.shape[1] % positions == 0 else 0), positions


def _copy_channels(name: str, source: Tensor, target: Tensor, theirs: tuple[int, int], ours: tuple[int, int]) -> bool:
    """Copy the shared channels of a weight of the first or the last layer, and return whether that is possible."""
    layer, channels, positions = name.split(".")[0], theirs[0], ours[1]
    axis = {**dict.fromkeys(FIRST, 1), **dict.fromkeys(LAST, 0)}.get(layer)
    if axis is None or theirs[1] != positions or not 0 < channels <= ours[0]:
        return False
    others = [[n for k, n in enumerate(weight.shape) if k != axis] for weight in (source, target)]
    if others[0] != others[1] or source.shape[axis] % (channels * positions):
        return False
    # The order of channels is (output, channel of the data, position in the patch); inputs have one "output".
    old, new = (
        weight.movedim(axis, 0).view(-1, count, positions, *others[0])
        for weight, count in ((source, channels), (target, ours[0]))
    )
    outputs = min(len(old), len(new))
    if layer in FIRST:
        new.zero_()
    new[:outputs, :channels] = old[:outputs]
    return True


def _shape(weight: Tensor) -> tuple[int, ...]:
    return tuple(weight.shape)
