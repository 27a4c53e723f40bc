"""The schema of the configuration: types, ranges and choices of settings that need no torch to check."""

import fnmatch
import math
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, InterpolationToMissingValueError, OmegaConfBaseException

from src.config.keys import FOREIGN_VALUES
from src.errors import UsageError, did_you_mean, first_line, first_names, format_override, literal

RANGES = {
    # Every command.
    "*seed": "[0, 2^32)",
    "n": "[1, inf)",
    "batch_size": "[1, inf)",
    "devices": "[1, inf)",
    "num_nodes": "[1, inf)",
    "sampler.steps": "[1, inf)",
    "sampler.eta": "[0, inf)",
    "src.diffusion.samplers.ddim.eta": "[0, 1]: 0 is DDIM, 1 is ancestral sampling",
    "sampler.s_churn": "[0, inf)",
    "sampler.s_tmin": "[0, inf)",
    "sampler.s_tmax": "[0, inf]",
    "sampler.s_noise": "[0, inf)",
    "guidance.rescale": "[0, 1]",
    "guidance.scale": "[0, inf): 1 turns guidance off",
    "schedule.num_steps": "[2, inf): 1000 is usual",
    "src.diffusion.schedules.*.num_steps": "[10, 10000]: 1000 is usual (sampler.steps sets the sampling steps)",
    "snr_shift": "(0, inf)",
    "hydra.sweeper.max_batch_size": "[1, inf)",
    "hydra.sweeper.n_jobs": "[1, inf)",
    "hydra.sweeper.n_trials": "[1, inf)",
    # Training.
    "optimizer.lr": "(0, inf): 1e-3 is usual",
    "optimizer.weight_decay": "[0, inf)",
    "src.training.muon.MuonAdamW.momentum": "[0, 1): 0.95 is usual",
    "src.training.muon.MuonAdamW.ns_steps": "[1, 99]: 5 is usual",
    "lr_scheduler.warmup_steps": "[0, inf)",
    "lr_multipliers.*": "(0, inf): freeze=[...] excludes weights from training",
    "lora.rank": "[1, inf)",
    "lora.alpha": "(0, inf)",
    "lora.dropout": "[0, 1)",
    "repa.weight": "(0, inf): 0.5 is usual",
    "repa.width": "[1, inf)",
    "repa.stop_step": "[1, inf)",
    "data.batch_size": "[1, inf)",
    "data.microbatch_size": "[1, inf)",
    "autoencoder.batch_size": "[1, inf)",
    "data.num_workers": "[0, inf)",
    "data.val_fraction": "(0, 1)",
    "data.skip_unreadable": "[0, 1]",
    "data.edm_augment": "[0, 1]: 0.12 is usual, 0 turns it off",
    "data.color_jitter.hue": "[0, 0.5]",
    "data.color_jitter.*": "[0, inf)",
    "data.num_samples": "[2, inf)",
    "data.source.num_samples": "[2, inf)",
    "data.source.max_samples": "[2, inf)",
    "model.dropout": "[0, 1)",
    "loss.kl_weight": "[0, inf)",
    "loss.perceptual_weight": "[0, inf)",
    "conditioning.cond_drop_prob": "[0, 1): 0.1 is usual",
    "diffusion.clip_x0": "(0, inf)",
    "diffusion.dynamic_threshold": "(0, 1): 0.995 is usual",
    "diffusion.sigma_data": "(0, inf)",
    "callbacks.ema.decay": "[0, 1)",
    "callbacks.power_ema.max_snapshots": "[2, inf): 32 is usual",
    "callbacks.nan_guard.lr_factor": "(0, 1]",
    "validate_every": "[1, inf)",
    "checkpoint_every": "[1, inf)",
    "keep_checkpoints": "[-1, inf): -1 keeps all",
    "neighbors.*": "[0, inf)",
    "trainer.max_steps": "[1, 10^9]: training is counted in steps",
    "trainer.log_every_n_steps": "[1, inf): logger=none logs nothing",
    "trainer.accumulate_grad_batches": "[1, inf)",
    "trainer.gradient_clip_val": "[0, inf): 0 turns clipping off",
    "trainer.num_nodes": "[1, inf)",
    "trainer.num_sanity_val_steps": "[-1, inf): -1 runs all batches",
    # Other commands.
    "ema": "(0, 0.2886]: 0.1 is usual",
    "ema.length": "(0, 0.2886]: 0.1 is usual",
    "evaluate.n": "[10, inf)",
    "compare.n": "[10, inf)",
    "max_features": "[10, inf)",
    "num_memorization": "[10, inf)",
    "num_val": "[1, inf)",
    "num_terms": "[1, inf)",
    "ode_tolerance": "(0, inf)",
    "alignment.n": "[2, inf)",
    "alignment.detector_steps": "[1, inf)",
    "analytic_samples": "[10, inf)",
    "num_steps": "[10, 10000]: 1000 is usual",
    "frames": "[2, inf)",
    "steps": "[0, inf)",
}
"""Interval of each number, by setting or argument of a `_target_` or command, or by pattern; a comment may follow a
colon. The constructors repeat them for whoever calls them from Python."""

