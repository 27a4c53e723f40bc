"""Weights of EDM (Karras et al. 2022, arXiv 2206.00364) as our U-Net.

Its two networks are DhariwalUNet, which is ADM, and SongUNet, whose variant DDPM++ is supported. Their pickles contain
code. `CONVERT` turns one into safetensors with the class and arguments of the network as JSON in the metadata.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from src.errors import first_names
from src.interop.diffusers_unet import TIME, swap_halves
from src.interop.imported import ImportedModel, check_weights

CONVERT = (
    'python -c "import json, pickle, sys; from safetensors.torch import save_file; '
    "net = pickle.load(open(sys.argv[1], 'rb'))['ema'].cpu(); "
    "save_file({k: v.contiguous() for k, v in net.state_dict().items()}, sys.argv[2], "
    "{'edm': json.dumps({'class': type(net).__name__, 'kwargs': net.init_kwargs})})\" model.pkl model.safetensors"
)
"""A command, for a shell in a checkout of EDM, with torch and safetensors."""

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
"""The ends of the sampler (tab. 1)."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "DhariwalUNet": {
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "num_blocks": 3,
        "attn_resolutions": [32, 16, 8],
    },
    "SongUNet": {"model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4, "attn_resolutions": [16]},
}
REQUIRED: dict[str, dict[str, Any]] = {
    "DhariwalUNet": {"channel_mult_emb": 4},
    "SongUNet": {
        "channel_mult_emb": 4,
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "decoder_type": "standard",
        "resample_filter": [1, 1],
    },
}
"""Arguments that our U-Net has with one value only, their default."""
OTHERS = {"dropout", "label_dropout", "label_dim", "augment_dim", "img_resolution", "img_channels", "sigma_data"}
IGNORED = {"use_fp16", "sigma_min", "sigma_max"}

RESIDUAL = {"norm0": "norm1", "conv0": "conv1", "affine": "emb", "norm1": "norm2", "conv1": "conv2", "skip": "shortcut"}
TABLE = "condition.table.weight"
ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "out"}


