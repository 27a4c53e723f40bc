"""What a configuration that came in a file may ask for, since the file may be a stranger's.

Hydra finds anything behind a dotted name, `src.rng.torch.os.system` too, and calls it. So a name is believed only if
it is, in full, one that the project's own YAMLs have in the same place; and a text is only a text: no `${...}`, which
OmegaConf would look up.
"""

import functools
from collections.abc import Iterator, Mapping, Set
from typing import Any, NamedTuple

import yaml

from src.config.overrides import CONF
from src.training.checkpoints import walk_settings

TRAINING_GROUPS = ("callbacks", "logger", "lr_scheduler", "optimizer", "trainer")
"""Groups of conf/ from which a run that is only opened builds nothing."""

OPTIMIZERS = ("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD")
"""Of torch.optim, all as good as the one that conf/ names."""


class Target(NamedTuple):
    """What is called, from the node called `place`; now or, `partial`, by what it is given to."""

    place: str
    name: str
    partial: bool


@functools.cache
def known_targets(training: bool = False) -> frozenset[Target]:
    """All that files under conf/ have as `_target_`; with `training` also what only training needs."""
    found = {Target("optimizer", f"torch.optim.{name}", True) for name in OPTIMIZERS if training}
    for file in CONF.rglob("*.yaml"):
        text, group = file.read_text(), file.parent.name
        if CONF / "hydra" in file.parents:  # of how Hydra works, not of a run
            continue
        if training or group not in TRAINING_GROUPS:
            top = "" if file.parent == CONF or "@package _global_" in text else group
            found |= set(_targets(yaml.safe_load(text), top))
    return frozenset(found)


def _targets(node: Any, top: str = "") -> Iterator[Target]:
    for name, value in walk_settings(node):
        if isinstance(value, dict) and value.get("_target_") is not None:
            yield Target(_last(name) or top, value["_target_"], bool(value.get("_partial_")))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def check_texts(settings: Mapping[str, Any], source: object) -> None:
    """Raise ValueError if a text in nested plain values would be looked up by OmegaConf, or not be shown as it is."""
    for name, value in walk_settings(settings):
        if isinstance(value, str) and ("${" in value or not value.isprintable()):
            raise ValueError(f"{source} asks for {name}={value!r:.80}, which is no plain text{_remedy(source)}")


def check_targets(settings: Mapping[Any, Any], known: Set[Target], source: object) -> None:
    """Raise ValueError if something else than `known` is called in nested plain values, or is called out of sight."""
    for name, value in walk_settings(settings):
        if isinstance(value, dict) and "_target_" in value:
            target, later = value["_target_"], value.get("_partial_", False)
            if not (isinstance(target, str) and isinstance(later, bool)) or (
                Target(_last(name), target, later) not in known
            ):
                how = f" with _partial_={later!r:.20}" if "_partial_" in value else ""
                raise ValueError(
                    f"{source} asks for {name}._target_={target!r:.80}{how}, which no file under conf/ has there"
                    f"{_remedy(source)}"
                )
        if _last(name) in ("_args_", "_convert_", "_recursive_", "download", "prepare"):
            raise ValueError(f"{source} asks for {name}, which no file under conf/ has{_remedy(source)}")


def _remedy(source: object) -> str:
    return f": nothing was built; if you know what it does, or made {source} yourself, add trust=true"
