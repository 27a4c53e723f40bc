"""`DiTTransformer2DModel` of the diffusers library: its configuration and weights as those of our DiT, and back.

Each of its blocks has its own copy of the embeddings of time and class, which must be equal here. The first linear
layer of the time embedding absorbs that it counts steps from 0 where our time is (t + 1) / T.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from src.errors import first_names
from src.interop.diffusers_unet import TIME, rotated, swap_halves

TOP = {"linear_in": "pos_embed.proj", "modulation_out": "proj_out_1", "linear_out": "proj_out_2"}
EMBEDDINGS = {
    "time.linear1": "norm1.emb.timestep_embedder.linear_1",
    "time.linear2": "norm1.emb.timestep_embedder.linear_2",
    "condition.table": "norm1.emb.class_embedder.embedding_table",
}
BLOCK = {
    "modulation": "norm1.linear",
    "attention.out": "attn1.to_out.0",
    "linear1": "ff.net.0.proj",
    "linear2": "ff.net.2",
}
TABLE = "condition.table.weight"

CLASS_NAMES = ("DiTTransformer2DModel", "Transformer2DModel")
"""The second one is its name in older files, such as facebook/DiT-XL-2-256."""
FIXED = {
    "norm_type": ("ada_norm_zero",),
    "attention_bias": (True,),
    "activation_fn": ("gelu-approximate",),
    "norm_elementwise_affine": (False,),
}
"""Arguments of DiTTransformer2DModel with the only values that our DiT has, the default first."""
PAPER = {
    "activation": "gelu",
    "norm": "layer",
    "qk_norm": False,
    "positions": "sincos",
    "mlp_ratio": 4.0,
    "registers": 0,
    "bottleneck": None,
    "shared_modulation": False,
}
"""Arguments of our DiT with the values of the paper, which are those of DiTTransformer2DModel."""
ONLY_OURS = PAPER | {"freq_shift": 1}


def settings_of(config: Mapping[str, Any], num_steps: float, first_step: int = 0) -> dict[str, Any]:
    """Return the arguments of our DiT for the configuration of a DiTTransformer2DModel.

    Its timesteps are first_step, ..., first_step + num_steps - 1. Raises ValueError if our DiT has no such network.
    """
    for name, allowed in FIXED.items():
        if (value := config.get(name, allowed[0])) not in allowed:
            raise _unsupported(name, value, f"only {allowed[0]} is supported")
    channels, heads = config.get("in_channels", 4), config.get("num_attention_heads", 16)
    out_channels = config.get("out_channels") or channels
    if out_channels not in (channels, 2 * channels):
        raise _unsupported("out_channels", out_channels, f"it must be once or twice in_channels={channels}")
    return PAPER | {
        "channels": channels,
        "image_size": config.get("sample_size", 32),
        "outputs": out_channels // channels,
        "patch_size": config.get("patch_size", 2),
        "hidden_size": heads * config.get("attention_head_dim", 72),
        "depth": config.get("num_layers", 28),
        "num_heads": heads,
        "mlp_norm_eps": config.get("norm_eps", 1e-5),
        "dropout": config.get("dropout", 0.0),
        "time_scale": float(num_steps),
        "time_offset": float(first_step - 1),
        "freq_shift": 1,
    }


def config_of(model: Mapping[str, Any], outputs: int, num_classes: int | None) -> dict[str, Any]:
    """Return the configuration of the DiTTransformer2DModel that has the weights of our DiT with the arguments `model`.

    `num_classes` is the number of classes without the empty one. Raises ValueError, naming the settings, if there is
    none.
    """
    if wrong := [name for name, value in ONLY_OURS.items() if model[name] != value]:
        ours, theirs = (" ".join(f"model.{name}={v[name]}".lower() for name in wrong) for v in (model, ONLY_OURS))
        raise ValueError(
            f"{ours} must be {theirs} for a DiTTransformer2DModel; use format=safetensors, onnx or torch_export"
        )
    size, patch = model["image_size"], model["patch_size"]
    sides = {size} if isinstance(size, int) else {*size}
    side = max(sides)
    if len(sides) > 1 or side % patch or not (isinstance(size, int) or len(size) == 2):
        raise ValueError(
            f"model.image_size={size} must be the side of a square that model.patch_size={patch} divides for a "
            "DiTTransformer2DModel; use format=safetensors, onnx or torch_export"
        )
    return {
        "num_attention_heads": model["num_heads"],
        "attention_head_dim": model["hidden_size"] // model["num_heads"],
        "in_channels": model["channels"],
        "out_channels": model["channels"] * outputs,
        "num_layers": model["depth"],
        "dropout": model["dropout"],
        "attention_bias": True,
        "sample_size": side,
        "patch_size": patch,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": num_classes or 1,  # an unconditional network has one class with a vector of zeros
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": model["mlp_norm_eps"],
    }


def from_diffusers(weights: Mapping[str, Tensor], model: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a DiTTransformer2DModel by the names of our DiT with the arguments `model`.

    Raises ValueError for those of another network, or if blocks differ in their embeddings of time and class.
    """
    theirs = {name: value for name, value in weights.items() if name != "pos_embed.pos_embed"}
    result: dict[str, Tensor] = {}
    for name, parts in weight_names(model["depth"]):
        values = [theirs.pop(part) for part in parts if part in theirs]
        if not values:
            continue
        if is_embedding(name) and not all(torch.equal(value, values[0]) for value in values):
            raise ValueError(
                f"init_from: {parts[0]} differs between the blocks; only networks with one embedding of time and "
                "class are supported, such as those converted from DiT"
            )
        value = values[0] if is_embedding(name) else torch.cat(values)
        result[name] = convert(name, value, model["channels"] * model["outputs"])
    if theirs:
        raise ValueError(
            f"init_from: {first_names(sorted(theirs))} are not weights of this network; choose the config.json of the "
            "file"
        )
    return result


