"""Compose a configuration with Hydra, and add a hint to its errors."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from src.config.keys import explain_key, other_value, renamed_key, run_folder
from src.config.search_path import CONF, unknown_option
from src.errors import UsageError, first_line, first_names, near_matches, quoted, shell_word

PLUGINS = {"joblib", "optuna", "ray", "ray_aws", "submitit_local", "submitit_slurm"}
"""Hydra's launchers and sweepers that come with an extra, which is the first word of the name."""


@contextmanager
def initialized() -> Iterator[None]:
    """Let Hydra compose configurations of conf/, also within a running job, whose Hydra returns afterwards."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            yield
    finally:
        GlobalHydra.instance().hydra = running


def compose(
    command: str, overrides: Sequence[str], added: Sequence[str], names: Sequence[str], groups: dict[str, list[str]]
) -> DictConfig:
    """Return the configuration, with Hydra's own node; `names` are the known settings.

    Raises UsageError with Hydra's message and a hint if Hydra cannot compose it.
    """
    search = [f"hydra.searchpath=[{','.join(map(quoted, added))}]"] if added else []
    rest = [override for override in overrides if _key(override) != "hydra.searchpath"]
    try:
        return hydra.compose(command, [*rest, *search], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        message = " ".join(str(error).partition("\nConfig search path")[0].split())
        if match := re.match(r"In '(.+)': Could not override '(.+)'\.", message):
            group, _, option = match[1].rpartition("/")
            choice = next((each for each in overrides if _key(each) == group), f"{group}={option.lstrip('_')}")
            message = f"src.{command} does not support {choice}, which needs {match[2]}; choose another {group}"
        elif match := re.search(r"Could not (?:find|load) '(hydra/launcher|hydra/sweeper)/(\w+)'", message):
            message = _missing_plugin(*match.groups())
        elif match := re.match(r"Error merging override (.*)", message):
            message = f"{match[1]} has an invalid value ({first_line(error.__cause__ or error)}); correct it"
        elif match := re.match(r"Could not delete '(\w+)=.*No match|Could not delete from.* of '(\S+)' is", message):
            message = f"{message.rstrip('.')}; type ~{match[1] or match[2]}"
        elif match := re.search(r"Multiple values for (\S+)\. To override", message):
            line = next((each for each in overrides if _key(each) == match[1]), match[1])
            message = f"{line} chooses a second {match[1]}; type {shell_word(line.lstrip('+'))} without the +"
        elif match := re.match(r"Could not (?:override|delete from config\.) '([^']+)'(.*)", message):
            line = next((each for each in overrides if _key(each) == match[1]), match[1])
            if (group := match[1].partition("@")[0]) in groups and group != match[1]:
                other = line.partition("=")[2]
                raise UsageError(f"{line}: no {group} is there; type {group}={other}, or +{line} to add one") from error
            if match[1] in groups:  # a group of another command, chosen before `names` are known
                names = names or setting_names(hydra.compose(command))
            hint = key_hint(match[1], line.partition("=")[2] or "VALUE", names, groups)
            if match[1].startswith(("hydra.launcher", "hydra.sweeper")):
                hint = "; choose its option first, as in hydra/launcher=slurm. --cfg hydra lists the settings"
            elif line.startswith("~"):
                hint = hint.partition(" Type ")[0]
            elif not hint.startswith("; type ") and (group := match[1].partition(".")[0]) not in names:
                hint = _training_hint(command, group) or hint
            hint = hint or ("" if line.startswith("~") else "; --help lists the settings")
            message = f"unknown setting '{match[1]}' in {line}{hint}"
        raise UsageError(message) from error


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _training_hint(command: str, group: str) -> str:
    """Return the end of an error about a setting in a group that only src.train has; empty for other groups."""
    if command == "train" or f"\n  - {group}: " not in (CONF / "train.yaml").read_text(encoding="utf-8"):
        return ""
    has_run = command in ("sample", "evaluate", "export", "compare")
    return f"; {f'a run keeps its {group}: ' if has_run else ''}set it in src.train"


def _missing_plugin(group: str, name: str) -> str:
    """Return the message for a launcher or sweeper that is unknown or not installed."""
    if name in PLUGINS:
        extra = name.split("_")[0]
        return f"{group}={name} needs the extra {extra}, which is not installed: pip install -e '.[{extra}]'"
    known = GlobalHydra.instance().config_loader().get_group_options(group)
    return unknown_option(group, name, known)


def key_hint(key: str, value: str, names: Sequence[str], groups: dict[str, list[str]]) -> str:
    """Return the end of an error about an unknown key: the setting that was meant, if one is near."""
    is_number = re.fullmatch(r"[\d.e+-]+", value) is not None  # which no option of a group is
    known = [name for name in (*names, *groups) if name != key and not (is_number and name in groups)]
    if not key.startswith("recipe"):  # type the setting itself instead of its default
        known = [name for name in known if not name.startswith("recipe.")]
    if explanation := explain_key(key, value, names):
        return f"; {explanation}"
    if new := renamed_key(key, [name for name in known if not name.startswith("hydra.")]):
        value = run_folder(value) if new in ("resume", "run") else value
        own = [name for name in names if name.startswith(f"{new}.") and "._" not in name]
        if own and new not in groups and not value.startswith("{"):  # a node, which takes no single value
            is_switch = value.lower() in ("true", "false", "null")
            if value.lower() == "true" or (len(own) > 1 and not is_switch):
                return f"; its settings are {first_names(own)}"
            new, value = (new, "null") if is_switch else (own[0], value)
        return f"; type {other_value(new, value)}"
    if key in groups:  # a group that this command does not have
        return ""
    elsewhere = ("hydra.", "recipe.", "callbacks.", "autoencoder.")
    same = [name for name in known if name.endswith(f".{key}") and not name.startswith(elsewhere)]
    if 1 < len(same) < 4:
        return f"; did you mean {' or '.join(same)}?"
    parent, _, last = key.rpartition(".")
    if parent in names:
        siblings = [name.removeprefix(f"{parent}.") for name in names if name.startswith(f"{parent}.")]
        close = [f"{parent}.{name}" for name in near_matches(last, siblings)]
    else:
        close = near_matches(key, known, cutoff=0.75)
    return f"; did you mean {close[0]}? Type {other_value(close[0], value)}" if close else ""


def setting_names(cfg: DictConfig, prefix: str = "") -> list[str]:
    """Return the dotted names of all keys."""
    names: list[str] = []
    for key in cfg:
        names.append(f"{prefix}{key!s}")
        if isinstance(child := cfg._get_node(key), DictConfig):
            names += setting_names(child, f"{names[-1]}.")
    return names
