"""Weights of OpenAI's improved-diffusion and guided-diffusion (ADM) as our U-Net.

Source: Nichol & Dhariwal 2021 (arXiv 2102.09672); Dhariwal & Nichol 2021 (arXiv 2105.05233).
"""

import argparse
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from src.interop.diffusers_unet import TIME, swap_halves
from src.interop.imported import ImportedModel, check_weights, parse_flags

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


def read_openai(weights: Mapping[str, Tensor], flags: str) -> ImportedModel:
    """Return the model of a state dict and of the command line flags that OpenAI's README lists for it.

    The file shows widths, attention and classes; flags that contradict it are errors. It shows neither the image size
    nor the noise schedule, the number of steps and the heads of attention, which have OpenAI's defaults.

    Raises ValueError if a flag is unknown or contradicts the weights, or if the model is not one for sampling images.
    """
    typed = _parse(flags)
    _check_kind(weights, typed)
    try:
        inferred = _inferred_flags(weights)
    except KeyError as error:
        raise ValueError(f"init_from: the file has no {error.args[0]}; download it again, or choose another") from error
    _compare(typed, inferred)
    model = {"channels": weights["input_blocks.0.0.weight"].shape[1], **_network(typed, inferred)}
    variance = "fixed_small" if typed.get("sigma_small") else "fixed_large"
    diffusion = {
        "prediction": "x0" if typed.get("predict_xstart") else "eps",
        "variance": "learned_range" if inferred["learn_sigma"] else variance,
        "clip_x0": 1.0 if typed.get("clip_denoised", True) else None,
    }
    legacy = not typed.get("use_new_attention_order", False)
    ours, names = {}, {}
    for theirs, value in weights.items():
        if (name := _our_name(theirs, inferred["num_res_blocks"])) is None:
            raise ValueError(f"init_from: {theirs} is not a weight of this network; choose another file")
        names[name] = theirs
        ours[name] = _convert(name, value.float(), model["num_heads"], model["num_head_channels"], legacy)
    classes = weights["label_emb.weight"].shape[0] if inferred["class_cond"] else None
    schedule = _schedule(typed.get("noise_schedule", "linear"), typed.get("diffusion_steps", 1000))
    return check_weights(ImportedModel(model, schedule, diffusion, ours, classes), names)


def _check_kind(weights: Mapping[str, Tensor], typed: Mapping[str, Any]) -> None:
    """Raise ValueError for weights of another project, classifiers, upsamplers, and without --image_size."""
    if "input_blocks.0.0.weight" not in weights:
        raise ValueError(
            "init_from: the file has no input_blocks.0.0.weight; choose one of improved-diffusion or guided-diffusion"
        )
    if "out.2.weight" not in weights or not any(name.startswith("output_blocks.") for name in weights):
        raise ValueError("init_from: the file is a classifier or incomplete; choose one with a diffusion model")
    if "large_size" in typed or "small_size" in typed or weights["input_blocks.0.0.weight"].shape[1] == 6:
        raise ValueError("init_from: models that upsample images are not supported; choose one without --large_size")
    if "image_size" not in typed:
        raise ValueError("init_from.flags must have --image_size, which the file does not show; add --image_size 64")


