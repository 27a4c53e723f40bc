"""Read a pipeline folder of the diffusers library: its network, and its scheduler as schedule and diffusion process."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from src.errors import one_line
from src.interop import diffusers_dit, diffusers_unet
from src.interop.imported import ImportedModel, check_weights, read_pt
from src.models.dit import DiT

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {
    **{f"fixed_{size}{log}": f"fixed_{size}" for size in ("small", "large") for log in ("", "_log")},
    **{name: name for name in ("learned_range", "learned")},
}
SAMPLERS = {"DDPMScheduler": "ancestral", "DDIMScheduler": "ddim", "HeunDiscreteScheduler": "heun"}
"""Our samplers for the schedulers of diffusers; the others have `dpmpp_2m`."""
WEIGHTS = "diffusion_pytorch_model"


def read_pipeline(folder: Path) -> ImportedModel:
    """Return the network and the scheduler of a pipeline folder; a folder with a network only has a linear schedule.

    Only JSON and tensors are read. Raises ValueError if this project has no such network or diffusion process, or if a
    setting has a wrong type, and FileNotFoundError without weights or a scheduler that the pipeline names.
    """
    try:
        return _read_pipeline(folder)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"init_from={folder} has a value of a wrong type in config.json or scheduler_config.json "
            f"({one_line(error)}); write them by save_pretrained"
        ) from error


def _read_pipeline(folder: Path) -> ImportedModel:
    network = network_folder(folder)
    config = read_config(network / "config.json")
    is_dit = (name := config.get("_class_name")) in diffusers_dit.CLASS_NAMES
    if name != "UNet2DModel" and not is_dit:
        raise ValueError(
            f"init_from={network} has {name or 'no _class_name'} in config.json; choose a model with a UNet2DModel or "
            "DiTTransformer2DModel"
        )
    # Older pipelines have both files in one folder.
    scheduler = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    settings = read_config(scheduler / "scheduler_config.json")
    if not settings:
        if "scheduler" in read_config(folder / "model_index.json"):
            raise FileNotFoundError(f"init_from: {scheduler} has no scheduler_config.json; download it, too")
        warnings.warn(f"{folder} has no scheduler; using a linear schedule of 1000 steps", stacklevel=2)
    process = process_of(settings)
    flow = process.diffusion["prediction"] == "velocity"
    # The time of a flow is its noise level, from 0 to 1; otherwise timesteps count from 0.
    steps = process.schedule.get("num_steps") or len(process.schedule["betas"])
    model = (diffusers_dit if is_dit else diffusers_unet).settings_of(config, steps, first_step=int(flow))
    if model["outputs"] == 2 and not process.diffusion["variance"].startswith("learned"):
        process.diffusion["variance"] = "learned_range"  # schedulers without a learned variance ignore these channels
    theirs = read_weights(network)
    if is_dit:
        weights, classes = diffusers_dit.from_diffusers(theirs, model), config.get("num_embeds_ada_norm", 1000)
        process = process._replace(network=DiT, has_null_class=True)
        names = diffusers_dit.weight_names(model["depth"])
    else:
        weights, classes = diffusers_unet.from_diffusers(theirs, config, model), config.get("num_class_embeds")
        names = diffusers_unet.weight_names(model)
    imported = process._replace(model=model, weights=weights, num_classes=classes)
    return check_weights(imported, {name: parts[0] for name, parts in names})


def network_folder(folder: Path) -> Path:
    """Return the folder of the network in a pipeline, or `folder` if it is that of a network."""
    return next((folder / name for name in ("unet", "transformer") if (folder / name).is_dir()), folder)


def process_of(scheduler: Mapping[str, Any]) -> ImportedModel:
    """Return the schedule, the diffusion process and the sampler of a scheduler's configuration, without a network.

    Raises ValueError if this project has no such schedule.
    """
    name, steps = scheduler.get("_class_name", "DDPMScheduler"), scheduler.get("num_train_timesteps", 1000)
    clips = scheduler.get("clip_sample", name in ("DDPMScheduler", "DDIMScheduler"))
    clip, threshold = scheduler.get("clip_sample_range", 1.0) if clips else None, None
    if scheduler.get("thresholding"):  # the threshold is in [1, sample_max_value]
        is_dynamic = scheduler.get("sample_max_value", 1.0) > 1
        clip, threshold = 1.0, scheduler.get("dynamic_thresholding_ratio", 0.995) if is_dynamic else None
    if "FlowMatch" in name or scheduler.get("prediction_type") == "flow_prediction":
        shift = scheduler.get("shift", scheduler.get("flow_shift", 1.0))
        if shift != 1 or scheduler.get("use_dynamic_shifting"):
            raise ValueError(f"shift={shift} of the {name} is not supported; set it to 1 in scheduler_config.json")
        curve = {"_target_": "src.diffusion.curves.rectified_flow", "_partial_": True, "start": 1e-4}
        schedule = {"_target_": "src.diffusion.noise.ContinuousSchedule", "curve": curve, "num_steps": steps}
        prediction, variance = "velocity", "fixed_small"
    else:
        schedule = _schedule(scheduler, steps)
        prediction = _known(scheduler, "prediction_type", "epsilon", PREDICTIONS)
        variance = _known(scheduler, "variance_type", "fixed_small", VARIANCES)
    return ImportedModel(
        model={},
        schedule=schedule,
        diffusion={"prediction": prediction, "variance": variance, "clip_x0": clip, "dynamic_threshold": threshold},
        weights={},
        zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr", False)),
        sampler=SAMPLERS.get(name, "dpmpp_2m"),
    )


def _schedule(scheduler: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return the node of the betas of a scheduler."""
    if (betas := scheduler.get("trained_betas")) is not None:
        return {"_target_": "src.diffusion.schedules.custom", "betas": list(betas)}
    name = scheduler.get("_class_name", "DDPMScheduler")
    if "beta_schedule" not in scheduler and name not in SAMPLERS:
        raise ValueError(f"the {name} has no beta_schedule and is not supported; use a pipeline with another scheduler")
    kind, functions = scheduler.get("beta_schedule", "linear"), "src.diffusion.schedules"
    ends = {"beta_start": scheduler.get("beta_start", 1e-4), "beta_end": scheduler.get("beta_end", 0.02)}
    match kind:
        case "linear":  # our function scales the ends by 1000 / T
            scaled = {name: end * steps / 1000 for name, end in ends.items()}
            return {"_target_": f"{functions}.linear", "num_steps": steps, **scaled, "max_beta": 0.999}
        case "scaled_linear":
            return {"_target_": f"{functions}.quadratic", "num_steps": steps, **ends}
        case "squaredcos_cap_v2":
            return {"_target_": f"{functions}.cosine", "num_steps": steps, "offset": 0.008, "max_beta": 0.999}
        case "sigmoid":
            return {"_target_": f"{functions}.sigmoid_geodiff", "num_steps": steps, **ends}
        case "laplace":
            arguments = {"mu": 0.0, "scale": 0.5, "power": 0.5, "max_beta": 0.999}
            return {"_target_": f"{functions}.laplace", "num_steps": steps, **arguments}
    raise ValueError(f"beta_schedule={kind} of the scheduler is not supported; write its betas as trained_betas")


def _known(scheduler: Mapping[str, Any], name: str, default: str, known: Mapping[str, str]) -> str:
    if (value := scheduler.get(name) or default) not in known:  # null in schedulers without a reverse variance
        raise ValueError(f"{name}={value} of the scheduler is not supported; choose one of {', '.join(known)}")
    return known[value]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a model folder, from safetensors in one or several files, or from torch's format.

    Raises FileNotFoundError without such a file, and ValueError for a corrupted one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if files := sorted(folder.glob(f"{WEIGHTS}*.safetensors")):
        plain = folder / f"{WEIGHTS}.safetensors"  # beside it there may be copies in half precision
        shards = [plain] if plain in files else files
        try:
            return {name: value.float() for file in shards for name, value in load_file(file).items()}
        except SafetensorError as error:
            raise ValueError(f"init_from: {shards[0]} is damaged ({error}); download it again") from error
    if (binary := folder / f"{WEIGHTS}.bin").is_file():
        return {name: value.float() for name, value in read_pt(binary).items()}
    raise FileNotFoundError(f"init_from: {folder} has no {WEIGHTS}.safetensors; download the weights, too")


def read_config(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one without the file. Raises ValueError for other contents."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object; download it again")
    return content
