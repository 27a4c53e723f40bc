"""Sample with the schedulers of the diffusers library, an optional extra, on our network and betas."""

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.likelihood import Predict
from src.diffusion.noise import NoiseSchedule, TimeGrid
from src.diffusion.samplers import Noise
from src.errors import near_matches, optional_package

# Arguments whose defaults differ between schedulers, passed to those that accept them. GaussianDiffusion clips x_0.
CONVENTIONS = {
    "clip_sample": False,
    "thresholding": False,
    "timestep_spacing": "trailing",  # other spacings skip the noisiest row (Lin et al. 2023, arXiv 2305.08891, tab. 2)
    "steps_offset": 0,
    "set_alpha_to_one": True,  # the last step ends at clean data
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "variance_type": "fixed_small",
    "rescale_betas_zero_snr": False,  # zero_terminal_snr does that
    "snr_shift_scale": 1.0,
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "skip_prk_steps": True,
}
# Most schedulers accept x_0 as prediction type. These do not; PNDM extrapolates its input, which must be eps.
OTHER_PREDICTIONS = {
    "PNDMScheduler": "epsilon",
    "EulerAncestralDiscreteScheduler": "v_prediction",
    "KDPM2DiscreteScheduler": "v_prediction",
    "KDPM2AncestralDiscreteScheduler": "v_prediction",
    "DPMSolverSDEScheduler": "v_prediction",
}
# Replaces an alpha_bar of 0, whose sigma / alpha is infinite; the value is that of diffusers.
MIN_ALPHA_BAR = 2**-24


def diffusers(
    diffusion: GaussianDiffusion, predict: Predict, x: Tensor, time_grid: TimeGrid, *, noise: Noise, scheduler: str
) -> Iterator[Tensor]:
    """Sample with the class `scheduler` of diffusers in len(time_grid) - 1 steps at the timesteps that it selects.

    Some schedulers predict more than once per step. Those derived from k-diffusion store x / alpha; this function
    predicts from x and yields x. Learned variances are ignored. DDIMScheduler and PNDMScheduler need a number of steps
    that divides `schedule.num_steps`.

    Raises ValueError if the scheduler is unknown or not for sampling with betas, or if the schedule has no betas.
    """
    steps, schedule = len(time_grid) - 1, time_grid.schedule
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError(
            "sampler=diffusers needs a schedule with betas, not a continuous one; "
            "choose schedule=cosine or schedule=linear, or another sampler"
        )
    make = _scheduler_class(scheduler)
    # One generator per sample, so that a sample does not depend on the batch.
    seeds = ((noise(x).double().flatten(1)[:, 0] * 2**32).long() % 2**62).tolist()
    generators = [torch.Generator(x.device).manual_seed(seed) for seed in seeds]
    extra = {"generator": generators} if "generator" in inspect.signature(make.step).parameters else {}
    prediction_type = OTHER_PREDICTIONS.get(scheduler, "sample")
    sampler = _build(make, schedule, prediction_type, seeds)
    sampler.set_timesteps(steps)
    if hasattr(sampler, "set_begin_index"):
        sampler.set_begin_index(0)

    times = sampler.timesteps
    levels = schedule.at((times.double() + 1) / schedule.num_steps)
    # x is standard normal; convert it to the scale of the scheduler.
    x = x / sampler.scale_model_input(torch.ones((), dtype=torch.float64), times[0])
    scaled = sampler.scale_model_input(x, times[0])
    for i, (time, level) in enumerate(zip(times, levels, strict=True)):
        pred = predict(scaled, level)
        outputs = {
            "sample": pred.x0,
            "epsilon": pred.eps,
            "v_prediction": level.alpha * pred.eps - level.sigma * pred.x0,
        }
        x = sampler.step(outputs[prediction_type], time, x, return_dict=False, **extra)[0]
        scaled = x if i + 1 == len(times) else sampler.scale_model_input(x, times[i + 1])
        # Yield `steps` values, evenly spaced over the predictions.
        if (i + 1) * steps // len(times) > i * steps // len(times):
            yield scaled


def _build(make: Any, schedule: NoiseSchedule, prediction_type: str, seeds: list[int]) -> Any:
    """Build the scheduler with our betas, and replace its float32 alpha_bar by ours in float64."""
    known = inspect.signature(make.__init__).parameters
    conventions = {**CONVENTIONS, "noise_sampler_seed": seeds}
    sampler = make(
        num_train_timesteps=schedule.num_steps,
        trained_betas=schedule.betas.tolist(),
        prediction_type=prediction_type,
        **{name: value for name, value in conventions.items() if name in known},
    )
    alpha_bar = schedule.rows.alpha[:-1].square()
    if alpha_bar[-1] == 0:
        if prediction_type == "epsilon":
            raise ValueError(
                f"sampler.scheduler={make.__name__} predicts eps and does not support zero SNR; "
                "choose sampler.scheduler=UniPCMultistepScheduler or zero_terminal_snr=false"
            )
        alpha_bar[-1] = min(MIN_ALPHA_BAR, alpha_bar[-2].item() / 2)
    sampler.alphas_cumprod = alpha_bar
    return sampler


def _scheduler_class(name: str) -> Any:
    """Return the class `name` of diffusers; raise ValueError unless it uses betas and samples from noise to data."""
    with optional_package("sampler=diffusers", "diffusers"):
        library = importlib.import_module("diffusers")
    setting, names = f"sampler.scheduler={name}", [known for known in dir(library) if known.endswith("Scheduler")]
    if name not in names:
        # Compare without the common suffix.
        usable = {known.removesuffix("Scheduler"): known for known in names if _uses_betas(library, known)}
        stems = near_matches(name.removesuffix("Scheduler"), [*usable], 3, 0.5)
        close = " or ".join(usable[stem] for stem in stems)
        hint = f"did you mean {close}?" if close else f"choose one of {', '.join(usable.values())}"
        raise ValueError(f"{setting} must be a scheduler of diffusers; {hint}")
    make = getattr(library, name)
    if missing := getattr(make, "_backends", None):  # a placeholder for a class with missing dependencies
        raise ValueError(f"{setting} needs packages; pip install {' '.join(missing)}")
    if not _uses_betas(library, name):
        raise ValueError(
            f"{setting} must sample along betas from noise to data; choose sampler.scheduler=UniPCMultistepScheduler"
        )
    return make


def _uses_betas(library: Any, name: str) -> bool:
    try:
        make = getattr(library, name)
        settings = inspect.signature(make.__init__).parameters
        inputs = list(inspect.signature(make.step).parameters.values())[1:]
    except (AttributeError, ImportError, TypeError):
        return False
    needs = [p.name for p in inputs if p.default is p.empty]
    takes_betas = {"trained_betas", "prediction_type"} <= settings.keys()
    return takes_betas and needs == ["model_output", "timestep", "sample"] and "Inverse" not in name
