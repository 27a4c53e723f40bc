"""Rewrite and parse words of a command line; UsageError names the form to type for those that Hydra cannot parse."""

import re
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.config.keys import OTHER_KEYS, run_folder
from src.config.search_path import CONF, config_groups
from src.errors import UsageError, did_you_mean, first_line, format_override, shell_word

TABLE_SUFFIXES = (".csv", ".tsv", ".xlsx", ".parquet", ".json", ".jsonl")


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into overrides and Hydra's flags with their values.

    Raises UsageError for an unknown flag.
    """
    parser = get_args_parser()

    def refuse(message: str) -> None:
        raise UsageError(f"{message.removeprefix('argument ')}; --hydra-help lists the flags")

    parser.error = refuse  # type: ignore[assignment, method-assign]
    for word in arguments:  # argparse would read -cfg as -c fg
        if re.match(r"-\w\w", word) and (long := f"-{word}").partition("=")[0] in parser._option_string_actions:
            raise UsageError(f"{word} is not a flag; type {long}")
    words = [word for word in arguments if word != "--version"]  # argparse would print Hydra's version
    known, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        name, _, value = unknown[0].lstrip("-").partition("=")
        following = arguments[arguments.index(unknown[0]) + 1 :][:1]
        value = value or next((word for word in following if not re.search(r"^-|=", word)), "VALUE")
        setting = OTHER_KEYS.get(name, "")
        name = setting if "." in setting and " " not in setting else name  # others depend on the command
        raise UsageError(f"{unknown[0]} is not a flag; overrides have no dashes: type {shell_word(f'{name}={value}')}")
    overrides, flags, rest = list(known.overrides), [], list(known.overrides)
    for word in arguments:
        if rest and word == rest[0]:
            rest.pop(0)
        else:
            flags.append(word)
    return overrides, flags


def check_flags(flags: Namespace) -> None:
    """Raise UsageError for flags of Hydra that exclude each other, have no effect, or lack a value."""
    modes = {"--run": flags.run, "--multirun": flags.multirun, "--cfg": flags.cfg, "--info": flags.info}
    typed = [name for name, value in {**modes, "--shell-completion": flags.shell_completion}.items() if value]
    if len(typed) > 1:
        raise UsageError(f"{' and '.join(typed)} exclude each other; leave one out")
    for name, value in {"--resolve": flags.resolve, "--package": flags.package}.items():
        if value and not flags.cfg:
            raise UsageError(f"{name} has no effect without --cfg; add --cfg job")
    if flags.shell_completion:
        form = "(install|uninstall|query)=(bash|fish|zsh)"
        if sum(re.fullmatch(form, word) is not None for word in flags.overrides) != 1:
            raise UsageError("--shell-completion needs a shell; add install=bash, install=fish or install=zsh")


def check_package(flags: Namespace, cfg: DictConfig) -> None:
    """Raise UsageError if the node that `--package` shows is absent from the composed configuration."""
    if flags.package in (None, "_global_"):
        return
    known = [str(key) for key in cfg if flags.cfg == "all" or (key == "hydra") == (flags.cfg == "hydra")]
    with suppress(OmegaConfBaseException):
        if flags.package.split(".")[0] in known and OmegaConf.select(cfg, flags.package) is not None:
            return
    parent, _, last = flags.package.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    is_null = isinstance(node, DictConfig) and last in node
    hint = "it is null" if is_null else did_you_mean(flags.package, known)
    raise UsageError(f"--package {flags.package} must be a node of the configuration; {hint}")


class _Options:
    """What Hydra's parser needs of a configuration loader, for `glob(...)`: the options of a group."""

    def get_group_options(self, group_name: str, results_filter: object = None) -> list[str]:
        return config_groups().get(group_name, [])


def parsed(override: str) -> Override:
    """Return an override as Hydra parses it. Raises HydraException if Hydra cannot parse it."""
    read = OverridesParser.create().parse_override(override)
    read.config_loader = _Options()  # type: ignore[assignment]
    return read


def key_of(override: str) -> str:
    """Return the group or setting of an override."""
    try:
        return str(parsed(override).key_or_group)
    except HydraException:  # `check_overrides` reports it
        return override.lstrip("+~").partition("=")[0]


def last_value(overrides: Sequence[str], name: str) -> str | None:
    """Return the last typed value of the setting `name` as text; None if it is null or not typed.

    Raises UsageError for an empty value.
    """
    override = next((each for each in reversed(overrides) if key_of(each) == name), None)
    if override is None:
        return None
    try:
        read = parsed(override)
    except HydraException:  # `check_overrides` reports it
        return override.partition("=")[2]
    if read.is_delete() or read.is_sweep_override() or read.value() is None:
        return None
    text = str(read.value())
    if not text.strip():
        raise UsageError(f"{name}= is empty; give a value, or leave it out")
    with suppress(OmegaConfBaseException):  # an interpolation that only the running job resolves
        text = str(OmegaConf.create({"value": text})["value"])
    return text


def expand_home(overrides: Sequence[str]) -> list[str]:
    """Replace `~` at the start of a path by the home folder: shells do not expand it after `data.root=`."""
    expanded = []
    for override in overrides:
        name, equals, value = override.partition("=")
        value = re.sub(r"(^|[\[,])(\s*['\"]?)~(?=[/,\]'\"]|$)", lambda m: f"{m[1]}{m[2]}{Path.home()}", value)
        expanded.append(f"{name}{equals}{value}")
    return expanded


