"""Weights of OpenAI's improved-diffusion and guided-diffusion (ADM) as our U-Net.

Source: Nichol & Dhariwal 2021 (arXiv 2102.09672); Dhariwal & Nichol 2021 (arXiv 2105.05233).
"""

import argparse
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.errors import did_you_mean
from src.interop.diffusers_unet import swap_halves
from src.interop.imported import ImportedModel
from src.interop.weights import check_fit

TOP = {
    "time_embed.0": "time.linear1",
    "time_embed.2": "time.linear2",
    "label_emb": "condition.table",
    "input_blocks.0.0": "conv_in",
    "out.0": "norm_out",
    "out.2": "conv_out",
}
RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "emb",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "shortcut",
}
ATTENTION = {"norm": "norm", "qkv": "qkv", "proj_out": "out"}
RESAMPLE = {"op": "conv", "conv": "conv"}
PARTS = RESIDUAL | ATTENTION | RESAMPLE

# The channel multipliers of an image size, unless the flags have others.
CHANNEL_MULT: dict[int, list[float]] = {
    32: [1, 2, 2, 2],
    64: [1, 2, 3, 4],
    128: [1, 1, 2, 3, 4],
    256: [1, 1, 2, 2, 4, 4],
    512: [0.5, 1, 1, 2, 2, 4, 4],
}
GUIDED_ONLY = ("num_head_channels", "channel_mult", "resblock_updown", "use_fp16", "use_new_attention_order")
"""Flags of guided-diffusion that improved-diffusion does not have."""
IGNORED = (
    "anneal_lr base_samples batch_size classifier_attention_resolutions classifier_depth classifier_path "
    "classifier_pool classifier_resblock_updown classifier_scale classifier_use_fp16 classifier_use_scale_shift_norm "
    "classifier_width data_dir ema_rate fp16_scale_growth iterations log_interval lr lr_anneal_steps microbatch "
    "model_path num_samples rescale_learned_sigmas resume_checkpoint save_interval schedule_sampler timestep_respacing "
    "use_checkpoint use_ddim use_fp16 use_kl weight_decay"
)
"""Flags of training and sampling, which do not change the model."""


def is_openai(weights: Mapping[str, Tensor]) -> bool:
    """Return whether weights have the names of improved-diffusion and guided-diffusion."""
    return "input_blocks.0.0.weight" in weights