RECIPE = {
    "recipe.lr": "optimizer.lr",
    "recipe.warmup_steps": "lr_scheduler.warmup_steps",
    "recipe.ema_decay": "callbacks.ema.decay",
    "recipe.max_steps": "trainer.max_steps",
    "recipe.validate_every": "validate_every",
    "recipe.checkpoint_every": "checkpoint_every",
    "recipe.decay_matrices_only": "decay_matrices_only",
}
"""Settings that a model or an experiment suggests, and the settings that interpolate them."""

RANGES |= {suggested: RANGES[read] for suggested, read in RECIPE.items() if read in RANGES}

CHOICES = {
    "diffusion.prediction": ("eps", "x0", "v", "edm", "velocity"),
    "diffusion.variance": ("fixed_small", "fixed_large", "learned_range", "learned"),
    "loss.type": ("l2", "l1", "huber"),
    "data.coupling": ("independent", "ot"),
    "format": ("safetensors", "torch_export", "onnx", "diffusers"),
    "features": ("classifier", "pixels", "efficientnet", "inception", "dinov2"),
    "init_from.weights": ("ema", "raw"),
    "autoencoder.dtype": ("float32", "float16"),
    "reference": ("val", "train"),
    "reverse_variance": ("optimal", "fixed_small", "fixed_large", "trained"),
    "trainer.gradient_clip_algorithm": ("norm", "value"),
    "sampler.spacing": ("trailing", "leading", "linspace", "karras", "log_snr"),
}
"""Strings that a setting accepts, alone or in a list."""

OPTIONAL = ("neighbors", "guidance")
"""Nodes that may be null or removed."""

SEVERAL_TYPES = ("data.image_size", "data.skip_unreadable", "data.root", "ema", "length")
"""Settings that also accept a list or a number, whatever their default; their constructors check the type."""

LENGTHS = ("ema", "length")
"""Settings that also accept a list of numbers, the lengths of averages."""

PATHS = ("run", "ckpt", "init_from.path", "autoencoder.path", "autoencoder", "encoder", "guidance.model", "data.root")
"""Settings that name a file, a folder or a model of the Hub, with null for none."""

WORDS = {"data.source.class_depth": ("all",)}
"""Words that a setting accepts besides values of its default's type."""

EXAMPLES = {
    "ema": True,
    "callbacks.power_ema.lengths": [0.05, 0.1],
    "guidance.scale": 1.0,
    "guidance.rescale": 0.0,
    "guidance.interval": [0.2, 5],
    "num_val": 1000,
    "num_terms": 50,
    "alignment.n": 200,
    "freeze": ["time.*"],
    "repa.stop_step": 1000,
    "lr_multipliers": {"down.*": 0.1},
    "decay_matrices_only": True,
    "recipe.decay_matrices_only": True,
    "samplers": [{"sampler": "ddim", "steps": 10}],
}
"""Values of the right type for settings whose default is null."""

NULLABLE = (*OPTIONAL, *EXAMPLES, "optimized_metric")
"""Settings without a dot in their name, and nodes, that may be null; settings of nodes may be null, too."""

ALLOW_EMPTY = ("cond", "negative")
"""Strings that may be empty."""

ALLOW_INFINITE = ("guidance.interval",)

PAIRS = {"optimizer.betas": "[0.9,0.999]", "guidance.interval": "[0.2,5]", "data.value_range": "[0,4095]"}
"""Lists of two numbers, with an example. An optimizer of another package may have more."""

LIMIT = {"inf": math.inf, "2^32": 2**32, "10^9": 10**9}


