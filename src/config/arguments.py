"""Check a configuration against the signatures of its targets before anything is built."""

import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union

from omegaconf import DictConfig, ListConfig

from src.config.compose import setting_names
from src.config.rules import check_resolved
from src.errors import first_names, near_matches, sentence

GRID_SETTINGS = ("steps", "spacing")
"""Settings of a sampler's YAML that define the time grid and are not arguments of its function."""
PASSED_BY_CODE = {"lr_scheduler": 2}
"""Number of arguments, the first ones, with which code calls the target of a `_partial_` node; 1 for other nodes."""


def check_arguments(cfg: DictConfig, name: str = "") -> None:
    """Check every node with a `_target_` against the target's signature.

    Raises ValueError for unknown arguments, values that do not match the annotated type, and, in a whole configuration,
    values that are missing or cannot be resolved.
    """
    if not name:
        check_resolved(cfg, setting_names(cfg))
    if "_target_" in cfg:
        target = import_target(f"{name}._target_", str(cfg._target_))
        by_code = PASSED_BY_CODE.get(name, 1) if cfg.get("_partial_") else 0
        parameters = dict(list(inspect.signature(target).parameters.items())[by_code:])
        hints = _hints(target)
        keys = [key for key in map(str, cfg) if not key.startswith("_")]
        if name == "sampler":
            if not _matches(cfg.get("steps", 1), int):
                raise ValueError(f"{name}.steps={cfg.steps} must be an integer")
            keys = [key for key in keys if key not in GRID_SETTINGS]
        unknown = [key for key in keys if key not in parameters]
        if unknown and not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
            raise ValueError(_unknown_arguments(cfg, name, unknown, parameters))
        for key in keys:
            dotted = f"{name}.{key}"
            value = cfg[key]
            if isinstance(value, DictConfig) or (name == "trainer" and value is None):  # Lightning's default
                continue
            if key in hints and not _matches(value, hints[key]):
                shown = "null" if value is None else value
                number = re.match(r"\d+(\.\d+)?", str(value)) if isinstance(value, str) else None  # with a unit
                example = f", such as {number[0]}" if number and _matches(float(number[0]), hints[key]) else ""
                raise ValueError(f"{dotted}={shown} must be {_describe(hints[key])}{example}")
    for key in map(str, cfg):
        if isinstance(node := cfg._get_node(key), DictConfig) and not node._is_none():
            check_arguments(node, f"{name}.{key}".lstrip("."))


def import_target(setting: str, path: str) -> Any:
    """Return the class or function at a dotted path. Raises ValueError, with the reason, if it cannot be imported."""
    try:
        try:
            target = pkgutil.resolve_name(path)
        except AttributeError:  # which hides an ImportError in the module
            importlib.import_module(path.rpartition(".")[0])
            raise
        if callable(target):
            return target
        raise TypeError("it is neither a class nor a function")
    except Exception as error:  # the user's module may raise anything
        raise ValueError(
            f"{setting}={path} cannot be imported ({sentence(error)}); correct the name, or type PYTHONPATH=FOLDER in "
            "front of python for a module in FOLDER"
        ) from error


def _unknown_arguments(cfg: DictConfig, name: str, unknown: Sequence[str], parameters: Mapping[str, Any]) -> str:
    """Return the message for the keys of a node that its target does not take."""
    # Our functions get the arguments without defaults from code, not from the configuration.
    ours = str(cfg._target_).startswith("src.")
    known = [k for k, p in parameters.items() if p.default is not p.empty or not ours]
    known += GRID_SETTINGS if name == "sampler" else ()
    known = [*(key for key in map(str, cfg) if key in known), *(k for k in known if k not in cfg)]  # as in the YAML
    close = near_matches(unknown[0], known) if len(unknown) == 1 else []
    hint = f"did you mean {name}.{close[0]}?" if close else f"it takes {first_names(known, 12)}"
    removable = [f"~{name}.{key}" for key in unknown if cfg[key] is not None]  # another option may set them
    if removable and not close:
        hint += f"; if another option sets it, type {' '.join(removable)}"
    shown = ", ".join(f"'{name}.{key}'" for key in unknown)
    return f"unknown setting{'s' if len(unknown) > 1 else ''} {shown} for {cfg._target_}; {hint}"


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
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    literals = [typing.get_args(option) for option in options if typing.get_origin(option) is Literal]
    texts = dict.fromkeys(str(text) for each in literals for text in each)  # Lightning repeats some
    described = [_describe_type(option) for option in options if typing.get_origin(option) is not Literal]
    return " or ".join([*([f"one of {', '.join(texts)}"] if texts else []), *described])


def _describe_type(hint: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "an integer", float: "a number", str: "text"}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Callable:
        return "a node with the _target_ of a function"
    if inspect.isclass(origin) and issubclass(origin, Sequence) and args:
        return f"a list, each {_describe(args[0])}"
    if hint in names:
        return names[hint]
    return hint.__name__ if inspect.isclass(hint) else str(hint).replace("typing.", "").replace("collections.abc.", "")
