"""Check overrides before any slow import: raise Hydra's errors with a hint about what to type instead."""

import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import lru_cache
from typing import Any, NamedTuple

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from src.config.combinations import check_combinations, check_required
from src.config.compose import compose, initialized, key_hint, setting_names
from src.config.rules import (
    CHOICES,
    EXAMPLES,
    RECIPE,
    check_resolved,
    check_type,
    check_value,
    check_values,
)
from src.config.search_path import config_folders, config_groups, load_option, unknown_option
from src.config.trainer_rules import check_trainer
from src.config.words import key_of, last_value, parse_words, parsed
from src.errors import UsageError, first_names, format_override, near_matches, shell_word

MERGED_GROUPS = ("callbacks", "experiment", "logger", "sweep", "trainer")
"""Groups that merge several options into one configuration, as in logger=[csv,wandb]."""

LISTS = (
    *("names", "runs", "cond", "features", "length", "analytic_spacing", "evaluate.ema"),
    *("data.root", "data.columns", "data.condition_columns"),
)
"""Settings, some of one command, that may be lists although their default is not one."""

SUGGESTED = {read: suggested for suggested, read in RECIPE.items()}


def check_overrides(
    config_name: str, overrides: Sequence[str], multirun: bool = False, added: Sequence[str] = ()
) -> DictConfig:
    """Check overrides and return the composed configuration, with Hydra's own node; of a sweep, its first job.

    Every value of a sweep is checked, and one job for each combination of swept options of groups. `added` are the
    folders that Hydra searches besides conf/. Raises UsageError for overrides that Hydra rejects and for invalid
    values.
    """
    command = _Command(config_name, multirun, added, config_groups(config_folders(added)))
    read = parse_words(config_name, overrides, command.groups)
    first, *others = _jobs(read, command.groups) if multirun else [read]
    base, final = _compose_job(command, first)
    _check_composed(command, first, base, final)
    check_resolved(final, [o.key_or_group for o in read if _is_hydras(o) and "${" in str(o.input_line)])
    for job in others:
        try:
            _check_composed(command, job, *_compose_job(command, job, base))
        except UsageError as error:
            raise UsageError(f"{' '.join(str(o.input_line) for o in job if o not in read)}: {error}") from error
    params = (final.hydra.sweeper.get("params") if multirun else None) or {}
    preset = [f"{name}={value}" for name, value in params.items()]
    if missing := [each for each in preset if key_of(each) not in {o.key_or_group for o in read}]:
        return check_overrides(config_name, [*missing, *overrides], multirun, added)
    return final


class _Command(NamedTuple):
    """A command whose overrides are checked: the folders `added` to Hydra's search path, the options of all groups."""

    name: str
    multirun: bool
    added: Sequence[str]
    groups: dict[str, list[str]]


def _jobs(read: Sequence[Override], groups: Mapping[str, Sequence[str]]) -> Iterator[list[Override]]:
    """Yield the overrides of a job for each combination of swept options of groups; sweeps of settings stay."""
    values = [
        [parsed(f"{override.get_key_element()}={value}") for value in override.sweep_string_iterator()]
        if override.key_or_group in groups and override.is_discrete_sweep()
        else [override]
        for override in read
    ]
    yield from map(list, itertools.product(*values))


def _compose_job(
    command: _Command, read: Sequence[Override], base: DictConfig | None = None
) -> tuple[DictConfig, DictConfig]:
    """Return the configuration of a job without its settings, or `base` of an earlier job, and with them.

    With `base` Hydra's own settings are those of the default. Raises UsageError for an unknown key.
    """
    name, _, added, groups = command
    choices = _choices(read, groups, added)
    with initialized():
        if base is not None:
            return base, _compose_cached(name, tuple(_first_value(o) for o in read if not _is_hydras(o)), tuple(added))
        base = _compose_cached(name, tuple(map(_first_value, choices)), tuple(added))
        for override in read:
            _check_sweep(command, override, read, base)
            if override.key_or_group not in groups and not _is_hydras(override):
                _check_key(override, read, base, groups)
        if len(choices) == len(read):
            return base, deepcopy(base)
        return base, compose(name, list(map(_first_value, read)), added, setting_names(base), groups)


