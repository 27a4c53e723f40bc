"""Check configurations from untrusted files, such as downloaded checkpoints.

Hydra imports and calls anything with a dotted name, `src.rng.torch.os.system` too. Therefore a `_target_` is allowed
only if a YAML file of conf/, or of a config folder on this command line, has the same one under the same key. A string
must not contain `${...}`, because OmegaConf would resolve it.
"""

import functools
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from src.config.search_path import config_folders
from src.training.checkpoints import walk_settings

TRAINING_GROUPS = ("callbacks", "logger", "lr_scheduler", "optimizer", "trainer")
"""Groups of conf/ that opening a run does not instantiate."""

OPTIMIZERS = ("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD")
"""Safe classes of torch.optim."""

REMEDY = (
    "; refusing to instantiate anything: for parts of your own add the --config-dir of their training; if you trust "
    "the author, add trust=true"
)


class Target(NamedTuple):
    """The function or class `name` in the config node `place`; with `partial` it is called later."""

    place: str
    name: str
    partial: bool


def known_targets(training: bool = False) -> frozenset[Target]:
    """Return every `_target_` in conf/ and in the user's config folders; with `training` also those of training only.

    The user's folders are those of `--config-dir` and `hydra.searchpath`, which only the user can name.
    """
    return _known_targets(tuple(config_folders()), training)


@functools.cache
def _known_targets(folders: tuple[Path, ...], training: bool) -> frozenset[Target]:
    found = {Target("optimizer", f"torch.optim.{name}", True) for name in OPTIMIZERS if training}
    for folder, file in ((base, path) for base in folders for path in base.rglob("*.yaml")):
        text, group = file.read_text(), file.parent.name
        if folder / "hydra" in file.parents or (group in TRAINING_GROUPS and not training):
            continue
        top = "" if file.parent == folder or "@package _global_" in text else group
        for name, value in walk_settings(yaml.safe_load(text)):
            if isinstance(value, dict) and value.get("_target_") is not None:
                found.add(Target(_last(name) or top, value["_target_"], bool(value.get("_partial_"))))
    return frozenset(found)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def check_texts(settings: Mapping[str, Any], source: object) -> None:
    """Raise ValueError if a string in nested plain values has an interpolation or unprintable characters."""
    for name, value in walk_settings(settings):
        if isinstance(value, str) and ("${" in value or not value.isprintable()):
            raise ValueError(f"{source} sets {name}={value!r:.80}, which is not plain text{REMEDY}")


def check_targets(settings: Mapping[Any, Any], known: Set[Target], source: object) -> None:
    """Raise ValueError for a `_target_` outside `known`, or a key that changes how Hydra calls it."""
    for name, value in walk_settings(settings):
        if isinstance(value, dict) and "_target_" in value:
            target, later = value["_target_"], value.get("_partial_", False)
            if not (isinstance(target, str) and isinstance(later, bool)) or (
                Target(_last(name), target, later) not in known
            ):
                how = f" with _partial_={later!r:.20}" if "_partial_" in value else ""
                raise ValueError(
                    f"{source} sets {name}._target_={target!r:.80}{how}, which conf/ does not have there{REMEDY}"
                )
        if _last(name) in ("_args_", "_convert_", "_recursive_", "download", "prepare"):
            raise ValueError(f"{source} sets {name}, which conf/ does not have{REMEDY}")