def check_values(cfg: DictConfig, command: str = "") -> None:
    """Raise UsageError for a value of the composed configuration of a command outside RANGES or CHOICES.

    A node with a `_target_` of another package is not checked, except an optimizer of torch.
    """
    for name, value, argument in _leaves(cfg):
        check_value(name, value, argument or f"{command}.{name}")


@cache
def _rule(name: str) -> str | None:
    """Return the interval of a setting or argument; None if it has none."""
    return RANGES.get(name) or next((RANGES[p] for p in RANGES if "*" in p and fnmatch.fnmatchcase(name, p)), None)


def check_value(name: str, value: Any, argument: str = "") -> None:
    """Raise UsageError if `value` breaks the rule of the setting `name`, or of the `argument` of a `_target_`.

    Of a list, each number is checked. Values of another type, such as null or auto, have no range.
    """
    rule = _rule(argument) or _rule(name)
    values = list(value) if isinstance(value, list | ListConfig) else [value]
    numbers = [each for each in values if isinstance(each, int | float) and not isinstance(each, bool)]
    if rule and not all(_lies_in(each, rule) for each in numbers):
        at_least = rule.removeprefix("[").removesuffix(", inf)")
        wanted = f"at least {at_least}" if f"[{at_least}, inf)" == rule else f"in {rule}"
        raise UsageError(f"{name}={literal(value)} must be {wanted}")
    of_others = name == "optimizer.betas" and not argument.startswith(("src.", "torch."))
    if name in PAIRS and isinstance(value, list | ListConfig) and len(value) != 2 and not of_others:
        raise UsageError(f"{name}={literal(value)} must be two numbers, such as {PAIRS[name]}")
    if other := FOREIGN_VALUES.get(f"{name.rpartition('.')[2]}={value}"):
        raise UsageError(f"{name}={value} is a name of another library; type {name}={other}")
    choices = CHOICES.get(name)
    if choices is None or value is None or isinstance(value, dict | DictConfig):
        return
    for each in values or ["[]"]:
        if each not in choices and "${" not in str(each):
            raise UsageError(f"{name}={each} must be one of {', '.join(choices)}")


def check_type(name: str, default: Any, value: Any, typed: str = "") -> None:
    """Raise UsageError for a value whose type differs from its default's, and for an empty or not finite value.

    A default that is a string allows any value but null. A default of null allows any type, unless `EXAMPLES` has one.
    An empty string as a folder would mean the current one. The message shows the value as it was `typed`, if that is
    known.
    """
    if value is None and ("." in name or name in NULLABLE):
        return
    if isinstance(value, str) and "${" in value:
        return
    if isinstance(value, str) and not value.strip() and default != "" and name not in ALLOW_EMPTY:
        raise UsageError(f"{name}= is empty; give a value, or leave it out")
    if isinstance(value, bool) and name in PATHS:
        shown = f"{name.removesuffix('.path')}={literal(value)}"
        raise UsageError(f"{shown} must be a path or a name of the Hub; type {name.removesuffix('.path')}=FOLDER")
    _check_finite(name, default, value)
    default = EXAMPLES.get(name, default) if default is None else default
    if isinstance(default, dict) and isinstance(value, str) and name in CHOICES:  # `check_value` has the choices
        return
    if name in LENGTHS and isinstance(value, list):
        default = [0.05, 0.1]
    elif value in WORDS.get(name, ()) or (
        name in SEVERAL_TYPES and isinstance(value, int | float | list) and not isinstance(value, bool)
    ):
        return
    if value is None and isinstance(default, str):
        raise UsageError(f"{name}=null must have a value, such as {default}")
    if isinstance(default, list) and default and all(isinstance(each, int | float) for each in default):
        others = [each for each in value if isinstance(each, str | bool)] if isinstance(value, list) else []
        if any("${" not in str(each) for each in others):
            raise UsageError(f"{name}={typed or literal(value)} must be a list of numbers, such as {literal(default)}")
    for kind, fits, rule in (
        (bool, bool, "true or false"),
        (int, int, "an integer"),
        (float, (int, float), "a number"),
        (list, list, "a list"),
        (dict, dict, "a node of settings"),
    ):
        if isinstance(default, kind):
            if not isinstance(value, fits) or isinstance(value, bool) != isinstance(default, bool):
                raise UsageError(f"{name}={typed or literal(value)} must be {rule}{_example(name, default, value)}")
            return


