"""Write a model as a pipeline folder of the diffusers library, which samples it without this project.

A folder has the network as `UNet2DModel` or `DiTTransformer2DModel`, a scheduler with our betas, and
`model_index.json`. Unconditional U-Nets whose sampler steps along rows of the schedule use pipelines of diffusers.
Others bring the file `unet_pipeline.py`.
"""

import importlib.metadata
import inspect
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.export import ExportedProgram

from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.guidance import Guidance
from src.diffusion.noise import DefaultSpacing, Schedule, Spacing, make_time_grid
from src.interop import diffusers_dit
from src.interop.diffusers_pipeline import WEIGHTS
from src.interop.diffusers_samplers import diffusers
from src.interop.diffusers_schedulers import DDIM, DDPM, DPM, OTHER_FORMAT, method_of, sampler_function, scheduler_of
from src.interop.diffusers_unet import config_of, to_diffusers
from src.interop.torch_export import example_inputs, trace, write_network
from src.models.conditioning import ClassEmbedding, TextTransformer
from src.models.dit import DiT
from src.models.unet import UNet

CODE = "unet_pipeline"


class Pipeline(NamedTuple):
    """The contents of a folder of diffusers."""

    network: nn.Module
    program: ExportedProgram | None
    """The traced network, in place of a model of diffusers."""
    config: dict[str, Any] | None
    """The configuration of the model of diffusers."""
    weights: dict[str, Tensor]
    scheduler: dict[str, Any]
    model_index: dict[str, Any]
    call: dict[str, Any]
    """Arguments with which the pipeline samples as our sampler does."""
    channels: int
    """Of the images."""

    @property
    def is_custom(self) -> bool:
        """Whether the folder contains the code of its pipeline."""
        return isinstance(self.model_index["_class_name"], list)


class Latents(NamedTuple):
    """The autoencoder that decodes the samples of a pipeline: its class in diffusers, and the channels of its images.

    Its latents are x / scale + shift, both one number per channel.
    """

    kind: str
    channels: int
    scale: Sequence[float]
    shift: Sequence[float]


def make_pipeline(
    net: nn.Module,
    model: Mapping[str, Any],
    diffusion: GaussianDiffusion,
    schedule: Schedule,
    sampler: Callable[..., Any],
    steps: int,
    spacing: Spacing | DefaultSpacing,
    encode: Mapping[str, Any] | None = None,
    guidance: Guidance | None = None,
    latents: Latents | None = None,
) -> Pipeline:
    """Return the pipeline of a network with the arguments `model`, which samples as `sampler` does.

    `encode` has the settings of the encoder of its conditions, such as the names of classes. `latents` is for a network
    of latents, whose autoencoder the caller writes into the folder `vae`. Raises ValueError, naming
    the setting, for what diffusers does not have.
    """
    model = {name: each.default for name, each in inspect.signature(type(net)).parameters.items()} | dict(model)
    config, weights = _network(net, model, diffusion.outputs)
    if isinstance(spacing, DefaultSpacing):
        spacing = spacing.on(schedule)
    method = method_of(sampler)
    grid = make_time_grid(schedule, steps, spacing)
    scheduler, levels = scheduler_of(method, diffusion, grid, spacing, model, sampler_function(sampler) is diffusers)
    name, learned = scheduler["_class_name"], scheduler.get("variance_type") == "learned_range"
    version = {"_diffusers_version": importlib.metadata.version("diffusers")}
    index: dict[str, Any] = {"_class_name": "DDIMPipeline" if name == DDIM else "DDPMPipeline", **version}
    call: dict[str, Any] = {} if levels else {"num_inference_steps": steps}
    if method.eta and name == DDIM:
        call["eta"] = method.eta
    is_stock = name in (DDPM, DDIM, DPM) and levels is None and (diffusion.outputs == 1 or learned)
    # In the last of fewer steps than T, DDPMPipeline adds noise unless its variance is that of the posterior.
    is_stock &= scheduler.get("variance_type", "fixed_small") == "fixed_small" or steps == schedule.num_steps
    component = component_of(config)
    is_stock &= component == "unet" and model["patch_size"] == 1
    if not is_stock or encode is not None or latents is not None:
        index["_class_name"] = [CODE, "UNetPipeline"]
        index |= {"patch_size": model["patch_size"] if config and component == "unet" else 1, "levels": levels}
        index["sigma_data"] = diffusion.sigma_data if diffusion.prediction == "edm" else None
        if encode is not None:
            index |= _condition(encode, model, config is None)
            index["guidance_scale"] = _check_guidance(guidance or Guidance()).scale
        if latents is not None:
            index["vae"] = ["diffusers", latents.kind]
            scaling = {"scale": latents.scale, "shift": latents.shift}
            index["latents"] = {k: {str(c): x for c, x in enumerate(each)} for k, each in scaling.items()}
    elif name == DDIM:
        call["use_clipped_model_output"] = True
    index |= {component: ["diffusers", config["_class_name"]] if config else [None, None]}
    index |= {"scheduler": ["diffusers", name]}
    program, channels = None, model["channels"] if latents is None else latents.channels
    if config is None:
        program = trace(net, _inputs(index["text"], 2))
    config = config and config | version
    return Pipeline(net, program, config, weights, scheduler | version, index, call, channels)


def component_of(config: Mapping[str, Any] | None) -> str:
    """Return the name in a pipeline of the model of diffusers with this configuration."""
    return "transformer" if config and config["_class_name"] == diffusers_dit.CLASS_NAMES[0] else "unet"


