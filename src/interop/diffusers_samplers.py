"""Sample with the schedulers of the diffusers library, an optional extra: our network, our betas, their steps."""

import difflib
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from src.diffusion.gaussian_diffusion import GaussianDiffusion, Prediction
from src.diffusion.likelihood import Predict
from src.diffusion.noise import NoiseLevel, NoiseSchedule, TimeGrid
from src.diffusion.samplers import Noise

# Every convention on which the schedulers' defaults differ, for those that know it. Clipping is our process's.
CONVENTIONS = {
    "clip_sample": False,
    "thresholding": False,
    "timestep_spacing": "trailing",  # the others never visit the noisiest row (Lin et al., 2305.08891, tab. 2)
    "steps_offset": 0,
    "set_alpha_to_one": True,  # end at clean data
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "variance_type": "fixed_small",
    "rescale_betas_zero_snr": False,  # our betas are what they are to be
    "snr_shift_scale": 1.0,
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "skip_prk_steps": True,
}
# Most schedulers take x_0. These know it not; PNDM extrapolates what it is given, which only eps allows.
OTHER_PREDICTIONS = {
    "PNDMScheduler": "epsilon",
    "EulerAncestralDiscreteScheduler": "v_prediction",
    "KDPM2DiscreteScheduler": "v_prediction",
    "KDPM2AncestralDiscreteScheduler": "v_prediction",
    "DPMSolverSDEScheduler": "v_prediction",
}
# The library's own stand-in for an alpha_bar of 0, whose sigma / alpha would be infinite.
LEAST_ALPHA_BAR = 2**-24


def diffusers(
    diffusion: GaussianDiffusion, predict: Predict, x: Tensor, time_grid: TimeGrid, *, noise: Noise, scheduler: str
) -> Iterator[Tensor]:
    """Walk len(time_grid) - 1 steps with the class `scheduler` of the diffusers library, which chooses its own timesteps.

    Some predict more than once a step. Those of the form of k-diffusion hold x / alpha; what is predicted from, and
    yielded, is x. A `diffusion` with learned variances samples with fixed ones here. DDIMScheduler and PNDMScheduler
    want a number of steps that divides the schedule's. Raises ValueError for schedulers that are unknown or made for
    something else, and for schedules without betas.
    """
    steps, schedule = len(time_grid) - 1, time_grid.schedule
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError(
            "the diffusers library's schedulers want betas, which continuous schedules have not: choose a schedule "
            "such as cosine or linear, or another sampler"
        )
    make = _scheduler_class(scheduler)
    # A generator for each sample, so that none depends on what it is drawn together with.
    seeds = ((noise(x).double().flatten(1)[:, 0] * 2**32).long() % 2**62).tolist()
    generators = [torch.Generator(x.device).manual_seed(seed) for seed in seeds]
    kind = OTHER_PREDICTIONS.get(scheduler, "sample")
    stepper = _build(make, schedule, kind, seeds)
    stepper.set_timesteps(steps)
    if hasattr(stepper, "set_begin_index"):
        stepper.set_begin_index(0)
    extra = {"generator": generators} if "generator" in inspect.signature(make.step).parameters else {}

    times = stepper.timesteps
    levels = schedule.at((times.double() + 1) / schedule.num_steps)
    # x is standard normal; the scheduler's x is what it scales to that.
    x = x / stepper.scale_model_input(torch.ones((), dtype=torch.float64), times[0])
    scaled = stepper.scale_model_input(x, times[0])
    for i, (time, level) in enumerate(zip(times, levels, strict=True)):
        out = _output(kind, predict(scaled, level), level)
        x = stepper.step(out, time, x, return_dict=False, **extra)[0]
        is_last = i + 1 == len(times)
        scaled = x if is_last else stepper.scale_model_input(x, times[i + 1])
        # However many predictions are made, `steps` values come out, evenly spread over them.
        if (i + 1) * steps // len(times) > i * steps // len(times):
            yield scaled


def _build(make: Any, schedule: NoiseSchedule, kind: str, seeds: list[int]) -> Any:
    """The scheduler with our betas, its float32 tables replaced by ours."""
    known = inspect.signature(make.__init__).parameters
    conventions = {**CONVENTIONS, "noise_sampler_seed": seeds}
    stepper = make(
        num_train_timesteps=schedule.num_steps,
        trained_betas=schedule.betas.tolist(),
        prediction_type=kind,
        **{name: value for name, value in conventions.items() if name in known},
    )
    alpha_bar = schedule.rows.alpha[:-1].square()
    if alpha_bar[-1] == 0:
        if kind == "epsilon":
            raise ValueError(
                f"{make.__name__} takes eps, from which no x_0 follows at zero SNR: choose another scheduler, such as "
                "UniPCMultistepScheduler, or zero_terminal_snr=false"
            )
        alpha_bar[-1] = min(LEAST_ALPHA_BAR, alpha_bar[-2].item() / 2)
    stepper.alphas_cumprod = alpha_bar
    return stepper


def _output(kind: str, pred: Prediction, level: NoiseLevel) -> Tensor:
    """The prediction as the scheduler wants it, (B, *data)."""
    match kind:
        case "sample":
            return pred.x0
        case "epsilon":
            return pred.eps
    return level.alpha * pred.eps - level.sigma * pred.x0


def _scheduler_class(name: str) -> Any:
    """The class of the diffusers library of this name, if it can walk a chain of betas from noise to data."""
    try:
        library = importlib.import_module("diffusers")
    except ImportError as error:
        raise ValueError("sampler=diffusers needs the diffusers library: pip install diffusers") from error
    names = [known for known in dir(library) if known.endswith("Scheduler")]
    if name not in names:
        # Compared without the ending that they all have in common.
        usable = {known.removesuffix("Scheduler"): known for known in names if _walks_betas(library, known)}
        stems = difflib.get_close_matches(name.removesuffix("Scheduler"), usable, n=3, cutoff=0.5)
        close = " or ".join(usable[stem] for stem in stems)
        hint = f"did you mean {close}?" if close else f"choose one of {', '.join(usable.values())}"
        raise ValueError(f"the diffusers library has no scheduler {name!r}: {hint} (sampler.scheduler)")
    if getattr(getattr(library, name), "_backends", None):  # what the library has in place of what it cannot import
        raise ValueError(f"{name} needs {' and '.join(getattr(library, name)._backends)}: pip install them")
    if not _walks_betas(library, name):
        raise ValueError(
            f"{name} does not lead from noise to data along a chain of betas: choose another, such as "
            "UniPCMultistepScheduler (sampler.scheduler)"
        )
    return getattr(library, name)


def _walks_betas(library: Any, name: str) -> bool:
    try:
        make = getattr(library, name)
        settings = inspect.signature(make.__init__).parameters
        inputs = list(inspect.signature(make.step).parameters.values())[1:]
    except (AttributeError, ImportError, TypeError):
        return False
    needs = [p.name for p in inputs if p.default is p.empty]
    takes_betas = {"trained_betas", "prediction_type"} <= settings.keys()
    return takes_betas and needs == ["model_output", "timestep", "sample"] and "Inverse" not in name
