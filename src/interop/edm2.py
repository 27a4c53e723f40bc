"""Weights of EDM2 (Karras et al. 2024, arXiv 2312.02696) as our `UNetEDM2`.

Its pickles contain code, and `src.interop.edm.CONVERT` turns one into safetensors in a checkout of EDM2.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from src.errors import first_names
from src.interop.edm import SIGMA_MAX, SIGMA_MIN, edm_process, read_arguments
from src.interop.imported import ImportedModel, check_weights
from src.models.unet_edm2 import UNetEDM2, normalize

OURS = {
    "img_channels": "channels",
    "img_resolution": "image_size",
    "model_channels": "model_channels",
    "channel_mult": "channel_mult",
    "num_blocks": "num_res_blocks",
    "attn_resolutions": "attention_resolutions",
    "channels_per_head": "num_head_channels",
    "dropout": "dropout",
    "res_balance": "residual_balance",
    "attn_balance": "attention_balance",
    "concat_balance": "skip_balance",
    "label_balance": "condition_balance",
    "clip_act": "clip",
}
"""Our arguments by those of EDM2, with equal defaults."""
REQUIRED = {"channel_mult_noise": (None, 1), "resample_filter": ([1, 1],)}
IGNORED = {"use_fp16", "sigma_data", "logvar_channels", "label_dim", "channel_mult_emb"}

BLOCK = {
    "conv_res0": "conv1",
    "conv_res1": "conv2",
    "conv_skip": "shortcut",
    "emb_linear": "emb",
    "attn_qkv": "qkv",
    "attn_proj": "out",
}
TOP = {
    "emb_fourier.freqs": "fourier.frequency",
    "emb_fourier.phases": "fourier.phase",
    "emb_noise.weight": "noise.weight",
    "emb_label.weight": "condition.table.weight",
    "out_conv.weight": "conv_out.weight",
    "out_gain": "gain_out",
}


def read_edm2(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> ImportedModel:
    """Return the model of the tensors and metadata that `CONVERT` writes for a network of EDM2, in its class `Precond`.

    Raises ValueError if the network has parts that our network does not have.
    """
    _, kwargs = read_arguments(metadata)
    if unknown := sorted(kwargs.keys() - OURS.keys() - REQUIRED.keys() - IGNORED):
        raise ValueError(f"init_from: EDM2's network with {first_names(unknown)} is not supported; choose another file")
    mult = kwargs.get("channel_mult", [1, 2, 3, 4])
    for name, values in {**REQUIRED, "channel_mult_emb": (None, max(mult))}.items():
        if kwargs.get(name, values[0]) not in values:
            raise ValueError(
                f"init_from: EDM2's network with {name}={kwargs[name]} is not supported; choose one with {values[-1]}"
            )
    model = {ours: kwargs[theirs] for theirs, ours in OURS.items() if theirs in kwargs}
    # The network sees c_noise = log(sigma) / 4.
    model |= {"time_scale": math.log(SIGMA_MAX / SIGMA_MIN) / 4, "time_offset": math.log(SIGMA_MIN) / 4, "outputs": 1}
    ours, names = {}, {}
    for name, value in weights.items():
        if name.startswith("logvar_"):  # the uncertainty of the training loss
            continue
        theirs = name.removeprefix("unet.")
        renamed = TOP.get(theirs) or _our_name(theirs, model["image_size"], len(mult), kwargs.get("num_blocks", 3))
        names[renamed] = name
        value = value.float()
        if ".qkv." in renamed:  # rows (heads, channels, 3) instead of (3, heads, channels)
            value = value.view(-1, 3, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
        if renamed == "condition.table.weight":  # of one-hot labels, which sqrt(label_dim) multiplies
            value = normalize(value).T
        ours[renamed] = value.reshape(()) if renamed.endswith("gain") or renamed == "gain_out" else value
    schedule, diffusion = edm_process(kwargs.get("sigma_data", 0.5))
    classes = kwargs.get("label_dim", 0) or None
    imported = ImportedModel(model, schedule, diffusion, ours, classes, sampler="heun", network=UNetEDM2)
    return check_weights(imported, names)


def _our_name(theirs: str, image_size: int, num_stages: int, num_blocks: int) -> str:
    """Return our name of a weight of the encoder or decoder, or `theirs` if it belongs to neither."""
    way, _, rest = theirs.partition(".")
    block, _, leaf = rest.partition(".")
    if way not in ("enc", "dec"):
        return theirs
    if block.endswith("_conv"):
        return f"conv_in.{leaf}"
    part, _, kind = leaf.partition(".")
    leaf = "emb_gain" if part == "emb_gain" else f"{BLOCK.get(part, part)}.{kind}"
    side, _, place = block.partition("_")
    stage = round(math.log2(image_size / int(side.partition("x")[0])))
    if place.startswith("in"):
        return f"middle.{place[2:]}.{leaf}"
    number = -1 if place in ("down", "up") else int(place.removeprefix("block"))
    if way == "enc":
        return f"down.{stage * (num_blocks + 1) + number}.{leaf}"
    return f"up.{(num_stages - 1 - stage) * (num_blocks + 2) + number}.{leaf}"