def _check_typed(command: _Command, read: Sequence[Override], base: DictConfig, final: DictConfig) -> None:
    """Raise UsageError for a typed value of a wrong type or outside its range, and for a setting without effect."""
    plain, composed = (OmegaConf.to_container(each, resolve=False) for each in (base, final))
    for override in read:
        name = str(override.key_or_group)
        if name in command.groups or override.is_delete() or name.startswith("hydra/"):
            continue
        parent, _, key = name.rpartition(".")
        argument = f"{_select(composed, f'{parent}._target_')}.{key}"
        default = _select(plain, name)
        if default == f"${{{SUGGESTED.get(name)}}}":
            default = _select(plain, SUGGESTED[name])
        for value in _values(override):
            typed = "" if override.is_sweep_override() else str(override.input_line).partition("=")[2]
            if not name.startswith("hydra."):
                check_type(name, default, value, typed)
            check_value(name, value, argument)
        if name in RECIPE and f"${{{name}}}" not in str(composed):
            warnings.warn(f"{override.input_line} has no effect; set {RECIPE[name]}", stacklevel=3)
    line = next((o.input_line for o in reversed(read) if o.key_or_group == "data.root"), None)
    if line and not command.multirun and _select(plain, "data._target_") and _select(plain, "data.root") is None:
        choice = base.hydra.runtime.choices.data
        raise UsageError(f"{line} has no effect with data={choice}, which has no files; add data=folder")


def _check_composed(command: _Command, read: Sequence[Override], base: DictConfig, final: DictConfig) -> None:
    """Raise UsageError for settings that are invalid, missing, or exclude each other."""
    for override in read:  # Hydra takes a group that does not exist for a setting with a slash in its name
        if "/" in (name := str(override.key_or_group)) and name in final:
            dotted = shell_word(str(override.input_line).replace(name, name.replace("/", "."), 1))
            raise UsageError(f"{override.input_line}: no group is named {name}; for a setting type {dotted}")
    _check_typed(command, read, base, final)
    check_required(command.name, base, final, command.groups)
    last = {str(override.key_or_group): override for override in read}
    typed = {name: str(override.input_line) for name, override in last.items() if override.value() is not None}
    if "sweep" in typed and not (command.multirun or "resume" in typed):  # a resumed job of a sweep repeats it
        raise UsageError(f"{typed['sweep']} needs -m, which runs one job for each combination of its values")
    task = OmegaConf.masked_copy(final, [str(key) for key in final if key != "hydra"])
    check_combinations(command.name, typed, task)
    check_resolved(task, setting_names(task))
    check_values(task, command.name)
    if command.name == "train":
        check_trainer(task)


