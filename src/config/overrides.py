"""Check and expand Hydra overrides before the configuration is composed."""

import difflib
import itertools
import math
import re
from collections.abc import Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.errors import UsageError, first_line
from src.quoting import format_override

CONF = Path(__file__).resolve().parents[2] / "conf"

PLUGINS = {"joblib", "optuna", "ray", "ray_aws", "submitit_local", "submitit_slurm"}
"""Hydra's launchers and sweepers that come with an extra, which is the first word of the name."""

OPTIONAL = ("callbacks", "conditioning", "experiment", "logger", "sweep")
"""Groups without which a run can be: null chooses none."""

ALLOW_EMPTY = ("cond", "negative")
"""Texts of which the empty one is one too."""

ALLOW_INFINITE = ("guidance.interval",)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides, and Hydra's own flags with the values that they take."""
    overrides: list[str] = []
    flags: list[str] = []
    valued = {"--cfg", "-c", "--package", "-p", "--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd"}
    valued |= {"--experimental-rerun", "--info", "-i", "--shell-completion", "-sc"}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word.startswith("-"):
            flags.append(word)
            if word in valued and rest and "=" not in rest[0]:
                flags.append(rest.pop(0))
        else:
            overrides.append(word)
    return overrides, flags


def choose_none(overrides: Sequence[str]) -> list[str]:
    """Return the overrides with `group=null`, which Hydra does not read, as it does read that none is chosen."""
    chosen: list[str] = []
    for override in overrides:
        group, _, value = override.partition("=")
        if group in OPTIONAL and value == "null":
            chosen = [each for each in chosen if key_of(each) != group]
            chosen += [f"{group}=none"] if group in ("callbacks", "logger") else []
        else:
            chosen.append(override)
    return chosen