def read_converted(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Return tensors and metadata of a safetensors file that `CONVERT` wrote; None for another file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            return ({name: file.get_tensor(name) for name in file.keys()}, metadata) if "edm" in metadata else None
    except (SafetensorError, OSError):
        return None


def pickle_error(path: Path) -> ValueError:
    """Return the error for a pickle, which can run any code when it is read."""
    return ValueError(
        f"init_from={path} is a pickle, which can run code; in a checkout of its project, convert it: {CONVERT}"
    )


def read_edm(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> ImportedModel:
    """Return the model of the tensors and metadata that `CONVERT` writes.

    Raises ValueError if the network has parts that our U-Net does not have.
    """
    kind, kwargs = _arguments(metadata)
    is_adm = kind == "DhariwalUNet"
    model = _network(kind, kwargs)
    schedule, diffusion = edm_process(kwargs.get("sigma_data", 0.5))
    modules = _modules(model["image_size"], len(model["channel_mult"]), model["num_res_blocks"])
    ours, names = {}, {}
    for name, value in weights.items():
        # Resampling filters are constants, and labels of augmentations are 0 when sampling.
        if name.endswith("resample_filter") or name == "model.map_augment.weight":
            continue
        module, _, leaf = name.removeprefix("model.").rpartition(".")
        renamed = f"{modules.get(module, module)}.{leaf}"
        names[renamed] = name
        ours[renamed] = _convert(renamed, value.float(), is_adm)
    classes = kwargs.get("label_dim", 0) or None
    has_null = classes is not None and kwargs.get("label_dropout", 0) > 0
    if TABLE in ours:
        rows = ours[TABLE].T
        rows = torch.cat([rows, torch.zeros_like(rows[:1])]) if has_null else rows  # labels of zeros
        bias, linear1 = ours.pop("condition.table.bias", None), ours.get(TIME)
        if bias is not None and linear1 is not None:
            # SongUNet adds sqrt(num_classes) rows + bias to the sinusoids, which linear1 maps to the hidden layer.
            rows = (math.sqrt(classes or 1) * rows + bias) @ linear1.T
        ours[TABLE] = rows
    imported = ImportedModel(model, schedule, diffusion, ours, classes, sampler="heun", has_null_class=has_null)
    return check_weights(imported, names)


def edm_process(sigma_data: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the schedule and the arguments of `GaussianDiffusion` of a preconditioned network (tab. 1)."""
    curve = {"_target_": "src.diffusion.curves.exploding", "_partial_": True}
    curve |= {"sigma_min": SIGMA_MIN, "sigma_max": SIGMA_MAX}
    schedule = {"_target_": "src.diffusion.noise.ContinuousSchedule", "curve": curve, "num_steps": 1000}
    return schedule, {"prediction": "edm", "sigma_data": sigma_data, "clip_x0": None}


def read_arguments(metadata: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """Return the class around the network in the metadata that `CONVERT` writes, and its arguments.

    Raises ValueError if the metadata are damaged.
    """
    try:
        described = json.loads(metadata["edm"])
        precond, given = described["class"], dict(described["kwargs"])
        given["img_resolution"], given["img_channels"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"init_from: the metadata edm of the file cannot be read; convert it again: {CONVERT}"
        ) from error
    return precond, given


def _arguments(metadata: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """Return the class of EDM's network and its arguments. Raises ValueError for those that our U-Net does not have."""
    precond, given = read_arguments(metadata)
    if precond != "EDMPrecond":
        raise ValueError(f"init_from: networks in {precond} are not supported; choose one in EDMPrecond")
    kind = given.pop("model_type", "DhariwalUNet")
    if kind not in DEFAULTS:
        raise ValueError(f"init_from: EDM's {kind} is not supported; choose a DhariwalUNet or SongUNet")
    required = REQUIRED[kind]
    if unknown := sorted(given.keys() - DEFAULTS[kind].keys() - required.keys() - OTHERS - IGNORED):
        raise ValueError(
            f"init_from: EDM's {kind} with {first_names(unknown)} is not supported; choose another network"
        )
    for name, value in required.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"init_from: EDM's {kind} with {name}={given[name]} is not supported; choose one with {name}={value}"
            )
    return kind, DEFAULTS[kind] | given


def _network(kind: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of our U-Net. Raises ValueError for widths that it does not have."""
    width, mult, image_size = kwargs["model_channels"], kwargs["channel_mult"], kwargs["img_resolution"]
    is_adm = kind == "DhariwalUNet"
    base = width * mult[0] if is_adm else width  # channels of the first convolution
    if any(width * m % base for m in mult):
        raise ValueError(f"init_from: EDM's {kind} with channel_mult={mult} is not supported; choose another network")
    if width * min(mult) < 128:
        raise ValueError(
            f"init_from: EDM's {kind} with fewer than 128 channels is not supported: its norms differ in groups; "
            "choose a wider network"
        )
    return {
        "channels": kwargs["img_channels"],
        "image_size": image_size,
        "patch_size": 1,
        "model_channels": base,
        "channel_mult": [width * m // base for m in mult],
        "num_res_blocks": kwargs["num_blocks"],
        "attention_resolutions": [r for i in range(len(mult)) if (r := image_size >> i) in kwargs["attn_resolutions"]],
        "num_heads": 1,
        "num_head_channels": 64 if is_adm else None,
        "time_conditioning": "scale_shift" if is_adm else "add",
        "resblock_updown": True,
        "dropout": kwargs.get("dropout", 0.1),
        "outputs": 1,
        "time_scale": math.log(SIGMA_MAX / SIGMA_MIN) / 4,  # the network sees c_noise = log(sigma) / 4
        "time_offset": math.log(SIGMA_MIN) / 4,
        "freq_shift": 0 if is_adm else 1,
        "norm_groups": 32,
        "norm_eps": 1e-5 if is_adm else 1e-6,
        "skip_scale": 1.0 if is_adm else math.sqrt(0.5),
        "resample_proj": not is_adm,
        "decoder_attention": "all" if is_adm else "last",
        "cond_in_time_mlp": not is_adm,
        "time_channels": None if width == base else width,
    }


def _modules(image_size: int, num_stages: int, num_blocks: int) -> dict[str, str]:
    """Return our names of EDM's modules."""
    top = f"{image_size}x{image_size}"
    modules = {
        "map_layer0": "time.linear1",
        "map_layer1": "time.linear2",
        "map_label": "condition.table",
        f"enc.{top}_conv": "conv_in",
        "out_norm": "norm_out",
        "out_conv": "conv_out",
        f"dec.{top}_aux_norm": "norm_out",
        f"dec.{top}_aux_conv": "conv_out",
    }

    def add(theirs: str, residual: str, attention: str = "") -> None:
        modules.update({f"{theirs}.{part}": f"{residual}.{ours}" for part, ours in RESIDUAL.items()})
        modules.update({f"{theirs}.{part}": f"{attention}.{ours}" for part, ours in ATTENTION.items() if attention})

    sides = [image_size >> i for i in range(num_stages)]
    down = [f"{n}x{n}_{part}" for n in sides for part in ("down", *(f"block{k}" for k in range(num_blocks)))][1:]
    up = [f"{n}x{n}_{part}" for n in sides[::-1] for part in ("up", *(f"block{k}" for k in range(num_blocks + 1)))][1:]
    for way, blocks in {"enc": down, "dec": up}.items():
        for i, block in enumerate(blocks):
            ours = f"{'down' if way == 'enc' else 'up'}.{i}"
            if block.endswith(("_down", "_up")):
                add(f"{way}.{block}", ours)
            else:
                add(f"{way}.{block}", f"{ours}.residual", f"{ours}.attention")
    add(f"dec.{sides[-1]}x{sides[-1]}_in0", "middle.0", "middle.1")
    add(f"dec.{sides[-1]}x{sides[-1]}_in1", "middle.2")
    return modules


def _convert(name: str, value: Tensor, is_adm: bool) -> Tensor:
    """Return a weight in our layout; `name` is ours."""
    if name == TIME:
        return swap_halves(value) if is_adm else value
    if name.endswith(("attention.qkv.weight", "attention.out.weight", "middle.1.qkv.weight", "middle.1.out.weight")):
        value = value.flatten(1)  # a 1x1 convolution
    if ".qkv." in name:  # rows (heads, channels, 3) instead of (3, heads, channels)
        value = value.view(-1, 3, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
    return value
