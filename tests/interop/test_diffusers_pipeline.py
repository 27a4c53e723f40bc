"""Schedulers of diffusers as schedules and diffusion processes of this project."""

import json
from typing import Any

import pytest

from src.interop.diffusers_pipeline import process_of
from src.interop.imported import ImportedModel
from tests.loops import for_each

diffusers = pytest.importorskip("diffusers")


def read(scheduler: Any) -> ImportedModel:
    return process_of(json.loads(scheduler.to_json_string()))


@for_each(
    "scheduler, clip, threshold",
    lambda: {
        "DDPM": (diffusers.DDPMScheduler(clip_sample_range=2.0), 2.0, None),
        "DPM": (diffusers.DPMSolverMultistepScheduler(), None, None),
        # The threshold is clamped to [1, sample_max_value].
        "clipping": (diffusers.DPMSolverMultistepScheduler(thresholding=True), 1.0, None),
        "dynamic": (diffusers.DPMSolverMultistepScheduler(thresholding=True, sample_max_value=10.0), 1.0, 0.995),
    },
)
def test_bounds_of_x0_are_read(scheduler, clip, threshold):
    diffusion = read(scheduler).diffusion
    assert (diffusion["clip_x0"], diffusion["dynamic_threshold"]) == (clip, threshold)


@for_each(
    "scheduler",
    lambda: {
        "own class": diffusers.FlowMatchEulerDiscreteScheduler(),
        "DPM": diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    },
)
def test_flow_has_the_rectified_schedule(scheduler):
    process = read(scheduler)
    assert process.diffusion["prediction"] == "velocity"
    assert process.schedule["curve"]["_target_"] == "src.diffusion.curves.rectified_flow"


@for_each(
    "scheduler, named",
    lambda: {
        "consistency": (diffusers.CMStochasticIterativeScheduler(), "CMStochasticIterativeScheduler"),
        "EDM": (diffusers.EDMEulerScheduler(), "EDMEulerScheduler"),
        "shifted": (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "shift=3"),
    },
)
def test_schedulers_without_our_schedule_are_refused(scheduler, named):
    with pytest.raises(ValueError, match=named):
        read(scheduler)