def check_overrides(config_name: str, overrides: Sequence[str], multirun: bool = False) -> None:
    """Raise UsageError for an override that names no group, option or key, with the nearest that exists."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UsageError(f"cannot read the override: {first_line(error)} ({_as_one_text(overrides)})") from error
    groups = config_groups()
    chosen: list[str] = []
    for override in parsed:
        name = override.key_or_group
        if name in groups and override.is_add() and not override.is_force_add():
            raise UsageError(f"{override.input_line}: {name} is chosen already, drop the +")
        if name in groups and not override.is_delete():
            for option in _options(override):
                _check_option(name, option, groups[name])
            chosen.append(_one_value(override))
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        base = _compose(config_name, chosen)
        for override in parsed:
            if override.key_or_group not in groups:
                _check_key(override, base, groups)
            elif override.is_delete() and override.key_or_group in base and override.key_or_group not in OPTIONAL:
                raise UsageError(
                    f"~{override.key_or_group} leaves no {override.key_or_group}: choose one of "
                    f"{', '.join(groups[override.key_or_group])}"
                )
            if override.is_interval_sweep() and not {"hydra/sweeper", "sweep"} & {o.key_or_group for o in parsed}:
                raise UsageError(f"{override.input_line} has no values to go through: add hydra/sweeper=search")
            if override.is_sweep_override() and not multirun:
                name, _, value = str(override.input_line).partition("=")
                whole = "" if name in groups else f", or type {format_override(name, value)} where it is one value"
                raise UsageError(f"{override.input_line} is a sweep: add -m to run one job per value{whole}")
        final = _compose(config_name, [_one_value(o) for o in parsed])
    counted = {o.key_or_group: o for o in parsed}  # a resumed run repeats keys: the last one counts
    names = {name for name, override in counted.items() if override.value() is not None}
    if "sweep" in names and not multirun and "resume" not in names:  # a job of a sweep is resumed by itself
        raise UsageError("sweep=... names the values of a sweep: add -m to run one job for each")
    if {"validate_every", "trainer.val_check_interval"} <= names:
        raise UsageError(
            "validate_every and trainer.val_check_interval both say when to validate: give one of them "
            "(trainer.val_check_interval=null takes that one back)"
        )
    if config_name == "evaluate":
        given_names = {name for name in names if name.split("/")[0].split(".")[0] != "hydra"}
        _check_evaluation(given_names - {"analytic", "seed", "run", "ckpt"}, bool(final.get("analytic")))
    for override in parsed:
        name = override.key_or_group
        if name not in groups and not name.startswith("hydra") and not override.is_delete():
            for value in _values(override):
                _check_value(name, _raw(base, name), value)
    for name in flatten(final):
        parent, _, last = name.rpartition(".")
        if OmegaConf.is_missing(OmegaConf.select(final, parent) if parent else final, last):
            raise UsageError(f"{name} has no default: add {name}=...")


def _check_evaluation(names: Set[str], analytic: bool) -> None:
    """Raise UsageError for a setting that is given and that only the evaluation of a run, or of samplers, reads."""
    of_samplers = {name for name in names if name.startswith("analytic")}
    if analytic and (others := sorted(names - of_samplers)):
        raise UsageError(f"{others[0]} is not read with analytic=...; leave it out, or give run=FOLDER instead")
    if of_samplers and not analytic:
        raise UsageError(f"{min(of_samplers)} is read with analytic=... alone; leave it out, or add analytic=mixture")


def parsed(override: str) -> Override:
    """Return what Hydra reads from one override. Raises HydraException if it cannot."""
    return OverridesParser.create().parse_override(override)


def key_of(override: str) -> str:
    """Return the group or setting that an override is of."""
    try:
        return str(parsed(override).key_or_group)
    except HydraException:  # which check_overrides will say
        return override.lstrip("+~").partition("=")[0]


def given(overrides: Sequence[str], name: str) -> str | None:
    """Return the text that the last override of the setting `name` gives it; None if none does, or null.

    Raises UsageError for an empty one.
    """
    text = None
    for override in overrides:
        if key_of(override) != name:
            continue
        try:
            value = parsed(override)
        except HydraException:  # which check_overrides will say
            text = override.partition("=")[2]
            continue
        if value.is_delete() or value.is_sweep_override() or value.value() is None:
            text = None
            continue
        text = str(value.value())
        if not text.strip():
            raise UsageError(f"{name}= is empty: give a value, or leave it out")
        with suppress(OmegaConfBaseException):  # what only Hydra can look up stays as it is
            text = str(OmegaConf.create({"value": text})["value"])
    return text


def _as_one_text(overrides: Sequence[str]) -> str:
    """How to type the first override that Hydra cannot read, if its value is one text."""
    for override in overrides:
        name, _, value = override.partition("=")
        try:
            parsed(override)
        except HydraException:
            if value and re.fullmatch(r"[+~]*[\w./]+", name):
                return f"if its value is one text, type {format_override(name, value)}"
            break
    return "overrides look like key=value"


def expand_grid(config_name: str, overrides: Sequence[str], group: str) -> list[str]:
    """Several values of `group` and its settings are taken together, all combinations, as the list `<group>s`.

    `sampler=ddim,heun sampler.steps=10,20` becomes `samplers=[{sampler:ddim,steps:10},...]`; each is checked as if it
    stood alone. Raises UsageError for values that do not end, such as intervals.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:  # which check_overrides will say
        return list(overrides)
    own = [o for o in parsed if o.key_or_group.split(".")[0] == group]
    if not any(o.is_sweep_override() for o in own):
        return list(overrides)
    rest = [str(o.input_line) for o in parsed if o not in own]
    if any(o.key_or_group == f"{group}s" for o in parsed):
        raise UsageError(f"{group}=... and {group}s=... say the same: give one of them")
    if wrong := [o for o in own if o.is_sweep_override() and not (o.is_choice_sweep() or o.is_range_sweep())]:
        raise UsageError(f"{wrong[0].input_line} has no values to go through: give them one by one, as in 10,20,50")
    values = [list(o.sweep_string_iterator()) if o.is_sweep_override() else [o.get_value_element_as_str()] for o in own]
    names = [o.key_or_group for o in own]
    combinations = [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]
    for combination in combinations:
        check_overrides(config_name, [*rest, *(f"{name}={value}" for name, value in combination.items())])
    items = [",".join(f"{name.removeprefix(f'{group}.')}:{value}" for name, value in c.items()) for c in combinations]
    return [*rest, f"{group}s=[{','.join(f'{{{item}}}' for item in items)}]"]


