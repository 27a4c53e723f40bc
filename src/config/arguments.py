"""Check a configuration against the signatures of its targets before anything is built."""

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union

from hydra.utils import get_method
from omegaconf import DictConfig, ListConfig
from omegaconf.errors import InterpolationKeyError

GRID_SETTINGS = ("steps", "spacing")
"""Settings of a sampler's YAML that define the time grid and are not arguments of its function."""


def check_arguments(cfg: DictConfig, name: str = "") -> None:
    """Check every node with a `_target_` against the target's signature.

    Raises ValueError for unknown arguments and for values that do not match the annotated type.
    """
    if "_target_" in cfg:
        target = get_method(cfg._target_)
        signature = inspect.signature(target)
        hints = _hints(target)
        open_ended = any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values())
        for key in map(str, cfg):
            if key.startswith("_"):
                continue
            if name == "sampler" and key in GRID_SETTINGS:
                if key == "steps" and not _matches(cfg[key], int):
                    raise ValueError(f"{name}.steps={cfg[key]} must be an integer")
                continue
            dotted = f"{name}.{key}"
            if key not in signature.parameters and not open_ended:
                # Our code passes the arguments without defaults of our own functions.
                ours = str(cfg._target_).startswith("src.")
                known = [k for k, p in signature.parameters.items() if p.default is not p.empty or not ours]
                known += GRID_SETTINGS if name == "sampler" else ()
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {name}.{close[0]}?" if close else f"it takes {', '.join(known[:12])}"
                if cfg[key] is not None:  # another option may set it
                    hint += f"; if another option sets it, type ~{dotted}"
                raise ValueError(f"unknown setting '{dotted}' for {cfg._target_}; {hint}")
            try:
                value = cfg[key]
            except InterpolationKeyError as error:
                absent = str(error).split("'")[1]
                raise ValueError(
                    f"{dotted} refers to {absent}, which the configuration lacks; choose a model that fits the data: "
                    "model=mlp for points, model=unet_* for images"
                ) from error
            if isinstance(value, DictConfig) or (name == "trainer" and value is None):  # Lightning's default
                continue
            if key in hints and not _matches(value, hints[key]):
                shown = "null" if value is None else value
                raise ValueError(f"{dotted}={shown} must be {_describe(hints[key])}")
    for key in map(str, cfg):
        if isinstance(node := cfg._get_node(key), DictConfig) and not node._is_none():
            check_arguments(node, f"{name}.{key}".lstrip("."))


def _hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):
        return {}


def _matches(value: Any, hint: Any) -> bool:
    """Return whether a value matches an annotation; annotations of other types always match."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_matches(value, option) for option in args)
    if origin is Literal:
        return value in args
    if origin is Callable:  # a node with a _target_, which is checked by itself
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
        return "a node with the _target_ of a function"
    if hint in (bool, int, float, str):
        return {bool: "true or false", int: "an integer", float: "a number", str: "text"}[hint]
    return hint.__name__ if inspect.isclass(hint) else str(hint).replace("typing.", "").replace("collections.abc.", "")
