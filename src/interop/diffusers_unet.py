"""`UNet2DModel` of the diffusers library: its configuration and weights as those of our U-Net, and the way back.

Both networks have the same modules by other names. What differs in their inputs is absorbed by the first linear layer
of the time embedding: diffusers may put cosines before sines, and it counts steps from 0 where our time is (t + 1) / T.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from src.errors import first_names
from src.models.layers import fit_groups
from src.models.unet import attended_resolutions, stage_resolutions

RESIDUAL = {
    **{name: name for name in ("norm1", "conv1", "norm2", "conv2")},
    "emb": "time_emb_proj",
    "shortcut": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "out": "to_out.0"}
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names of attention layers in files of diffusers before 0.12, such as google/ddpm-cifar10-32."""

FIXED = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "class_embed_type": (None,),
}
"""Arguments of UNet2DModel with the only values that our U-Net has, the default first."""

ONLY_OURS = {
    "skip_scale": 1.0,
    "resample_proj": False,
    "decoder_attention": "all",
    "cond_in_time_mlp": False,
    "time_channels": None,
}
"""Arguments of our U-Net with the only values that UNet2DModel has."""

TIME = "time.linear1.weight"


def settings_of(config: Mapping[str, Any], num_steps: float, first_step: int = 0) -> dict[str, Any]:
    """Return the arguments of our U-Net for the configuration of a UNet2DModel.

    Its timesteps are first_step, ..., first_step + num_steps - 1. Raises ValueError if our U-Net has no such network.
    """
    for name, allowed in FIXED.items():
        if (value := config.get(name, allowed[0])) not in allowed:
            raise _unsupported(name, value, f"only {allowed[0]} is supported")
    widths = list(config["block_out_channels"])
    if any(width % widths[0] for width in widths):
        raise _unsupported("block_out_channels", widths, "each must be a multiple of the first")
    if (size := config.get("sample_size")) is None:
        raise _unsupported("sample_size", None, "set it to the size of the images")
    size = size if isinstance(size, int) else list(size)
    resampling, attended = _block_types(config)
    groups = config.get("norm_num_groups", 32)
    if (attention_groups := config.get("attn_norm_num_groups")) not in (None, groups):
        raise _unsupported("attn_norm_num_groups", attention_groups, f"it must equal norm_num_groups={groups}")
    channels, out_channels = config.get("in_channels", 3), config.get("out_channels", 3)
    if out_channels not in (channels, 2 * channels):
        raise _unsupported("out_channels", out_channels, f"it must be once or twice in_channels={channels}")
    sides = stage_resolutions([size] * 2 if isinstance(size, int) else size, 1, len(widths))
    scale_shift = config.get("resnet_time_scale_shift", "default") == "scale_shift"
    if scale_shift and attention_groups is None:  # the middle attention then has no norm
        raise _unsupported(
            "attn_norm_num_groups", None, f"with resnet_time_scale_shift=scale_shift it must be {groups}"
        )
    return {
        "channels": channels,
        "image_size": size,
        "outputs": out_channels // channels,
        "patch_size": 1,
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config.get("layers_per_block", 2),
        "attention_resolutions": [
            round(side) for side, is_attended in zip(sides, attended, strict=True) if is_attended
        ],
        "num_heads": 1,
        "num_head_channels": config.get("attention_head_dim", 8),
        "time_conditioning": "scale_shift" if scale_shift else "add",
        "resblock_updown": resampling,
        "dropout": config.get("dropout", 0.0),
        "norm_groups": groups,
        "norm_eps": config.get("norm_eps", 1e-5),
        "downsample_padding": config.get("downsample_padding", 1),
        "freq_shift": config.get("freq_shift", 0),
        "time_scale": float(num_steps),
        "time_offset": float(first_step - 1),
    }