def chosen_options(config_name: str, overrides: Sequence[str], added: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return the options of all groups that these overrides choose, without checking any other setting.

    Raises UsageError for an unknown option, and for an override that Hydra cannot parse.
    """
    groups = config_groups(config_folders(added))
    choices = _choices(parse_words(config_name, overrides, groups), groups, added)
    if not choices:
        return {}
    with initialized():
        composed = _compose_cached(config_name, tuple(map(_first_value, choices)), tuple(added))
    chosen = {str(group): [str(option)] for group, option in composed.hydra.runtime.choices.items()}
    return chosen | {override.key_or_group: _options(override) for override in choices}  # it lacks lists of options


def _choices(read: Sequence[Override], groups: dict[str, list[str]], added: Sequence[str]) -> list[Override]:
    """Return the overrides that choose an option.

    Raises UsageError for an unknown option, and for several options of a group that takes one.
    """
    folders = config_folders(added)
    anywhere = any("pkg://" in each for each in added)  # options in a package cannot be listed here
    choices = [override for override in read if override.key_or_group in groups and _chooses(override)]
    for override in choices:
        name, options = override.key_or_group, _options(override)
        for option in options:
            exists = option in groups[name] or any((f / name / f"{option}.yaml").is_file() for f in folders)
            if not (exists or anywhere):
                raise UsageError(unknown_option(name, option, groups[name]))
        if isinstance(override.value(), list) and len(options) > 1 and name not in MERGED_GROUPS:
            raise UsageError(
                f"{override.input_line} would merge several files into one {name}; to run one job for each type "
                f"-m {name}={','.join(options)}"
            )
    return choices


@lru_cache(maxsize=64)
def _compose_cached(config_name: str, overrides: tuple[str, ...], added: tuple[str, ...]) -> DictConfig:
    """Compose a configuration, once for all that ask for these overrides."""
    return compose(config_name, overrides, added, (), config_groups(config_folders(added)))


def expand_grid(config_name: str, overrides: Sequence[str], group: str, added: Sequence[str] = ()) -> list[str]:
    """Replace sweeps over `group` and its settings by one override `<group>s` that lists all combinations.

    `sampler=ddim,heun sampler.steps=10,20` becomes `samplers=[{sampler:ddim,steps:10},...]`. Each combination is
    checked. Raises UsageError for an invalid combination, and for intervals, whose values cannot be listed.
    """
    try:
        read = [parsed(override) for override in overrides]
    except HydraException:  # `check_overrides` reports it
        return list(overrides)
    own = [o for o in read if o.key_or_group.split(".")[0] == group]
    if not any(o.is_sweep_override() for o in own):
        return list(overrides)
    rest = [str(o.input_line) for o in read if o not in own]
    if others := [o for o in read if o.key_or_group == f"{group}s"]:
        raise UsageError(f"{own[0].input_line} and {others[0].input_line} exclude each other; leave one out")
    if wrong := [o for o in own if o.is_sweep_override() and not (o.is_choice_sweep() or o.is_range_sweep())]:
        raise UsageError(f"{wrong[0].input_line} is an interval; list its values, as in 10,20,50")
    (jobs,) = BasicSweeper.split_arguments(own, max_batch_size=None)
    items = []
    for job in jobs:
        check_overrides(config_name, [*rest, *job], added=added)
        items.append(",".join(each.lstrip("+").removeprefix(f"{group}.").replace("=", ":", 1) for each in job))
    return [*rest, f"{group}s=[{','.join(f'{{{item}}}' for item in items)}]"]


def _check_sweep(command: _Command, override: Override, read: Sequence[Override], base: DictConfig) -> None:
    """Raise UsageError for a sweep without -m or without a sweeper for it, and for values of a sweep set to null."""
    is_params = re.match(r"hydra\.sweeper\.params\b", override.key_or_group) and override.value() is not None
    if is_params and base.hydra.sweeper.get("params") is None:
        raise UsageError(f"{override.input_line} is for configuration files; type the values, as in -m seed=0,1")
    is_basic = base.hydra.sweeper._target_.endswith(".BasicSweeper")
    if override.is_interval_sweep() and is_basic and "hydra/sweeper" not in {o.key_or_group for o in read}:
        raise UsageError(f"{override.input_line} is an interval; add -m hydra/sweeper=search to search it")
    if override.is_sweep_override() and not command.multirun:
        name, _, value = str(override.input_line).partition("=")
        default = OmegaConf.select(base, name, throw_on_missing=False, throw_on_resolution_failure=False)
        default = EXAMPLES.get(name, default)
        is_text = isinstance(default, str | None) and name not in {*command.groups, *CHOICES}
        as_text = f", or type {format_override(name, value)} if it is one value" if is_text else ""
        if isinstance(default, float) and re.fullmatch(r"-?\d+,\d+", value):
            as_text = f", or type {name}={value.replace(',', '.')} for a number with decimals"
        is_list = isinstance(default, list | ListConfig) or not {name, f"{command.name}.{name}"}.isdisjoint(LISTS)
        of_lists = override.is_choice_sweep() and all(isinstance(each, list) for each in _values(override))
        if name in MERGED_GROUPS and override.is_choice_sweep():
            as_text = f", or type {shell_word(f'{name}=[{value}]')} to merge them"
        if override.is_choice_sweep() and is_list and not of_lists:
            raise UsageError(f"{override.input_line} is a sweep; for a list type {shell_word(f'{name}=[{value}]')}")
        raise UsageError(f"{override.input_line} is a sweep; add -m to run one job per value{as_text}")


def _check_key(override: Override, read: Sequence[Override], base: DictConfig, groups: dict[str, list[str]]) -> None:
    """Raise UsageError for an unknown key if other options or a `_target_` give a hint; Hydra refuses the others.

    Warns about an added key that may be misspelled.
    """
    key, line = str(override.key_or_group), str(override.input_line)
    if key == "run_dir":  # Hydra's files must be next to the checkpoints
        folder = last_value([line], "run_dir") or "FOLDER"
        raise UsageError(f"{line} is set by Hydra's run folder; type {format_override('hydra.run.dir', folder)}")
    names = setting_names(base)
    if key in names or override.is_delete():
        return
    parent, _, last = key.rpartition(".")
    node = _fixed_node(parent, read, base, groups) if parent in names and not last.startswith("_") else None
    target = "" if node is None else str(node._target_)
    hint = key_hint(key, _first_value(override).partition("=")[2], names, groups)
    other = _other_option(key, groups) if key.partition(".")[0] in names else ""
    if other and base.get("task") == "autoencoder" and key.partition(".")[0] in ("callbacks", "loss", "model"):
        raise UsageError(f"{line} has no effect with task=autoencoder; leave it out")
    if node is not None and target.startswith("src."):  # our YAMLs list every argument
        takes = first_names([name for name in map(str, node) if name[0] != "_"], 20) or "no settings"
        fix = other or hint.removeprefix("; ") or f"it takes {takes}"
        raise UsageError(f"{line}: {target} has no argument '{last}'; {fix}")
    if override.is_add() or override.is_force_add():
        added_node = key.endswith("._target_") or key.startswith(("callbacks.", "logger."))  # the user's own
        if hint and not (added_node or "/" in key) and near_matches(key, [*names, *groups], cutoff=0.8):
            warnings.warn(f"{line} adds a new setting{hint}", stacklevel=2)
    elif other or (target and not hint):
        fix = other or f"type {shell_word(f'+{line}')} if {target} has this argument"
        raise UsageError(f"unknown setting '{key}' in {line}; {fix}")


def _fixed_node(
    name: str, read: Sequence[Override], base: DictConfig, groups: dict[str, list[str]]
) -> DictConfig | None:
    """Return a node with a `_target_`; None for other nodes, and if an override sets the node or its `_target_`."""
    node = OmegaConf.select(base, name)
    if not isinstance(node, DictConfig) or not node.get("_target_"):
        return None
    keys = {str(each.key_or_group) for each in read} - groups.keys()
    is_typed = any(key == f"{name}._target_" or f"{name}.".startswith(f"{key}.") for key in keys)
    return None if is_typed else node


def _other_option(key: str, groups: dict[str, list[str]]) -> str:
    """Return the hint that other options of a group have a setting; empty if none has it."""
    group, _, rest = key.partition(".")
    found = []
    for option in groups.get(group, ()) if rest else ():
        with suppress(ValueError):  # a defaults list with options of another folder
            if not {rest, key}.isdisjoint(setting_names(load_option(group, option))):
                found.append(f"{group}={option}")
    if found == [f"{group}=autoencoder"]:
        return "task=autoencoder has it: choose this"
    found = [each for each in found if each != f"{group}=autoencoder"]
    return f"{first_names(found, 3)} {'has' if len(found) == 1 else 'have'} it: choose one" if found else ""


def _is_hydras(override: Override) -> bool:
    """Return whether an override is of Hydra's own settings."""
    return str(override.key_or_group).startswith(("hydra.", "hydra/"))


def _select(plain: Any, name: str) -> Any:
    """Return the value at a dotted name in nested dictionaries; None if there is none."""
    for part in name.split("."):
        plain = plain.get(part) if isinstance(plain, dict) else None
    return plain


def _chooses(override: Override) -> bool:
    """Return whether an override of a group chooses options; optimizer={lr:0.1} sets values of the chosen one."""
    return not override.is_delete() and not isinstance(parsed(_first_value(override)).value(), dict)


def _options(override: Override) -> list[str]:
    """Return the options that an override of a group names."""
    if override.is_sweep_override():
        values = [str(v) for v in override.sweep_string_iterator()] if override.is_choice_sweep() else []
    else:
        value = override.get_value_element_as_str()
        values = [value.lower() if isinstance(override.value(), bool) else value]
    return [part.strip().strip("'\"") for v in values for part in v.strip("[]").split(",") if part.strip()]


def _first_value(override: Override) -> str:
    """Return the override; for a sweep, the override with its first value."""
    if not override.is_sweep_override():
        return str(override.input_line)
    value = override.value()
    first = value.start if isinstance(value, IntervalSweep) else next(iter(override.sweep_string_iterator()))
    return f"{override.get_key_element()}={first}"


def _values(override: Override) -> list[Any]:
    """Return the value of an override, or the values of a sweep; for an interval, its ends."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [value.start, value.end]
    return list(override.sweep_iterator(Override._convert_value)) if override.is_sweep_override() else [value]