def expand_init_from(overrides: Sequence[str], command: str = "train") -> list[str]:
    """Replace `init_from=FOLDER` by `init_from.path=FOLDER`, which leaves the other settings of the node in place.

    Likewise `autoencoder=FOLDER` of src.train; that of other commands is not a node. `none` and `false` mean null.
    """
    nodes = "init_from|autoencoder" if command == "train" else "init_from"
    paths = [re.sub(rf"^(\+*)({nodes})=(?!\{{)", r"\1\2.path=", override) for override in overrides]
    is_null = r"(^\+*(?:init_from\.path|autoencoder(?:\.path)?)=(?:.*,)?)(?:none|false)(?=,|$)"  # also in a sweep
    return [re.sub(is_null, r"\1null", re.sub(is_null, r"\1null", path)) for path in paths]


def choose_none(overrides: Sequence[str], folders: Sequence[Path] = (CONF,)) -> list[str]:
    """Replace `group=null`, which Hydra accepts only in a defaults list, by `group=none` or `~group`."""
    groups = config_groups(folders)
    chosen: list[str] = []
    for override in overrides:
        group, _, value = override.partition("=")
        if group in groups and value in ("null", "none") and value not in groups[group]:
            chosen = [each for each in chosen if key_of(each) != group]
            override = f"{group}=none" if "none" in groups[group] else f"~{group}"
        chosen.append(override)
    return chosen


def parse_words(config_name: str, words: Sequence[str], groups: dict[str, list[str]]) -> list[Override]:
    """Return overrides as Hydra parses them. Raises UsageError with the form to type if Hydra cannot parse one."""
    read = []
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if not name.strip() or (not equals and not word.startswith("~")):
            raise UsageError(f"{word!r} is not an override; {_bare_word(config_name, words, i, groups)}")
        try:
            read.append(parsed(word))
        except HydraException as error:
            fix = _other_form(name, value, words[i + 1 :])
            if fix is None:
                reason = first_line(error).partition(" expecting ")[0]  # a list of tokens follows
                fix = "overrides look like key=value"
                if value and re.fullmatch(r"[+~]*[\w./@:]+", name):
                    fix = f"if its value is one string, type {format_override(name, value)}"
                raise UsageError(f"{word} cannot be parsed ({reason}); {fix}") from error
            raise UsageError(f"{word} cannot be parsed; {fix}") from error
    return read


def _other_form(name: str, value: str, following: Sequence[str]) -> str | None:
    """Return the hint for a tuple, a trailing comma, or a list that a shell has split at its spaces."""
    if re.fullmatch(r"[\w./@]+ +", name):
        return f"no spaces around =: type {shell_word(f'{name.strip()}={value.strip()}')}"
    if match := re.fullmatch(r"\((.*?),?\)", value):
        return f"a list has brackets: type {shell_word(f'{name}=[{match[1]}]')}"
    if re.fullmatch(r"[^\[{(]*[^\[{(,],+|\[.*[^\[,],+\]", value):
        value = re.sub(r",+(\]?)$", r"\1", value)
        return f"remove the comma at its end: type {shell_word(f'{name}={value}')}"
    for count in range(1, len(following) + 1 if value.startswith("[") else 0):
        joined = value + "".join(following[:count])
        if joined.count("[") == joined.count("]"):
            return f"a list has no spaces: type {shell_word(f'{name}={joined}')}"
    return "close the bracket" if value.startswith("[") and value.count("[") > value.count("]") else None


def _bare_word(config_name: str, words: Sequence[str], index: int, groups: dict[str, list[str]]) -> str:
    """Return the hint for the word at `index`, which has no `=`."""
    word, before, after = words[index], words[index - 1] if index else "", words[index + 1 : index + 3]
    setting = {"train": "resume", "compare": "runs"}.get(config_name, "run")
    joined = before + word if before.endswith("=") else ""
    if after and after[0].startswith("="):
        joined = word + "".join(after if after[0] == "=" else after[:1])
    if joined:
        return f"overrides look like key=value, without spaces: type {shell_word(joined)}"
    if match := re.fullmatch(r"([\w.]+): *([^/].*)", word):
        return f"overrides have = instead of a colon: type {shell_word(f'{match[1]}={match[2]}')}"
    if word.endswith(".yaml"):
        parts = Path(word).with_suffix("").parts
        choices = [("/".join(parts[i:-1]), parts[-1]) for i in range(len(parts) - 1)]
        if found := [f"{group}={option}" for group, option in choices if option in groups.get(group, ())]:
            return f"type {found[0]}"
    if Path(word).exists() or "/" in word:
        is_run = word.endswith(".ckpt") or any((Path(word) / name).exists() for name in (".hydra", "checkpoints"))
        if config_name == "doctor" or (config_name == "train" and Path(word).exists() and not is_run):
            suffix = Path(word).suffix.lower()
            kind = "table" if suffix in TABLE_SUFFIXES else "array" if suffix in (".npy", ".npz") else "folder"
            return f"type data={kind} {format_override('data.path' if kind == 'table' else 'data.root', word)}"
        if word.endswith((".ckpt", ".safetensors")) and setting == "run":
            setting = "ckpt"
        word = word if setting == "ckpt" else run_folder(word)
        return f"type {format_override(setting, [word] if setting == 'runs' else word)}"
    if config_name == "schedules" and word in groups["schedule"]:
        return f"type {format_override('names', [each for each in words if '=' not in each])}"
    if options := groups.get(word):
        return f"choose an option: type {word}={options[0]}. The choices are {', '.join(options)}"
    found = [f"{group}={word}" for group, options in groups.items() if word in options]
    return f"type {' or '.join(found)}" if found else "overrides look like key=value, without spaces"