def config_of(model: Mapping[str, Any], outputs: int, num_classes: int | None) -> dict[str, Any]:
    """Return the configuration of the UNet2DModel that has the weights of our U-Net with the arguments `model`.

    The network has no patches, and resolutions are integers. `num_classes` is the number of rows of the class
    embedding. Raises ValueError, naming the setting, if there is none.
    """
    if model["num_head_channels"] is None and model["num_heads"] != 1:
        raise ValueError(
            f"model.num_heads={model['num_heads']} must be 1 for a UNet2DModel; set model.num_head_channels"
        )
    for name, value in ONLY_OURS.items():
        if model.get(name, value) != value:
            raise ValueError(f"model.{name}={model[name]} must be {value} for a UNet2DModel; use another format")
    resampling = model["resblock_updown"]
    names = {True: ("AttnDownBlock2D", "AttnUpBlock2D"), False: ("DownBlock2D", "UpBlock2D")}
    if resampling:
        names[False] = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    blocks = [names[is_attended] for is_attended in attended_stages(model)]
    groups = model.get("norm_groups") or fit_groups(model["model_channels"])
    resample = "resnet" if resampling else "conv"
    return {
        "sample_size": model["image_size"],
        "in_channels": model["channels"],
        "out_channels": model["channels"] * outputs,
        "flip_sin_to_cos": False,
        "freq_shift": model.get("freq_shift", 1),
        "down_block_types": [down for down, _ in blocks],
        "up_block_types": [up for _, up in reversed(blocks)],
        "block_out_channels": [model["model_channels"] * mult for mult in model["channel_mult"]],
        "layers_per_block": model["num_res_blocks"],
        "downsample_padding": model.get("downsample_padding", 1),
        "downsample_type": resample,
        "upsample_type": resample,
        "dropout": model["dropout"],
        "attention_head_dim": model["num_head_channels"],
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,
        "norm_eps": model.get("norm_eps", 1e-5),
        "num_class_embeds": num_classes,
        "resnet_time_scale_shift": "scale_shift" if model["time_conditioning"] == "scale_shift" else "default",
    }


