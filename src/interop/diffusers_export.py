"""Write a model as a pipeline folder of the diffusers library, which samples it without this project.

A folder has the network as `UNet2DModel`, a scheduler with our betas, and `model_index.json`. Unconditional networks
whose sampler steps along rows of the schedule use pipelines of diffusers. Others bring the file `unet_pipeline.py`.
"""

import functools
import importlib.metadata
import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.export import ExportedProgram

from src.diffusion import samplers
from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.guidance import Guidance
from src.diffusion.noise import DefaultSpacing, NoiseSchedule, Schedule, Spacing, TimeGrid, make_time_grid
from src.interop.diffusers_samplers import diffusers
from src.interop.diffusers_unet import config_of, to_diffusers
from src.interop.torch_export import example_inputs, trace, write_network
from src.models.conditioning import ClassEmbedding, TextTransformer
from src.models.unet import UNet

TARGETS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction", "edm": "sample"}
"""The names in diffusers of targets; `UNetPipeline` converts that of EDM."""
OTHER_FORMAT = "use format=torch_export"

DDPM, DDIM, DPM = "DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"
EULER, HEUN, FLOW = "EulerDiscreteScheduler", "HeunDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"
COMMON = {"timestep_spacing": "trailing", "steps_offset": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    DDPM: {**COMMON, "rescale_betas_zero_snr": False},
    DDIM: {**COMMON, "rescale_betas_zero_snr": False, "set_alpha_to_one": True},
    DPM: {**COMMON, "solver_type": "midpoint", "lower_order_final": True, "final_sigmas_type": "zero"},
    EULER: {**COMMON, "interpolation_type": "linear", "final_sigmas_type": "zero"},
    HEUN: COMMON,
    FLOW: {"shift": 1.0},
}
"""Settings of schedulers with the values that our samplers have."""

CODE = "unet_pipeline"
NO_LIMIT = 1e30
MAX_RATIO = 250.0
"""Above this sigma / alpha, schedulers that store x / alpha in float32 differ from our samples by more than 1e-4."""


class Method(NamedTuple):
    """A sampler in the terms of diffusers."""

    scheduler: str
    eta: float = 0.0
    """The noise of DDIM, or of DPM-Solver++, which has 0 and 1."""
    order: int = 2
    """The order of DPM-Solver++."""


class Pipeline(NamedTuple):
    """The contents of a folder of diffusers."""

    network: nn.Module
    program: ExportedProgram | None
    """The traced network, in place of a UNet2DModel."""
    unet: dict[str, Any] | None
    """The configuration of the UNet2DModel."""
    weights: dict[str, Tensor]
    scheduler: dict[str, Any]
    model_index: dict[str, Any]
    call: dict[str, Any]
    """Arguments with which the pipeline samples as our sampler does."""
    channels: int

    @property
    def is_custom(self) -> bool:
        """Whether the folder contains the code of its pipeline."""
        return isinstance(self.model_index["_class_name"], list)


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
) -> Pipeline:
    """Return the pipeline of a network with the arguments `model`, which samples as `sampler` does.

    `encode` has the settings of the encoder of its conditions, such as the names of classes. Raises ValueError, naming
    the setting, for what diffusers does not have.
    """
    model = {name: each.default for name, each in inspect.signature(UNet).parameters.items()} | dict(model)
    unet, weights = _unet_2d(net, model, diffusion.outputs)
    if isinstance(spacing, DefaultSpacing):
        spacing = spacing.on(schedule)
    method = _method(sampler)
    grid = make_time_grid(schedule, steps, spacing)
    scheduler, levels = _scheduler(method, diffusion, grid, spacing, model, _function(sampler) is diffusers)
    name, learned = scheduler["_class_name"], scheduler.get("variance_type") == "learned_range"
    version = {"_diffusers_version": importlib.metadata.version("diffusers")}
    index: dict[str, Any] = {"_class_name": "DDIMPipeline" if name == DDIM else "DDPMPipeline", **version}
    call: dict[str, Any] = {} if levels else {"num_inference_steps": steps}
    if method.eta and name == DDIM:
        call["eta"] = method.eta
    is_stock = name in (DDPM, DDIM, DPM) and levels is None and (diffusion.outputs == 1 or learned)
    # In the last of fewer steps than T, DDPMPipeline adds noise unless its variance is that of the posterior.
    is_stock &= scheduler.get("variance_type", "fixed_small") == "fixed_small" or steps == schedule.num_steps
    if not is_stock or encode is not None or model["patch_size"] > 1:
        index["_class_name"] = [CODE, "UNetPipeline"]
        index |= {"patch_size": model["patch_size"] if unet else 1, "levels": levels}
        index["sigma_data"] = diffusion.sigma_data if diffusion.prediction == "edm" else None
        if encode is not None:
            index |= _condition(encode, model, unet is None)
            index["guidance_scale"] = _check_guidance(guidance or Guidance()).scale
    elif name == DDIM:
        call["use_clipped_model_output"] = True
    index |= {"unet": ["diffusers", "UNet2DModel"] if unet else [None, None], "scheduler": ["diffusers", name]}
    program = None
    if unet is None:
        program = trace(net, _inputs(index["text"], 2))
    return Pipeline(net, program, unet and unet | version, weights, scheduler | version, index, call, model["channels"])