def to_diffusers(weights: Mapping[str, Tensor], model: Mapping[str, Any], outputs: int) -> dict[str, Tensor]:
    """Return the weights of our DiT by the names of the DiTTransformer2DModel of `config_of`, for timesteps from 0."""
    result: dict[str, Tensor] = {}
    patch, width = model["patch_size"], model["hidden_size"]
    ours = {TABLE: torch.zeros(2, width), **weights}
    for name, parts in weight_names(model["depth"]):
        value = ours[name]
        if name == TIME:
            value = swap_halves(rotated(value, model))
        elif name == "linear_in.weight":
            value = value.view(width, -1, patch, patch)
        elif name.startswith("linear_out."):  # rows (position, channel) instead of (channel, position)
            value = _swap(value, model["channels"] * outputs)
        values = [value] * len(parts) if is_embedding(name) else value.chunk(len(parts))
        result.update(zip(parts, (part.clone() for part in values), strict=True))
    return result


def convert(name: str, value: Tensor, out_channels: int) -> Tensor:
    """Convert a weight of DiT from the layout of its authors and of diffusers to ours; `name` is our name for it."""
    if name == TIME:
        return swap_halves(value)
    if name == "linear_in.weight":
        return value.flatten(1)  # a convolution over patches
    if name.startswith("linear_out."):  # rows (position, channel) instead of (channel, position)
        return _swap(value, value.shape[0] // out_channels)
    return value


def _swap(value: Tensor, count: int) -> Tensor:
    """Return rows in the order (second, first) instead of (first, second), of which there are `count` firsts."""
    return value.view(count, -1, *value.shape[1:]).transpose(0, 1).flatten(0, 1)


def is_embedding(name: str) -> bool:
    """Return whether each block of diffusers has a copy of our weight `name`."""
    return name.rpartition(".")[0] in EMBEDDINGS


def weight_names(depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each weight's name in our DiT, and in DiTTransformer2DModel those of its copies or of its parts."""
    blocks = [f"transformer_blocks.{k}" for k in range(depth)]
    for ours, theirs in TOP.items():
        yield from ((f"{ours}.{kind}", (f"{theirs}.{kind}",)) for kind in ("weight", "bias"))
    for ours, theirs in EMBEDDINGS.items():
        kinds = ("weight",) if ours == "condition.table" else ("weight", "bias")
        yield from ((f"{ours}.{kind}", tuple(f"{block}.{theirs}.{kind}" for block in blocks)) for kind in kinds)
    for k, block in enumerate(blocks):
        for kind in ("weight", "bias"):
            yield from ((f"blocks.{k}.{o}.{kind}", (f"{block}.{t}.{kind}",)) for o, t in BLOCK.items())
            yield f"blocks.{k}.attention.qkv.{kind}", tuple(f"{block}.attn1.to_{letter}.{kind}" for letter in "qkv")


def _unsupported(name: str, value: object, rule: str) -> ValueError:
    return ValueError(f"{name}={value} of the DiTTransformer2DModel is not a network of this project: {rule}")