def from_diffusers(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the weights of a UNet2DModel by the names of our U-Net. Raises ValueError for one of another network."""
    theirs = dict(weights)
    for old, new in OLD_NAMES.items():
        theirs = {name.replace(old, new): value for name, value in theirs.items()}
    result: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, parts in weight_names(model):
        if values := [theirs[part] for part in parts if part in theirs]:
            if name.endswith((".qkv.weight", ".out.weight")):
                values = [value.flatten(1) for value in values]  # old files have 1x1 convolutions
            result[name] = torch.cat(values) if len(values) > 1 else values[0]
            used.update(parts)
    if rest := sorted(theirs.keys() - used):
        raise ValueError(
            f"init_from: {first_names(rest)} are not weights of this network; use the config.json of its folder"
        )
    if TIME in result and config.get("flip_sin_to_cos", True):
        result[TIME] = swap_halves(result[TIME])
    return result


def to_diffusers(weights: Mapping[str, Tensor], model: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of our U-Net by the names of the UNet2DModel of `config_of`, for timesteps from 0."""
    result: dict[str, Tensor] = {}
    for name, parts in weight_names(model):
        if name in weights:
            value = rotated(weights[name], model) if name == TIME else weights[name]
            result.update(zip(parts, (part.clone() for part in value.chunk(len(parts))), strict=True))
    return result


def original_time(time: Tensor, sidecar: Mapping[str, Tensor], model: Mapping[str, Any]) -> Tensor | None:
    """Return the `TIME` weight of `sidecar`, which `rotated` rounded to `time`, that of a network of diffusers.

    `model` has the arguments of our network. Return None if they do not fit, for example because the network of
    diffusers was trained further.
    """
    original = sidecar.get(TIME)
    if original is None or original.shape != time.shape:
        return None
    return original if torch.equal(rotated(original, model), time) else None


def rotated(time: Tensor, model: Mapping[str, Any]) -> Tensor:
    """Return the `TIME` weight of our network with the arguments `model` for timesteps that count from 0."""
    return shift_time(time, model.get("time_offset", 0.0) + 1, model.get("freq_shift", 1))


def shift_time(weight: Tensor, steps: float, freq_shift: int) -> Tensor:
    """Return the first linear layer (dim, width) of a time embedding that sees timesteps smaller by `steps`.

    It rotates each pair of columns: sin(w (t + s)) = sin(w t) cos(w s) + cos(w t) sin(w s), and so for the cosine.
    """
    if steps == 0:
        return weight
    half = weight.shape[1] // 2
    exponent = torch.arange(half, dtype=torch.float64) / max(half - freq_shift, 1)
    angle = steps * torch.exp(-math.log(10_000.0) * exponent)
    sine, cosine = weight.double().chunk(2, dim=1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([sine * cos - cosine * sin, sine * sin + cosine * cos], dim=1).to(weight.dtype)


def swap_halves(weight: Tensor) -> Tensor:
    """Return the first linear layer of a time embedding for cosines before sines instead of after, and vice versa."""
    return torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)


def weight_names(model: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the name of each weight of our U-Net with the names of the weights of UNet2DModel that it concatenates.

    Some do not exist: a residual block has a shortcut only where its number of channels changes.
    """
    for ours, theirs in _modules(model):
        for kind in ("weight", "bias"):
            if ours.endswith("qkv"):
                yield f"{ours}.{kind}", tuple(f"{theirs}.to_{letter}.{kind}" for letter in "qkv")
            else:
                yield f"{ours}.{kind}", (f"{theirs}.{kind}",)


def _modules(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the names of the layers of our U-Net with those of UNet2DModel."""

    def parts(ours: str, theirs: str, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        yield from ((f"{ours}.{name}", f"{theirs}.{other}") for name, other in names.items())

    def attention(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
        yield from parts(ours, theirs, ATTENTION)
        yield f"{ours}.qkv", theirs

    def path(side: str, attended: list[bool], depth: int, resampler: str) -> Iterator[tuple[str, str]]:
        index = 0
        for stage, is_attended in enumerate(attended):
            block = f"{side}_blocks.{stage}"
            for k in range(depth):
                yield from parts(f"{side}.{index}.residual", f"{block}.resnets.{k}", RESIDUAL)
                if is_attended:
                    yield from attention(f"{side}.{index}.attention", f"{block}.attentions.{k}")
                index += 1
            if stage < len(attended) - 1:
                names = RESIDUAL if model["resblock_updown"] else {"conv": "conv"}
                yield from parts(f"{side}.{index}", f"{block}.{resampler}.0", names)
                index += 1

    attended = attended_stages(model)
    yield "conv_in", "conv_in"
    yield from parts("time", "time_embedding", {"linear1": "linear_1", "linear2": "linear_2"})
    yield "condition.table", "class_embedding"
    yield from path("down", attended, model["num_res_blocks"], "downsamplers")
    yield from parts("middle.0", "mid_block.resnets.0", RESIDUAL)
    yield from attention("middle.1", "mid_block.attentions.0")
    yield from parts("middle.2", "mid_block.resnets.1", RESIDUAL)
    yield from path("up", attended[::-1], model["num_res_blocks"] + 1, "upsamplers")
    yield "norm_out", "conv_norm_out"
    yield "conv_out", "conv_out"


def attended_stages(model: Mapping[str, Any]) -> list[bool]:
    """Return whether each stage of our U-Net with the arguments `model` has attention."""
    size = model["image_size"]
    sides = [size] * 2 if isinstance(size, int) else list(size)
    resolutions = stage_resolutions(sides, model.get("patch_size", 1), len(model["channel_mult"]))
    chosen = attended_resolutions(model["attention_resolutions"], resolutions)
    return [resolution in chosen for resolution in resolutions]


def _block_types(config: Mapping[str, Any]) -> tuple[bool, list[bool]]:
    """Return whether residual blocks resample, and whether each stage has attention."""
    down, up = list(config["down_block_types"]), list(config["up_block_types"])
    mirrored = [name.replace("Up", "Down") for name in reversed(up)]
    known = {"DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"}
    if mirrored != down or not known >= set(down):
        raise _unsupported(
            "down_block_types", down, f"they must be of {', '.join(sorted(known))}, and up_block_types alike"
        )
    kinds = {
        config.get(f"{side}sample_type", "conv")
        if name == f"Attn{side.title()}Block2D"
        else "resnet"
        if name.startswith("Resnet")
        else "conv"
        for side, names in (("down", down[:-1]), ("up", up[:-1]))
        for name in names
    }
    if len(kinds) > 1 or (kinds and not kinds <= {"conv", "resnet"}):
        raise _unsupported("downsample_type", sorted(map(str, kinds)), "all stages must resample alike")
    return kinds == {"resnet"}, [name.startswith("Attn") for name in down]


def _unsupported(name: str, value: object, rule: str) -> ValueError:
    return ValueError(f"{name}={value} of the UNet2DModel is not a network of this project: {rule}")