def read_pt(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.pt` file, a zip archive or an older pickle, without running code from it.

    Raises:
        ValueError: If the file holds anything but named tensors.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # untrusted bytes can raise anything
        raise ValueError(
            f"init_from={path} must be a file of torch.save that holds tensors only; download it again, or save its "
            "state_dict() alone"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"init_from={path} must hold named tensors only; save the state_dict() of the model alone")
    return {str(name): value for name, value in weights.items()}


def read_openai(weights: Mapping[str, Tensor], flags: str) -> ImportedModel:
    """Return the model of a state dict and of the command line flags that OpenAI's README lists for it.

    The file shows widths, attention and classes; flags that contradict it are errors. It shows neither the image size
    nor the noise schedule, the number of steps and the heads of attention, which have OpenAI's defaults.

    Raises:
        ValueError: If a flag is unknown or contradicts the weights, or if the model is not one for sampling images.
    """
    given = _parse(flags)
    if not is_openai(weights):
        raise ValueError(
            "init_from: the file has no input_blocks.0.0.weight; choose one of improved-diffusion or guided-diffusion"
        )
    if "out.2.weight" not in weights or not any(name.startswith("output_blocks.") for name in weights):
        raise ValueError("init_from: the file is a classifier or incomplete; choose one with a diffusion model")
    if "large_size" in given or "small_size" in given or weights["input_blocks.0.0.weight"].shape[1] == 6:
        raise ValueError("init_from: models that upsample images are not supported; choose one without --large_size")
    if "image_size" not in given:
        raise ValueError("init_from.flags must have --image_size, which the file does not show; add --image_size 64")
    try:
        shown = _shown(weights)
    except KeyError as error:
        raise ValueError(f"init_from: the file has no {error.args[0]}; it is incomplete or another network") from error
    _compare(given, shown)

    steps, width = given.get("diffusion_steps", 1000), shown["num_channels"]
    # The two projects differ in this default, which matters only if there are not 1000 steps.
    rescales = given.get("rescale_timesteps", not any(name in given for name in GUIDED_ONLY))
    time_scale = 1000.0 if rescales else float(steps)
    per_head, heads = given.get("num_head_channels", -1), given.get("num_heads", 4)
    if per_head == -1 and given.get("num_heads_upsample", -1) not in (-1, heads):
        raise ValueError(
            f"init_from.flags: --num_heads_upsample {given['num_heads_upsample']} must equal --num_heads {heads}; "
            "other values are not supported"
        )
    image_size, widths = given["image_size"], [round(width * mult) for mult in shown["channel_mult"]]
    attended = [*(c for i, c in enumerate(widths) if 2**i in shown["attention"]), widths[-1]]
    name, divisor = ("num_heads", heads) if per_head == -1 else ("num_head_channels", per_head)
    if wrong := [c for c in attended if divisor < 1 or c % divisor]:
        raise ValueError(f"init_from.flags: --{name} {divisor} must divide {wrong[0]}, the channels of an attention")

    model = {
        "channels": weights["input_blocks.0.0.weight"].shape[1],
        "image_size": image_size,
        "patch_size": 1,
        "model_channels": widths[0],
        "channel_mult": [c // widths[0] for c in widths],
        "num_res_blocks": shown["num_res_blocks"],
        "attention_resolutions": [image_size // factor for factor in shown["attention"]],
        "num_heads": heads,
        "num_head_channels": None if per_head == -1 else per_head,
        "time_conditioning": "scale_shift" if shown["use_scale_shift_norm"] else "add",
        "resblock_updown": shown["resblock_updown"],
        "dropout": given.get("dropout", 0.0),
        "outputs": 2 if shown["learn_sigma"] else 1,
        # Our time is (t + 1) / T, and their embedding sees t or 1000 t / T.
        "time_scale": time_scale,
        "time_offset": -time_scale / steps,
        "freq_shift": 0,
        "time_channels": None if width == widths[0] else width,
        "norm_groups": 32,
        "norm_eps": 1e-5,
        "downsample_padding": 1,
    }
    variance = "fixed_small" if given.get("sigma_small") else "fixed_large"
    diffusion = {
        "prediction": "x0" if given.get("predict_xstart") else "eps",
        "variance": "learned_range" if shown["learn_sigma"] else variance,
        "clip_x0": 1.0 if given.get("clip_denoised", True) else None,
    }
    legacy = not given.get("use_new_attention_order", False)
    ours, names = {}, {}
    for theirs, value in weights.items():
        if (renamed := _our_name(theirs, shown["num_res_blocks"])) is None:
            raise ValueError(f"init_from: the file has weights for no layer of this network: {theirs}")
        names[renamed] = theirs
        ours[renamed] = _convert(renamed, value.float(), heads if per_head == -1 else None, per_head, legacy)
    classes = weights["label_emb.weight"].shape[0] if shown["class_cond"] else None
    schedule = _schedule(given.get("noise_schedule", "linear"), steps)
    return check_fit(ImportedModel(model, schedule, diffusion, ours, classes), names)


def _parse(flags: str) -> dict[str, Any]:
    """Return the flags that were typed, without those that do not change the model."""
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS
    )
    parsers: dict[Any, str] = {
        int: "image_size num_channels num_res_blocks num_heads num_heads_upsample num_head_channels diffusion_steps "
        "large_size small_size",
        float: "dropout",
        _numbers: "channel_mult attention_resolutions",
        _boolean: "class_cond learn_sigma use_scale_shift_norm resblock_updown use_new_attention_order predict_xstart "
        "sigma_small rescale_timesteps clip_denoised",
        str: f"noise_schedule {IGNORED}",
    }
    known = [(name, kind) for kind, names in parsers.items() for name in names.split()]
    for name, kind in known:
        parser.add_argument(f"--{name}", type=kind)
    try:
        parsed, unknown = parser.parse_known_args(shlex.split(flags))
    except (argparse.ArgumentError, ValueError) as error:
        raise ValueError(
            f"init_from.flags={flags!r} cannot be read: {error}; copy them from OpenAI's README"
        ) from error
    if unknown:
        flag = unknown[0].partition("=")[0]
        hint = did_you_mean(flag, [f"--{name}" for name, _ in known])
        raise ValueError(f"init_from.flags: {flag} is not a flag of these projects; {hint}")
    return {name: value for name, value in vars(parsed).items() if value != []}  # an empty list is the default


def _boolean(text: str) -> bool:
    values = dict.fromkeys(("yes", "true", "t", "y", "1"), True) | dict.fromkeys(("no", "false", "f", "n", "0"), False)
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} must be True or False")
    return values[text.lower()]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def _shown(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the flags that the shapes of the weights show; `attention` lists the downsampling factors with attention.

    Raises:
        KeyError: If weights are missing.
    """
    ends = re.compile(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers\.0)\.weight")  # upsampling ends a stage
    blocks = {int(name.split(".")[1]) for name in weights if name.startswith("output_blocks.")}
    per_stage = 1 + min((int(end[1]) for name in weights if (end := ends.fullmatch(name))), default=max(blocks))
    firsts = [1 + i * per_stage for i in range(len(blocks) // per_stage)]
    width = weights["time_embed.0.weight"].shape[1]
    channels, first = weights["input_blocks.0.0.weight"].shape[1], "input_blocks.1.0"
    widths = [weights[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0] for i in firsts]
    return {
        "num_channels": width,
        "num_res_blocks": per_stage - 1,
        "channel_mult": [c / width for c in widths],
        "attention": [2**i for i, first in enumerate(firsts) if f"input_blocks.{first}.1.qkv.weight" in weights],
        "class_cond": "label_emb.weight" in weights,
        "learn_sigma": weights["out.2.weight"].shape[0] == 2 * channels,
        "use_scale_shift_norm": weights[f"{first}.emb_layers.1.weight"].shape[0] == 2 * widths[0],
        "resblock_updown": f"input_blocks.{per_stage}.0.op.weight" not in weights,
    }


def _compare(given: Mapping[str, Any], shown: Mapping[str, Any]) -> None:
    """Raise ValueError if a flag contradicts the weights."""
    image_size, mult = given["image_size"], shown["channel_mult"]
    if "channel_mult" not in given and (default := CHANNEL_MULT.get(image_size, mult)) != mult:
        raise ValueError(
            f"init_from.flags: --image_size {image_size} stands for --channel_mult {_listed(default)}, but the file "
            f"has {_listed(mult)}; correct --image_size, or add --channel_mult {_listed(mult)}"
        )
    shown = {**shown, "attention_resolutions": [float(image_size // factor) for factor in shown["attention"]]}
    asked = dict(given)
    if "attention_resolutions" in given:  # they ignore resolutions without a stage
        factors = [image_size // int(r) for r in given["attention_resolutions"]]
        if {f for f in factors if f in [2**i for i in range(len(mult))]} == {*shown["attention"]}:
            del asked["attention_resolutions"]
    for name, value in shown.items():
        if name in asked and asked[name] != value:
            typed, has = (_listed(v) if isinstance(v, list) else v for v in (asked[name], value))
            raise ValueError(
                f"init_from.flags: --{name} {typed} contradicts the file, which has {has}; correct --{name}, or leave "
                "it out"
            )


def _listed(numbers: list[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def _schedule(name: str, steps: int) -> dict[str, Any]:
    """Return the node of a noise schedule; theirs of these names are the same as ours."""
    nodes: dict[str, dict[str, Any]] = {
        "linear": {"beta_start": 1e-4, "beta_end": 0.02, "max_beta": 0.999},
        "cosine": {"offset": 0.008, "max_beta": 0.999},
    }
    if name not in nodes:
        raise ValueError(f"init_from.flags: --noise_schedule {name} must be linear or cosine")
    return {"_target_": f"src.diffusion.schedules.{name}", "num_steps": steps, **nodes[name]}


def _our_name(theirs: str, num_res_blocks: int) -> str | None:
    """Return our name of a weight, or None if it is not part of the network."""
    module, _, leaf = theirs.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{leaf}"
    match = re.fullmatch(r"(middle_block|(?:input|output)_blocks\.(\d+))\.(\d)\.(.+)", module)
    if match is None or match[4] not in PARTS:
        return None
    part, place = f"{PARTS[match[4]]}.{leaf}", int(match[3])
    if match[2] is None:
        return f"middle.{place}.{part}"
    i, per_stage = int(match[2]), num_res_blocks + 1
    layer = "attention" if match[4] in ATTENTION else "residual"
    if match[1].startswith("input"):
        return f"down.{i - 1}.{part}" if i % per_stage == 0 else f"down.{i - 1}.{layer}.{part}"
    i += i // per_stage  # the upsampling of earlier stages
    return f"up.{i + 1}.{part}" if place > 0 and layer == "residual" else f"up.{i}.{layer}.{part}"


def _convert(name: str, value: Tensor, heads: int | None, per_head: int, legacy: bool) -> Tensor:
    """Return a weight in our layout; `name` is ours."""
    if name == "time.linear1.weight":
        return swap_halves(value)
    if name.endswith(("qkv.weight", "attention.out.weight", "middle.1.out.weight")):
        value = value.flatten(1)  # a convolution with one tap
    if legacy and ".qkv." in name:  # rows (heads, 3, channels) instead of (3, heads, channels)
        count = heads or value.shape[0] // 3 // per_head
        value = value.view(count, 3, -1, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
    return value
