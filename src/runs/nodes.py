"""Nodes of a configuration: what was typed, their plain values, and the objects that they describe."""

import copy
import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from src.config.arguments import import_target
from src.config.words import key_of
from src.errors import shell_word


def is_typed(name: str) -> bool:
    """Return whether the command line of this job sets a setting."""
    return HydraConfig.initialized() and any(key_of(o) == name for o in HydraConfig.get().overrides.task)


def typed_option(group: str) -> str:
    """Return the override of this job's command line that chooses the option of a group; without one, its name."""
    typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return next((shell_word(o) for o in typed if key_of(o) == group), group)


def to_plain(cfg: DictConfig, resolve: bool = True) -> dict[Any, Any]:
    """Return the configuration as nested dictionaries and lists; `resolve` replaces interpolations by their values."""
    container = OmegaConf.to_container(cfg, resolve=resolve)
    assert isinstance(container, dict)
    return container


def instantiate_node(node: DictConfig, arguments: Mapping[str, Any] | None = None) -> Any:
    """Return the object of a node, with further arguments.

    Partial functions lose Hydra's wrapper, which scans all loaded modules at each call. If the constructor raises
    ValueError, TypeError, OSError or ImportError, that error is raised instead of Hydra's InstantiationException.
    """
    try:
        # Plain lists: an optimizer would store OmegaConf lists in checkpoints, which a safe load rejects.
        return _unwrap(instantiate(node, _convert_="all", **(arguments or {})))
    except InstantiationException as error:
        if isinstance(cause := error.__cause__, ValueError | TypeError | OSError | ImportError):
            raise cause from cause.__cause__
        raise


def _unwrap(value: Any) -> Any:
    if not isinstance(value, functools.partial):
        return value
    return functools.partial(value.func, *value.args, **{k: _unwrap(v) for k, v in value.keywords.items()})


def inline_aliases(node: DictConfig, name: str) -> DictConfig:
    """Return a copy of the node `name` without aliases, such as `urls` in `root: ${.urls}`.

    An alias is not an argument of the target; the setting that refers to it gets its value.
    """
    node = copy.deepcopy(node)
    for key, value in to_plain(node, resolve=False).items():
        if isinstance(value, str) and (match := re.fullmatch(r"\$\{\.(\w+)\}", value)):
            target = import_target(f"{name}._target_", str(node._target_))
            if (alias := match[1]) not in inspect.signature(target).parameters:
                node[key] = node[alias]
                with open_dict(node):
                    del node[alias]
    return node