def config_groups() -> dict[str, list[str]]:
    """Every config group of ours and its options, from the folders of conf/; Hydra's own are its affair."""
    folders = {f.parent for f in CONF.rglob("*.yaml") if f.parent not in (CONF, *(CONF / "hydra").iterdir())}
    return {str(d.relative_to(CONF)): sorted(f.stem for f in d.glob("[!_]*.yaml")) for d in sorted(folders)}


def nearest(word: str, known: Sequence[str]) -> str:
    """A question after the known word nearest to `word`, to end an error with; empty if none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _check_option(group: str, option: str, options: Sequence[str]) -> None:
    if option not in options:
        hint = nearest(option, options).replace("?", "? The")
        raise UsageError(f"unknown {group} '{option}'{hint or ': the'} choices are {', '.join(options)}")


def _check_key(override: Override, base: DictConfig, groups: dict[str, list[str]]) -> None:
    key = override.key_or_group
    parts = key.split(".")
    if parts[0].split("/")[0] == "hydra":
        return
    if key == "run_dir":  # without Hydra's own files beside its checkpoints a run cannot be opened
        raise UsageError(
            f"{override.input_line} follows from where Hydra puts a run: "
            f"type {format_override('hydra.run.dir', given([str(override.input_line)], 'run_dir') or 'FOLDER')}"
        )
    node: Any = base
    for depth, part in enumerate(parts):
        if isinstance(node, DictConfig) and part in node.keys():  # keys() also names what is still to be given
            node = node._get_node(part)
            if isinstance(node, DictConfig) or depth == len(parts) - 1:
                continue
        # A `+` may give a third-party class an argument that its YAML does not list, or a free dictionary a key;
        # the YAMLs of our own classes list every argument.
        target = str(OmegaConf.select(node, "_target_", default="")) if isinstance(node, DictConfig) else "src."
        adds = override.is_add() or override.is_force_add()
        if adds and depth > 0 and not target.startswith("src."):
            return
        known = [*flatten(base), *groups]
        local = [k for k in known if k.startswith(".".join(parts[:depth]) + ".")] if depth else known
        hint = nearest(key, local) or nearest(key, known)
        if not hint and isinstance(node, DictConfig) and depth:
            hint = f": {'.'.join(parts[:depth])} has {', '.join(str(k) for k in node)}"
        hint = hint or "; --cfg job prints all that there are"
        raise UsageError(f"unknown setting '{key}' in {override.input_line}{hint}")


def _check_value(name: str, default: Any, value: Any) -> None:
    """Raise UsageError if a value is of another type than the default's; a text or null as default says nothing.

    Likewise for an empty text, which as a folder would be the current one, and for a number that is not finite.
    """
    if (value is None and "." in name) or (isinstance(value, str) and "${" in value):
        return
    if isinstance(value, str) and not value.strip() and default != "" and name not in ALLOW_EMPTY:
        raise UsageError(f"{name}= is empty: give a value, or leave it out")
    _check_finite(name, default, value)
    for kind, fits, rule in (
        (bool, bool, "true or false"),
        (int, int, "a whole number"),
        (float, (int, float), "a number"),
        (list, list, "a list"),
    ):
        if isinstance(default, kind):
            if not isinstance(value, fits) or isinstance(value, bool) != isinstance(default, bool):
                example = "" if "${" in str(default) else f", such as {default}"
                raise UsageError(f"{name}={value} is of the wrong type: it must be {rule}{example}")
            return


def _check_finite(name: str, default: Any, value: Any) -> None:
    """Raise UsageError for NaN, and for an infinity where the default is none, in numbers, lists and dictionaries."""
    if isinstance(value, dict):
        for key, each in value.items():
            _check_finite(f"{name}.{key}", default.get(key) if isinstance(default, dict) else None, each)
    elif isinstance(value, list):
        for each in value:
            _check_finite(name, next(iter(default), None) if isinstance(default, list) else None, each)
    elif isinstance(value, float) and not math.isfinite(value):
        endless = isinstance(default, float) and math.isinf(default)
        if not (value > 0 and (endless or name in ALLOW_INFINITE)):
            raise UsageError(f"{name}={value} must be a finite number")


def check_repeated(overrides: Sequence[str]) -> None:
    """Raise UsageError if two overrides are of one key, of which Hydra would take the last without a word."""
    first: dict[str, str] = {}
    for override in overrides:
        key = re.split("[=]", override.lstrip("+~ "), maxsplit=1)[0].strip()
        if key in first:
            raise UsageError(f"{first[key]} and {override} both set {key}: leave one of them out")
        first[key] = override


def _raw(cfg: DictConfig, name: str) -> Any:
    """The value at a dotted name, interpolations as they stand; None if there is none."""
    value: Any = OmegaConf.to_container(cfg, resolve=False)
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def flatten(cfg: DictConfig, prefix: str = "") -> list[str]:
    """The dotted names of all keys."""
    names: list[str] = []
    for key in cfg:
        name = f"{prefix}{key!s}"
        names.append(name)
        child = cfg._get_node(key)
        if isinstance(child, DictConfig):
            names += flatten(child, f"{name}.")
    return names


def _options(override: Override) -> list[str]:
    """The option or options that an override of a group names, one by one."""
    if override.is_sweep_override():
        values = [str(v) for v in override.sweep_string_iterator()] if override.is_choice_sweep() else []
    else:
        values = [override.get_value_element_as_str()]
    return [part.strip().strip("'\"") for v in values for part in v.strip("[]").split(",") if part.strip()]


def _one_value(override: Override) -> str:
    """The override itself, or with the first of its values if it is a sweep."""
    if not override.is_sweep_override():
        return str(override.input_line)
    prefix = {"ADD": "+", "FORCE_ADD": "++"}.get(override.type.name if override.type else "", "")
    value = override.value()
    first = value.start if isinstance(value, IntervalSweep) else next(iter(override.sweep_string_iterator()))
    return f"{prefix}{override.key_or_group}={first}"


def _values(override: Override) -> list[Any]:
    """Return the value of an override, or those of a sweep; of a range or an interval its ends."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [value.start, value.end]
    if isinstance(value, RangeSweep):
        return [value.start]
    return list(override.sweep_iterator(Override._convert_value)) if override.is_sweep_override() else [value]