def write_pipeline(folder: Path, pipeline: Pipeline) -> None:
    """Write the files of a pipeline into a folder."""
    _write_json(folder / "scheduler" / "scheduler_config.json", pipeline.scheduler)
    if pipeline.program is not None:
        checks = [_inputs(pipeline.model_index["text"], batch) for batch in (1, 3)]
        write_network(folder, "torch_export", pipeline.program, pipeline.network, checks)
    if pipeline.unet is not None:
        _write_json(folder / "unet" / "config.json", pipeline.unet)
        weights = {name: value.contiguous() for name, value in pipeline.weights.items()}
        (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(save(weights, {"format": "pt"}))
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
        + ("" if is_image else ', output_type="pt"'),
        ").images",
    ]
    save = ["for k, image in enumerate(images):", '    image.save(f"sample{k}.png")']
    return "\n".join([*lines, *(save if is_image else ['torch.save(images, "samples.pt")'])])


def _inputs(text: Mapping[str, Any], batch: int) -> tuple[Tensor, ...]:
    """Return inputs of a network with text, to trace and to check it."""
    tokens = torch.ones(1, text["max_length"], dtype=torch.int64)
    return example_inputs(tuple(text["shape"].values()), tokens, batch)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _unet_2d(net: nn.Module, model: Mapping[str, Any], outputs: int) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Return the configuration and weights as a UNet2DModel, which sees patches as channels; None for text.

    Raises ValueError if it is not such a network.
    """
    if not isinstance(net, UNet):
        raise ValueError(f"model._target_={type(net).__name__} is not a U-Net of diffusers; {OTHER_FORMAT}")
    size, patch, condition = model["image_size"], model["patch_size"], net.condition
    sides = [size] * 2 if isinstance(size, int) else list(size)
    if isinstance(condition, TextTransformer) and len(sides) == 2:
        return None, {}
    if len(sides) != 2 or any(side % net.factor for side in sides):
        raise ValueError(
            f"model.image_size={size} must be two sides that {net.factor} divides for format=diffusers; {OTHER_FORMAT}"
        )
    if condition is not None and not isinstance(condition, ClassEmbedding):
        raise ValueError(
            f"conditioning.embed={type(condition).__name__} is not part of a pipeline, which has classes and text; "
            f"{OTHER_FORMAT}"
        )
    smaller = [side // patch for side in sides]
    seen = {
        **model,
        "patch_size": 1,
        "channels": model["channels"] * patch**2,
        "image_size": smaller[0] if isinstance(size, int) else smaller,
    }
    rows = None if condition is None else condition.table.num_embeddings
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


def _function(sampler: Callable[..., Any]) -> Callable[..., Any]:
    return sampler.func if isinstance(sampler, functools.partial) else sampler


def _method(sampler: Callable[..., Any]) -> Method:
    """Return the method of a sampler. Raises ValueError if diffusers has none."""
    settings = sampler.keywords if isinstance(sampler, functools.partial) else {}
    function, eta = _function(sampler), settings.get("eta")
    if function is samplers.ancestral:
        return Method(DDPM)
    if function is samplers.ddim:
        return Method(DDIM, eta or 0.0)
    if function is samplers.dpmpp_2m:
        return Method(DPM)
    if function is samplers.dpmpp_2m_sde:
        eta = 1.0 if eta is None else eta
        if eta not in (0, 1):
            raise ValueError(f"sampler.eta={eta} must be 0 or 1 for DPM-Solver++ of diffusers; set sampler.eta=1")
        return Method(DPM, eta)
    if function is samplers.heun:
        if churn := settings.get("s_churn", 0):
            raise ValueError(f"sampler.s_churn={churn} is not an option of {HEUN}; set sampler.s_churn=0")
        return Method(HEUN)
    if function is diffusers:
        known = (DDPM, DDIM, DPM, EULER, HEUN)
        if (name := settings["scheduler"]) not in known:
            raise ValueError(f"sampler.scheduler={name} must be one of {', '.join(known)}; add sampler=dpmpp_2m")
        return Method(name)
    name = getattr(function, "__name__", str(function))
    raise ValueError(f"sampler={name} is not a scheduler of diffusers; add sampler=ddim or sampler=dpmpp_2m")


def _scheduler(
    method: Method,
    diffusion: GaussianDiffusion,
    grid: TimeGrid,
    spacing: Spacing,
    model: Mapping[str, Any],
    by_diffusers: bool,
) -> tuple[dict[str, Any], dict[str, list[float]] | None]:
    """Return the configuration of a scheduler, and its timesteps and sigmas if it cannot select them itself."""
    schedule, steps, scale = grid.schedule, len(grid) - 1, model["time_scale"]
    is_flow = _is_flow(schedule, diffusion)
    num_steps = schedule.num_steps
    # What keeps the sampler from the rows of a table, whose timesteps are 0, 1, ..., T - 1.
    between = None
    if diffusion.prediction == "edm":
        between = "diffusion.prediction=edm"
    elif not isinstance(schedule, NoiseSchedule):
        between = "schedule is continuous and"
    elif scale != num_steps:
        between = f"model.time_scale={scale:g} is not schedule.num_steps={num_steps} and"
    elif not by_diffusers and spacing != "trailing":
        between = f"sampler.spacing={spacing}"
    elif not by_diffusers and num_steps % steps:
        between = f"sampler.steps={steps} does not divide schedule.num_steps={num_steps} and"

    if between:
        method = _between_rows(method, diffusion, f"{between} needs noise levels", by_diffusers)
        if is_flow and method == Method(DPM, order=1) and diffusion.clip_x0 is None:
            method = Method(FLOW)
    if grid[0].alpha == 0 and not is_flow and method.scheduler not in (DDPM, DDIM):
        raise ValueError(
            f"zero_terminal_snr=true starts at pure noise, where {method.scheduler} is not finite; add sampler=ddim or "
            "sampler=ancestral"
        )
    if method.scheduler in (EULER, HEUN) and grid[0].ratio > MAX_RATIO:
        raise ValueError(
            f"sampler.spacing={spacing} starts at sigma / alpha = {grid[0].ratio:.0f}, where {method.scheduler} loses "
            "digits; add sampler.spacing=karras, which starts at 80, or sampler=ddim"
        )
    config: dict[str, Any] = {"_class_name": method.scheduler, **SETTINGS[method.scheduler]}
    config |= {"num_train_timesteps": num_steps, **_clipping(method.scheduler, diffusion)}
    if method.scheduler != FLOW:
        config["prediction_type"] = "flow_prediction" if is_flow else TARGETS[diffusion.prediction]
    if isinstance(schedule, NoiseSchedule):
        config["trained_betas"] = schedule.betas.tolist()
    if method.scheduler == DPM:
        config |= {"algorithm_type": "sde-dpmsolver++" if method.eta else "dpmsolver++", "solver_order": method.order}
        config |= {"use_flow_sigmas": is_flow}
    if method.scheduler == DDPM:
        variance = "fixed_small" if by_diffusers else diffusion.variance
        if variance == "learned":
            raise ValueError(
                "diffusion.variance=learned is not a variance of diffusers; add sampler=ddim, which ignores it"
            )
        config["variance_type"] = variance
    return config, _levels(grid, scale, is_flow, method.scheduler) if between else None


def _is_flow(schedule: Schedule, diffusion: GaussianDiffusion) -> bool:
    """Return whether alpha + sigma = 1 instead of alpha^2 + sigma^2 = 1. Raises ValueError if neither holds."""
    if diffusion.prediction == "edm":  # for any schedule
        return False
    levels = schedule.at(torch.linspace(0.1, 0.9, 5, dtype=torch.float64))
    alpha, sigma = (torch.stack([getattr(level, name) for level in levels]) for name in ("alpha", "sigma"))
    ones = torch.ones_like(alpha)
    is_flow = torch.allclose(alpha + sigma, ones, rtol=1e-9)
    allowed = ["velocity"] if is_flow else list(TARGETS)
    if diffusion.prediction not in allowed:
        raise ValueError(
            f"diffusion.prediction={diffusion.prediction} must be {' or '.join(allowed)} for schedulers of diffusers "
            f"with this schedule; {OTHER_FORMAT}"
        )
    if not is_flow and not torch.allclose(torch.hypot(alpha, sigma), ones, rtol=1e-9):
        raise ValueError(
            "schedule has neither alpha^2 + sigma^2 = 1 nor alpha + sigma = 1, as schedulers of diffusers need; "
            f"{OTHER_FORMAT}"
        )
    return is_flow


def _between_rows(method: Method, diffusion: GaussianDiffusion, reason: str, by_diffusers: bool) -> Method:
    """Return the method for noise levels that are not rows of a table. Raises ValueError, with `reason`, without one.

    In steps of first order, DPM-Solver++ is DDIM, and with noise ancestral sampling.
    """
    fix = "add sampler=dpmpp_2m, or sampler=ddim"
    if by_diffusers:
        raise ValueError(f"{reason} that sampler=diffusers does not select; {fix}")
    if method.scheduler == DDPM and diffusion.variance != "fixed_small":
        raise ValueError(f"{reason} that {DDPM} with diffusion.variance={diffusion.variance} does not have; {fix}")
    if method.scheduler == DDIM and method.eta not in (0, 1):
        raise ValueError(f"{reason} that {DDIM} with sampler.eta={method.eta:g} does not have; add sampler.eta=0")
    match method.scheduler:
        case "DDPMScheduler":
            return Method(DPM, 1.0, order=1)
        case "DDIMScheduler":
            return Method(DPM, method.eta, order=1)
    return method


def _clipping(scheduler: str, diffusion: GaussianDiffusion) -> dict[str, Any]:
    """Return the settings that bound the predicted x_0. Raises ValueError for bounds that a scheduler does not have."""
    clip, quantile = diffusion.clip_x0, diffusion.dynamic_threshold
    clamped = {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    if scheduler in (EULER, FLOW):
        if clip is not None:
            raise ValueError(f"diffusion.clip_x0={clip} is not an option of {scheduler}; add sampler=ddim, its equal")
        return {}
    if scheduler == HEUN:
        if quantile is not None:
            raise ValueError(f"diffusion.dynamic_threshold={quantile} is not an option of {HEUN}; add sampler=ddim")
        return clamped
    if scheduler != DPM and quantile is None:
        return {**clamped, "thresholding": False}
    if clip not in (None, 1):
        raise ValueError(f"diffusion.clip_x0={clip} must be 1 for {scheduler}; add sampler=ddim")
    # The threshold is clamped to [1, sample_max_value].
    bounds = {"dynamic_thresholding_ratio": quantile or 0.995, "sample_max_value": NO_LIMIT if quantile else 1.0}
    return {"thresholding": clip is not None, **bounds, **({} if scheduler == DPM else {"clip_sample": False})}


def _levels(grid: TimeGrid, time_scale: float, is_flow: bool, scheduler: str) -> dict[str, list[float]]:
    """Return the timestep and the sigma of each evaluation of the network; they count from 0, our time from 1 / T."""
    noisy = grid[:-1]
    if scheduler == HEUN:  # two evaluations at each level except the first
        noisy = (noisy[0], *(level for level in noisy[1:] for _ in range(2)))
    sigmas = [(level.sigma if is_flow else level.ratio).item() for level in noisy]
    return {"timesteps": [time_scale * level.time.item() - 1 for level in noisy], "sigmas": sigmas}


def _check_guidance(guidance: Guidance) -> Guidance:
    """Return `guidance`. Raises ValueError for settings that the pipeline does not have."""
    defaults = Guidance()
    for name, fix in (("interval", "null"), ("rescale", "0")):
        value = getattr(guidance, name)
        if value != getattr(defaults, name):
            raise ValueError(f"guidance.{name}={value} is not part of the pipeline; add guidance.{name}={fix}")
    return guidance