def write_pipeline(folder: Path, pipeline: Pipeline) -> None:
    """Write the files of a pipeline into a folder."""
    _write_json(folder / "scheduler" / "scheduler_config.json", pipeline.scheduler)
    if pipeline.program is not None:
        checks = [_inputs(pipeline.model_index["text"], batch) for batch in (1, 3)]
        write_network(folder, "torch_export", pipeline.program, pipeline.network, checks)
    if pipeline.config is not None:
        component = folder / component_of(pipeline.config)
        _write_json(component / "config.json", pipeline.config)
        weights = {name: value.contiguous() for name, value in pipeline.weights.items()}
        (component / f"{WEIGHTS}.safetensors").write_bytes(save(weights, {"format": "pt"}))
    if pipeline.is_custom:
        shutil.copyfile(Path(__file__).with_name("diffusers_pipelines") / f"{CODE}.py", folder / f"{CODE}.py")
    _write_json(folder / "model_index.json", pipeline.model_index)


def sampling_code(pipeline: Pipeline, folder: str) -> str:
    """Return lines of Python that sample from the pipeline in `folder`, importing only torch and diffusers."""
    trust = ", trust_remote_code=True" if pipeline.is_custom else ""
    arguments = {"batch_size": 16, **pipeline.call}
    is_image = pipeline.channels in (1, 3)
    lines = [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(folder)}{trust})",
        "generator = torch.Generator().manual_seed(0)",
        "images = pipeline(",
        f"    {', '.join(f'{k}={v}' for k, v in arguments.items())}, generator=generator"
        + ("" if is_image else ', output_type="pt"')
        + _hint(pipeline.model_index),
        ").images",
    ]
    save = ["for k, image in enumerate(images):", '    image.save(f"sample{k}.png")']
    return "\n".join([*lines, *(save if is_image else ['torch.save(images, "samples.pt")'])])


def _hint(index: Mapping[str, Any]) -> str:
    """Return a comment that names the arguments of a conditional pipeline; nothing for others."""
    if names := index.get("id2label"):
        return f",  # class_labels={[names['0']]}, guidance_scale=2.0"
    return f",  # prompt={index['text']['prompts']['0']!r}, guidance_scale=2.0" if index.get("text") else ""


def _inputs(text: Mapping[str, Any], batch: int) -> tuple[Tensor, ...]:
    """Return inputs of a network with text, to trace and to check it."""
    tokens = torch.ones(1, text["max_length"], dtype=torch.int64)
    return example_inputs(tuple(text["shape"].values()), tokens, batch)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _network(net: nn.Module, model: Mapping[str, Any], outputs: int) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Return the configuration and weights as a model of diffusers, whose U-Net sees patches as channels.

    Return None for text. Raises ValueError if it is not such a network.
    """
    if not isinstance(net, UNet | DiT):
        raise ValueError(f"model._target_={type(net).__name__} is not a network of diffusers; {OTHER_FORMAT}")
    size, patch, condition = model["image_size"], model["patch_size"], net.condition
    sides = [size] * 2 if isinstance(size, int) else list(size)
    if isinstance(condition, TextTransformer) and len(sides) == 2:
        return None, {}
    if isinstance(net, UNet) and (len(sides) != 2 or any(side % net.factor for side in sides)):
        raise ValueError(
            f"model.image_size={size} must be two sides that {net.factor} divides for format=diffusers; {OTHER_FORMAT}"
        )
    if condition is not None and not isinstance(condition, ClassEmbedding):
        raise ValueError(
            f"conditioning.embed={type(condition).__name__} is not part of a pipeline, which has classes and text; "
            f"{OTHER_FORMAT}"
        )
    rows = None if condition is None else condition.table.num_embeddings
    if isinstance(net, DiT):
        config = diffusers_dit.config_of(model, outputs, rows and rows - 1)
        weights = diffusers_dit.to_diffusers(net.state_dict(), model, outputs)
        return {"_class_name": diffusers_dit.CLASS_NAMES[0], **config}, weights
    smaller = [side // patch for side in sides]
    seen = {
        **model,
        "patch_size": 1,
        "channels": model["channels"] * patch**2,
        "image_size": smaller[0] if isinstance(size, int) else smaller,
    }
    unet = {"_class_name": "UNet2DModel", **config_of(seen, outputs, rows)}
    return unet, to_diffusers(net.state_dict(), seen)


def _condition(encode: Mapping[str, Any], model: Mapping[str, Any], is_text: bool) -> dict[str, Any]:
    """Return the settings of conditions in model_index.json, without lists, which diffusers takes for components."""
    if not is_text:
        return {"id2label": {str(k): str(name) for k, name in enumerate(encode["names"])}}
    size = model["image_size"]
    height, width = [size] * 2 if isinstance(size, int) else size
    text = {name: encode[name] for name in ("tokenizer", "max_length")}
    text |= {"time_scale": model["time_scale"], "prompts": {str(k): x for k, x in enumerate(encode["examples"])}}
    return {"text": {**text, "shape": {"channels": model["channels"], "height": height, "width": width}}}


def _check_guidance(guidance: Guidance) -> Guidance:
    """Return `guidance`. Raises ValueError for settings that the pipeline does not have."""
    defaults = Guidance()
    for name, fix in (("interval", "[0,inf]"), ("rescale", "0")):
        value = getattr(guidance, name)
        if guidance.scale != 1 and value != getattr(defaults, name):
            raise ValueError(f"guidance.{name}={value} is not part of the pipeline; add guidance.{name}={fix}")
    return guidance