def _compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    try:
        return hydra.compose(config_name, list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        line = first_line(error)
        if match := re.match(r"In '(.+)': Could not override '(.+)'\.", line):
            what = match[1].replace("/_", "=").replace("/", "=")
            line = f"{what} is not for src.{config_name}, which has no {match[2]}: choose another {what.split('=')[0]}"
        elif match := re.search(r"Could not (?:find|load) '(hydra/launcher|hydra/sweeper)/(\w+)'", line):
            line = _missing_plugin(match[1], match[2])
        elif match := re.search(r"An item is already at '(.+)'", line):
            line = f"+{match[1]}=... adds what is there already: leave out the +"
        elif "Could not override 'hydra." in line:
            line += " Settings of a launcher or sweeper need it chosen; --cfg hydra prints all that there are"
        raise UsageError(line) from error


def _missing_plugin(group: str, name: str) -> str:
    """What to say if a launcher or sweeper of that name is not there."""
    if name in PLUGINS:
        extra = name.split("_")[0]
        return f"{group}: {name} comes with the extra {extra}, which is not installed: pip install -e '.[{extra}]'"
    known = GlobalHydra.instance().config_loader().get_group_options(group)
    hint = nearest(name, known).replace("?", "? The")
    return f"unknown {group} '{name}'{hint or ': the'} choices are {', '.join(known)}"