def _example(name: str, default: Any, value: Any) -> str:
    """Return the end of the error about a value of a wrong type: what to type instead, or the default."""
    if isinstance(default, dict):
        has_switch = "enabled" in default and isinstance(value, bool)
        if has_switch or value is False:
            return f"; type {name}.enabled={literal(value)}" if has_switch else f"; type {name}=null"
        return f"; its settings are {first_names([f'{name}.{key}' for key in default if key[0] != '_'])}"
    if isinstance(default, bool) or "${" in str(default):
        return ", or the length of an average, such as 0.1" if name == "ema" else ""
    if isinstance(default, int):
        if isinstance(value, float) and value.is_integer():
            return f"; type {name}={int(value)}"
        if ends := re.fullmatch(r"(\d+)\.\.\.?(\d+)", str(value)):
            sweep = f"-m '{name}=range({ends[1]},{int(ends[2]) + 1})'"
            return f", such as {default}; for one job per value type {sweep}"
    shown = re.sub(r"[' ]", "", str(default)) if isinstance(default, list) else default  # as it is typed
    return f", such as {shown}"


def _check_finite(name: str, default: Any, value: Any) -> None:
    """Raise UsageError for NaN, and for infinity unless the default is infinite; check lists and dictionaries too."""
    if isinstance(value, dict):
        for key, each in value.items():
            _check_finite(f"{name}.{key}", default.get(key) if isinstance(default, dict) else None, each)
    elif isinstance(value, list):
        for each in value:
            _check_finite(name, next(iter(default), None) if isinstance(default, list) else None, each)
    elif isinstance(value, float) and not math.isfinite(value):
        unbounded = isinstance(default, float) and math.isinf(default)
        if not (value > 0 and (unbounded or name in ALLOW_INFINITE)):
            raise UsageError(f"{name}={value} must be a finite number")


def check_resolved(cfg: DictConfig, names: Sequence[str]) -> None:
    """Raise UsageError for a setting without a value, and for an interpolation that no running job can resolve."""
    for name in names:
        parent, _, key = name.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        if not isinstance(node, DictConfig) or node._get_node(key) is None:  # a key with a dot, as of a column
            continue
        if OmegaConf.is_missing(node, key):
            alias = parent == "data" and "root" in node and not OmegaConf.is_interpolation(node, "root")
            instead = f" instead of {format_override('data.root', node.root)}" if alias and key != "root" else ""
            raise UsageError(f"{name} has no default; add {name}=...{instead}")
        try:
            if isinstance(value := node[key], ListConfig):
                OmegaConf.to_container(value, resolve=True)
        except InterpolationToMissingValueError:  # of a setting that is in `names`, too
            continue
        except OmegaConfBaseException as error:
            reason = first_line(error)
            if re.search(r"hydra$|HydraConfig", reason):  # which only a running job has
                continue
            plain: Any = OmegaConf.to_container(node, resolve=False)
            if not isinstance(error, InterpolationKeyError):
                raise UsageError(f"{name}={plain[key]} cannot be resolved ({reason}); correct it") from error
            absent = reason.split("'")[1]
            fix = did_you_mean(absent, names, "correct it; --help lists the settings")
            if name.startswith("model.") and absent.startswith("data."):
                fix = "choose a model that fits the data: model=mlp for points, model=unet_* or dit_* for images"
            message = f"{name}={plain[key]} refers to {absent}, which the configuration lacks; {fix}"
            raise UsageError(message) from error


def _lies_in(value: float, rule: str) -> bool:
    match = re.match(r"([\[(])([^,]+), ([^\])]+)([\])])", rule)
    assert match, rule
    low, high = (LIMIT[text] if text in LIMIT else float(text) for text in match.group(2, 3))
    above = value >= low if match[1] == "[" else value > low
    return above and (value <= high if match[4] == "]" else value < high)


def _leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield name, value and `_target_` argument of each resolvable setting outside nodes of other packages."""
    target = str(node._get_node("_target_", validate_access=False) or "")
    if target not in ("", "None") and not target.startswith(("src.", "torch.optim.", "lightning.")):
        return
    for key in map(str, node):
        try:
            value = None if OmegaConf.is_missing(node, key) else node[key]
        except OmegaConfBaseException:  # an interpolation that only the running job resolves
            continue
        if isinstance(value, DictConfig):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value, f"{target}.{key}" if target else ""
