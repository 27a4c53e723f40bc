"""Weights of DiT and SiT, in the layout of their authors, as our DiT.

Both have one layout and one network. SiT sees the time of its path, from 0 for noise to 1 for data, and predicts the
velocity from noise to data, the negative of ours.

Source: Peebles & Xie 2022 (arXiv 2212.09748); Ma et al. 2024 (arXiv 2401.08740).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from src.interop.diffusers_dit import PAPER, TABLE, convert
from src.interop.imported import ImportedModel, check_weights, parse_flags
from src.models.attention import sincos_positions
from src.models.dit import DiT

FIRST = "x_embedder.proj.weight"
"""A weight that tells this layout from others."""
TOP = {
    "x_embedder.proj": "linear_in",
    "t_embedder.mlp.0": "time.linear1",
    "t_embedder.mlp.2": "time.linear2",
    "y_embedder.embedding_table": "condition.table",
    "final_layer.adaLN_modulation.1": "modulation_out",
    "final_layer.linear": "linear_out",
}
BLOCK = {
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "mlp.fc1": "linear1",
    "mlp.fc2": "linear2",
    "adaLN_modulation.1": "modulation",
}
SIZES = {"S": (384, 6), "B": (768, 12), "L": (1024, 16), "XL": (1152, 16)}
"""Width and heads by the name of a size (tab. 1)."""
START = 1e-4
"""The least noise of our rectified flow."""
IGNORED = (
    "ckpt vae cfg-scale num-sampling-steps seed sampling-method atol rtol reverse diffusion-form diffusion-norm "
    "last-step last-step-size loss-weight sample-eps train-eps"
)
"""Flags of the sampling scripts that do not change the model."""


def read_dit(weights: Mapping[str, Tensor], flags: str) -> ImportedModel:
    """Return the model of a state dict and of flags of the authors' `sample.py`, of which `--model` is required.

    Raises ValueError if a flag is unknown or contradicts the weights, or if our DiT has no such network.
    """
    kinds: dict[str, type] = dict.fromkeys(["image-size", "num-classes", "num-heads"], int)
    kinds |= dict.fromkeys(["model", "path-type", "prediction", *IGNORED.split()], str)
    fix = "write those of sample.py, such as --model DiT-XL/2"
    typed = parse_flags(flags, kinds, "DiT or SiT", fix, words=("ODE", "SDE"))
    try:
        model, is_sit = _network(weights, typed)
    except KeyError as error:
        raise ValueError(f"init_from: the file has no {error.args[0]}; download it again, or choose another") from error
    channels, out_channels = model["channels"], model["channels"] * model["outputs"]
    modules = TOP | {
        f"blocks.{k}.{theirs}": f"blocks.{k}.{name}" for k in range(model["depth"]) for theirs, name in BLOCK.items()
    }
    names = {f"{ours}.{kind}": f"{theirs}.{kind}" for theirs, ours in modules.items() for kind in ("weight", "bias")}
    ours: dict[str, Tensor] = {}
    for theirs, value in weights.items():
        module, _, kind = theirs.rpartition(".")
        if theirs != "pos_embed":
            name = f"{modules.get(module, module)}.{kind}"
            ours[name] = convert(name, value.float(), out_channels)
    diffusion: dict[str, Any]
    if is_sit:  # the channels after the first ones are not trained
        size = channels * model["patch_size"] ** 2
        ours |= {name: -value[:size] for name, value in ours.items() if name.startswith("linear_out.")}
        model |= {"outputs": 1, "time_scale": START - 1, "time_offset": 1 - START}  # from our time to alpha
        curve = {"_target_": "src.diffusion.curves.rectified_flow", "_partial_": True, "start": START}
        schedule = {"_target_": "src.diffusion.noise.ContinuousSchedule", "curve": curve, "num_steps": 1000}
        diffusion = {"prediction": "velocity", "variance": "fixed_small", "clip_x0": None}
    else:
        model |= {"time_scale": 1000.0, "time_offset": -1.0}
        schedule = {"_target_": "src.diffusion.schedules.linear", "num_steps": 1000, "max_beta": 0.999}
        schedule |= {"beta_start": 1e-4, "beta_end": 0.02}
        variance = "learned_range" if model["outputs"] == 2 else "fixed_large"
        diffusion = {"prediction": "eps", "variance": variance, "clip_x0": None}
    classes, has_null = _classes(ours, typed)
    imported = ImportedModel(
        model, schedule, diffusion, ours, classes, sampler="dpmpp_2m" if is_sit else "ancestral",
        has_null_class=has_null, network=DiT,
    )  # fmt: skip
    return check_weights(imported, names)


def _network(weights: Mapping[str, Tensor], typed: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the arguments of our DiT without the scale of time, and whether the weights are those of SiT.

    Raises ValueError if flags contradict the weights, and KeyError if weights are missing.
    """
    width, channels, patch, _ = weights[FIRST].shape
    sizes = "|".join(SIZES)
    name = re.fullmatch(rf"(DiT|SiT)(?:-({sizes})/(\d+))?", typed.get("model", ""))
    if name is None:
        given = f"has --model {typed['model']}" if "model" in typed else "has no --model"
        raise ValueError(
            f"init_from.flags {given}, and the file does not show the project; add --model DiT-XL/2 or --model SiT-XL/2"
        )
    if name[2] and (width, patch) != (SIZES[name[2]][0], int(name[3])):
        raise ValueError(
            f"init_from.flags: --model {name[0]} contradicts the file, which has width {width} and patches of {patch}; "
            f"correct it, or write --model {name[1]}"
        )
    if not (heads := typed.get("num_heads", dict(SIZES.values()).get(width))):
        raise ValueError(
            f"init_from.flags must have --num-heads for width {width}, since the file does not show it; add "
            f"--num-heads {max(1, width // 64)}"
        )
    positions = weights["pos_embed"][0].float()
    side = math.isqrt(len(positions))
    if not positions.allclose(sincos_positions((side, side), width, positions.device), atol=1e-4):
        raise ValueError(
            "init_from: pos_embed is not the sine-cosine embedding of a square, which positions=sincos is; choose "
            "another file"
        )
    if typed.get("image_size", side * patch * 8) != side * patch * 8:
        raise ValueError(
            f"init_from.flags: --image-size {typed['image_size']} contradicts the file, which is for "
            f"{side * patch * 8}; correct it, or leave it out"
        )
    for flag, value in {"path-type": "Linear", "prediction": "velocity"}.items():
        if (given := typed.get(flag.replace("-", "_"), value)) != value:
            raise ValueError(
                f"init_from.flags: --{flag} {given} is not supported; choose a model with --{flag} {value}"
            )
    hidden = weights["blocks.0.mlp.fc1.bias"].shape[0]
    blocks = {int(name.split(".")[1]) for name in weights if name.startswith("blocks.")}
    outputs = weights["final_layer.linear.bias"].shape[0] // (patch**2 * channels)
    model = PAPER | {"channels": channels, "image_size": side * patch, "outputs": outputs, "patch_size": patch}
    model |= {"hidden_size": width, "depth": len(blocks), "num_heads": heads, "mlp_ratio": hidden / width}
    return model | {"freq_shift": 0}, name[1] == "SiT"


def _classes(ours: Mapping[str, Tensor], typed: Mapping[str, Any]) -> tuple[int | None, bool]:
    """Return the number of classes without the empty one, and whether there is an empty one, which is usual."""
    if TABLE not in ours:
        return None, False
    rows = ours[TABLE].shape[0]
    classes = typed.get("num_classes", rows - 1)
    if classes not in (rows, rows - 1):
        raise ValueError(
            f"init_from.flags: --num-classes {classes} contradicts the file, which has {rows - 1}; correct it, or "
            "leave it out"
        )
    return classes, classes < rows