def _network(typed: Mapping[str, Any], inferred: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of our U-Net without `channels`. Raises ValueError for heads that it does not have."""
    steps, width = typed.get("diffusion_steps", 1000), inferred["num_channels"]
    # The two projects differ in this default, which matters only if there are not 1000 steps.
    rescales = typed.get("rescale_timesteps", not any(name in typed for name in GUIDED_ONLY))
    time_scale = 1000.0 if rescales else float(steps)
    per_head, heads = typed.get("num_head_channels", -1), typed.get("num_heads", 4)
    if per_head == -1 and typed.get("num_heads_upsample", -1) not in (-1, heads):
        raise ValueError(
            f"init_from.flags: --num_heads_upsample {typed['num_heads_upsample']} must equal --num_heads {heads}; "
            "other values are not supported"
        )
    image_size, widths = typed["image_size"], [round(width * mult) for mult in inferred["channel_mult"]]
    attended = [*(c for i, c in enumerate(widths) if 2**i in inferred["attention"]), widths[-1]]
    name, divisor = ("num_heads", heads) if per_head == -1 else ("num_head_channels", per_head)
    if wrong := [c for c in attended if divisor < 1 or c % divisor]:
        raise ValueError(f"init_from.flags: --{name} {divisor} must divide {wrong[0]}, the channels of an attention")
    return {
        "image_size": image_size,
        "patch_size": 1,
        "model_channels": widths[0],
        "channel_mult": [c // widths[0] for c in widths],
        "num_res_blocks": inferred["num_res_blocks"],
        "attention_resolutions": [image_size // factor for factor in inferred["attention"]],
        "num_heads": heads,
        "num_head_channels": None if per_head == -1 else per_head,
        "time_conditioning": "scale_shift" if inferred["use_scale_shift_norm"] else "add",
        "resblock_updown": inferred["resblock_updown"],
        "dropout": typed.get("dropout", 0.0),
        "outputs": 2 if inferred["learn_sigma"] else 1,
        # Our time is (t + 1) / T, and their embedding sees t or 1000 t / T.
        "time_scale": time_scale,
        "time_offset": -time_scale / steps,
        "freq_shift": 0,
        "time_channels": None if width == widths[0] else width,
        "norm_groups": 32,
        "norm_eps": 1e-5,
        "downsample_padding": 1,
    }


def _parse(flags: str) -> dict[str, Any]:
    """Return the flags that were typed, without those that do not change the model."""
    parsers: dict[Any, str] = {
        int: "image_size num_channels num_res_blocks num_heads num_heads_upsample num_head_channels diffusion_steps "
        "large_size small_size",
        float: "dropout",
        _numbers: "channel_mult attention_resolutions",
        _boolean: "class_cond learn_sigma use_scale_shift_norm resblock_updown use_new_attention_order predict_xstart "
        "sigma_small rescale_timesteps clip_denoised",
        str: f"noise_schedule {IGNORED}",
    }
    kinds = {name: kind for kind, names in parsers.items() for name in names.split()}
    typed = parse_flags(flags, kinds, "these projects", "copy them from OpenAI's README")
    return {name: value for name, value in typed.items() if value != []}  # an empty list is the default


def _boolean(text: str) -> bool:
    values = dict.fromkeys(("yes", "true", "t", "y", "1"), True) | dict.fromkeys(("no", "false", "f", "n", "0"), False)
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} must be True or False")
    return values[text.lower()]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def _inferred_flags(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the flags that the shapes of the weights show; `attention` lists the downsampling factors with attention.

    Raises KeyError if weights are missing.
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


def _compare(typed: Mapping[str, Any], inferred: Mapping[str, Any]) -> None:
    """Raise ValueError if a flag contradicts the weights."""
    image_size, mult = typed["image_size"], inferred["channel_mult"]
    if "channel_mult" not in typed and (default := CHANNEL_MULT.get(image_size, mult)) != mult:
        raise ValueError(
            f"init_from.flags: --image_size {image_size} stands for --channel_mult {_listed(default)}, but the file "
            f"has {_listed(mult)}; correct --image_size, or add --channel_mult {_listed(mult)}"
        )
    expected = {**inferred, "attention_resolutions": [float(image_size // factor) for factor in inferred["attention"]]}
    if "attention_resolutions" in typed:  # they ignore resolutions without a stage
        factors = {image_size // int(r) for r in typed["attention_resolutions"]}
        if factors & {2**i for i in range(len(mult))} == {*inferred["attention"]}:
            del expected["attention_resolutions"]
    for name, value in expected.items():
        if name in typed and typed[name] != value:
            flag, has = (_listed(v) if isinstance(v, list) else v for v in (typed[name], value))
            raise ValueError(
                f"init_from.flags: --{name} {flag} contradicts the file, which has {has}; correct --{name}, or leave "
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


def _convert(name: str, value: Tensor, num_heads: int, num_head_channels: int | None, legacy: bool) -> Tensor:
    """Return a weight in our layout; `name` is ours."""
    if name == TIME:
        return swap_halves(value)
    if name.endswith(("qkv.weight", "attention.out.weight", "middle.1.out.weight")):
        value = value.flatten(1)  # a convolution with one tap
    if legacy and ".qkv." in name:  # rows (heads, 3, channels) instead of (3, heads, channels)
        heads = num_heads if num_head_channels is None else value.shape[0] // 3 // num_head_channels
        value = value.view(heads, 3, -1, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
    return value
