"""Hold a configuration against the signatures of what it builds, before anything is built."""

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union

from hydra.utils import get_method
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

GRID_SETTINGS = ("steps", "spacing")
"""What a sampler's YAML holds beside the arguments of its function: the grid that it walks."""

SAMPLERS = ("src.diffusion.samplers", "src.interop.diffusers_samplers")


def check_arguments(cfg: DictConfig, name: str = "") -> None:
    """Hold every `_target_` against its signature: unknown arguments, and values of another type than declared."""
    if "_target_" in cfg:
        target = get_method(cfg._target_)
        signature = inspect.signature(target)
        hints = _hints(target)
        open_ended = any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values())
        for key in map(str, cfg):
            of_grid = key in GRID_SETTINGS and str(cfg._target_).startswith(SAMPLERS)
            if key == "steps" and of_grid and not _matches(cfg[key], int):
                raise ValueError(f"{name}.steps={cfg[key]} is of the wrong type: it must be int")
            if key.startswith("_") or of_grid:
                continue
            dotted = f"{name}.{key}"
            if key not in signature.parameters and not open_ended:
                # What has no default is given by the program, in functions of ours.
                ours = str(cfg._target_).startswith("src.")
                known = [k for k, p in signature.parameters.items() if p.default is not p.empty or not ours]
                known += GRID_SETTINGS if str(cfg._target_).startswith("src.diffusion.samplers") else ()
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {name}.{close[0]}?" if close else f"it takes {', '.join(known[:12])}"
                if cfg[key] is not None:  # perhaps brought along by another choice
                    hint += f"; if you did not give it, another choice brought it along, and ~{dotted} leaves it out"
                raise ValueError(f"unknown setting '{dotted}' for {cfg._target_}: {hint}")
            try:
                value = cfg[key]
            except InterpolationKeyError as error:
                absent = str(error).split("'")[1]
                raise ValueError(
                    f"{dotted} asks for {absent}, which the configuration lacks: leave it in, and "
                    "choose a model that fits the data, model=mlp for points, model=unet_* for images"
                ) from error
            if isinstance(value, DictConfig) or (name == "trainer" and value is None):  # Lightning's default
                continue
            if key in hints and not _matches(value, hints[key]):
                shown = "null" if value is None else value
                raise ValueError(f"{dotted}={shown} is of the wrong type: it must be {_describe(hints[key])}")
    for key in map(str, cfg):
        if isinstance(node := cfg._get_node(key), DictConfig) and not node._is_none():
            check_arguments(node, f"{name}.{key}".lstrip("."))


def check_counts(cfg: DictConfig, *names: str) -> None:
    """Raise ValueError if one of these settings, where it is not null, is below 1."""
    for name in names:
        value = OmegaConf.select(cfg, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def check_names(cfg: DictConfig, name: str) -> None:
    """Raise ValueError if a setting is neither null, a name nor a list of names."""
    value = cfg[name]
    if not all(isinstance(each, str) for each in (value if isinstance(value, ListConfig) else [value or ""])):
        raise ValueError(f"{name}={value} must be a name or a list of names")


def check_seeds(cfg: DictConfig, prefix: str = "") -> None:
    """Raise ValueError if a seed, at any depth, does not lie in [0, 2^32), for which NumPy has generators."""
    for key in map(str, cfg):
        node = cfg._get_node(key)
        if isinstance(node, DictConfig):
            if not node._is_none():
                check_seeds(node, f"{prefix}{key}.")
        elif (key == "seed" or key.endswith("_seed")) and isinstance(seed := cfg[key], int) and not 0 <= seed < 2**32:
            raise ValueError(f"{prefix}{key}={seed} must lie in [0, 2^32): 0 is usual")


def _hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):
        return {}


def _matches(value: Any, hint: Any) -> bool:
    """Whether a configured value can be what the annotation says; annotations beyond plain values always match."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_matches(value, option) for option in args)
    if origin is Literal:
        return value in args
    if origin is Callable:  # given by a node with a _target_, which is checked by itself
        return False
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Sequence) and args:
        return isinstance(value, ListConfig | list | tuple) and all(_matches(v, args[0]) for v in value)
    return True


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in args)
    if hint is type(None):
        return "null"
    if origin is Callable:
        return "a function, by its _target_"
    return hint.__name__ if inspect.isclass(hint) else str(hint).replace("typing.", "").replace("collections.abc.", "")
