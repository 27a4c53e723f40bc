"""Our samplers, schedules and bounds on x_0 as configurations of schedulers of the diffusers library."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from src.diffusion import samplers
from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.noise import NoiseSchedule, Schedule, Spacing, TimeGrid
from src.interop.diffusers_samplers import diffusers

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

NO_LIMIT = 1e30
MAX_STORED_RATIO = 250.0
"""Above this sigma / alpha, schedulers that store x / alpha in float32 differ from our samples by more than 1e-4."""


class Method(NamedTuple):
    """A sampler in the terms of diffusers."""

    scheduler: str
    eta: float = 0.0
    """The noise of DDIM, or of DPM-Solver++, which has 0 and 1."""
    order: int = 2
    """The order of DPM-Solver++."""


def sampler_function(sampler: Callable[..., Any]) -> Callable[..., Any]:
    return sampler.func if isinstance(sampler, functools.partial) else sampler


def method_of(sampler: Callable[..., Any]) -> Method:
    """Return the method of a sampler. Raises ValueError if diffusers has none."""
    settings = sampler.keywords if isinstance(sampler, functools.partial) else {}
    function, eta = sampler_function(sampler), settings.get("eta")
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


def scheduler_of(
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
    # What keeps the sampler from the rows of a table, whose timesteps are 0, 1, ..., T - 1; and how to return to them.
    between: tuple[str, str] | None = None
    if diffusion.prediction == "edm":
        between = "diffusion.prediction=edm", "sampler=dpmpp_2m"
    elif not isinstance(schedule, NoiseSchedule):
        between = "a continuous schedule", "sampler=dpmpp_2m"
    elif scale != num_steps:
        between = f"model.time_scale={scale:g} other than schedule.num_steps={num_steps}", "sampler=dpmpp_2m"
    elif not by_diffusers and spacing != "trailing":
        between = f"sampler.spacing={spacing}", "sampler.spacing=trailing"
    elif not by_diffusers and num_steps % steps:
        divisor = max((n for n in range(1, steps) if num_steps % n == 0), default=1)
        between = f"sampler.steps={steps}, which does not divide {num_steps},", f"sampler.steps={divisor}"

    if between:
        method = _between_rows(method, diffusion, *between, by_diffusers)
        if is_flow and method == Method(DPM, order=1) and diffusion.clip_x0 is None:
            method = Method(FLOW)
    if grid[0].alpha == 0 and not is_flow and method.scheduler not in (DDPM, DDIM):
        raise ValueError(
            f"zero_terminal_snr=true starts at pure noise, where {method.scheduler} is not finite; add sampler=ddim or "
            "sampler=ancestral"
        )
    if method.scheduler in (EULER, HEUN) and grid[0].ratio > MAX_STORED_RATIO:
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
        curve = getattr(schedule, "curve", None)
        name = getattr(getattr(curve, "func", curve), "__name__", type(curve).__name__)
        raise ValueError(
            f"schedule.curve={name} must have alpha^2 + sigma^2 = 1 or alpha + sigma = 1 for schedulers of diffusers; "
            f"{OTHER_FORMAT}"
        )
    return is_flow


def _between_rows(method: Method, diffusion: GaussianDiffusion, reason: str, fix: str, by_diffusers: bool) -> Method:
    """Return the method for noise levels that are not rows of a table, because of `reason`. Raises ValueError without.

    In steps of first order, DPM-Solver++ is DDIM, and with noise ancestral sampling.
    """
    lacks = None
    if by_diffusers:
        lacks, fix = "sampler=diffusers", "sampler=dpmpp_2m"
    elif method.scheduler == DDPM and diffusion.variance != "fixed_small":
        lacks = f"{DDPM} with diffusion.variance={diffusion.variance}"
    elif method.scheduler == DDIM and method.eta not in (0, 1):
        lacks = f"{DDIM} with sampler.eta={method.eta:g}"
    if lacks:
        raise ValueError(f"{reason} needs noise levels that {lacks} does not have; add {fix}")
    if method.scheduler in (DDPM, DDIM):
        return Method(DPM, 1.0 if method.scheduler == DDPM else method.eta, order=1)
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
