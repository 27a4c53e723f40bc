"""The folders of config groups: conf/, and those of --config-dir and hydra.searchpath."""

import importlib.util
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from src.config.keys import FOREIGN_OPTIONS
from src.errors import UsageError, did_you_mean, format_override, near_matches, shell_word
from src.errors import command as command_line

CONF = Path(__file__).resolve().parents[2] / "conf"


def extra_folders(overrides: Sequence[str], config_dir: str | None = None) -> list[str]:
    """Return the entries that `hydra.searchpath` and `--config-dir` add to Hydra's search path."""
    added: list[str] = []
    for override in overrides:
        if "hydra.searchpath=" in override:
            with suppress(HydraException):  # `check_overrides` reports it
                value = OverridesParser.create().parse_override(override).value()
                if not isinstance(value, list):
                    raise UsageError(f"{override} must be a list; type {format_override('hydra.searchpath', [value])}")
                added = [str(each) for each in value]
                for entry in added:
                    _check_entry(entry)
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise UsageError(f"--config-dir {config_dir} must be a folder of config groups")
        ours, inner = {each.name for each in CONF.glob("*/")}, Path(config_dir, "conf")
        here, below = ({each.name for each in folder.glob("*/")} & ours for folder in (Path(config_dir), inner))
        if below and not here:
            raise UsageError(
                f"--config-dir {config_dir} holds no config groups, but its subfolder conf does; "
                f"type --config-dir {shell_word(str(inner))}"
            )
        added.append(f"file://{Path(config_dir).resolve()}")
    return added


def _check_entry(entry: str) -> None:
    """Raise UsageError if an entry of `hydra.searchpath` is neither a folder nor a package."""
    kind, _, name = entry.rpartition("://")
    if kind == "pkg":
        with suppress(ImportError, ValueError):
            if importlib.util.find_spec(name.replace("/", ".")) is not None:
                return
        rule = "must be a package that Python can import; type PYTHONPATH=FOLDER in front of python"
    elif Path(name).is_dir():
        return
    else:
        rule = "must be an existing folder; type file:// and its path"
    raise UsageError(f"{format_override('hydra.searchpath', [entry])} {rule}")


def check_config_flags(command: str, flags: Namespace, added: Sequence[str]) -> None:
    """Raise UsageError for a `--config-path` or a `--config-name` that does not exist, or is of another command."""
    folders = config_folders(added)
    if flags.config_path is not None and "://" not in flags.config_path:
        if not (folder := Path(flags.config_path)).is_dir():
            raise UsageError(f"--config-path {flags.config_path} must be an existing folder")
        folders = [folder, *folders[1:]]
    name = (flags.config_name or command).removesuffix(".yaml")
    if any((folder / f"{name}.yaml").is_file() for folder in folders) or "pkg://" in " ".join(added):
        if (CONF / f"{name}.yaml").is_file() and name != command:
            raise UsageError(f"--config-name {name} is of another command; type {command_line(name)}")
        return
    if flags.config_path and not flags.config_name:
        path = flags.config_path
        raise UsageError(f"--config-path {path} has no {name}.yaml; type --config-dir {path} to add options")
    commands = {file.stem for file in CONF.glob("*.yaml")} - {command}
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")} - commands)
    raise UsageError(f"--config-name {name} does not exist; {did_you_mean(name, known)}")


def config_folders(added: Sequence[str] | None = None) -> list[Path]:
    """Return the folders in which Hydra looks for config groups: ours, then those `added` or of the running job."""
    if added is None:
        sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
        added = [source.path for source in sources if source.schema == "file"]
    folders = [Path(each.removeprefix("file://")) for each in added if "pkg://" not in each]
    return [CONF, *(folder for folder in folders if folder != CONF and folder.is_dir())]


def search_path_overrides() -> list[str]:
    """Return the override that adds the user's config folders of the running job to another command, if any."""
    return [format_override("hydra.searchpath", folders)] if (folders := user_folders()) else []


def user_folders() -> list[str]:
    """Return the entries of Hydra's search path for the user's config folders of the running job."""
    return [f"file://{folder}" for folder in config_folders()[1:]]


def config_groups(folders: Sequence[Path] | None = None) -> dict[str, list[str]]:
    """Return every config group, without Hydra's own, with its options."""
    groups: dict[str, set[str]] = {}
    for folder in config_folders() if folders is None else folders:
        for file in folder.rglob("*.yaml"):
            if file.parent != folder and file.relative_to(folder).parts[0] != "hydra" and file.name[0] not in "_.":
                groups.setdefault(file.parent.relative_to(folder).as_posix(), set()).add(file.stem)
    return {group: sorted(groups[group]) for group in sorted(groups)}


def load_option(group: str, name: str) -> DictConfig:
    """Return an option of a config group, with the options of the group in its defaults list.

    Raises ValueError if there is none.
    """
    for folder in config_folders():
        if (file := folder / group / f"{name}.yaml").is_file():
            own = OmegaConf.load(file)
            assert isinstance(own, DictConfig)
            # Merge options of the same group in order; our files list other groups only as overrides.
            listed = [each for each in own.pop("defaults", []) if isinstance(each, str)]
            listed += [] if "_self_" in listed else ["_self_"]
            merged = OmegaConf.merge(*(own if each == "_self_" else load_option(group, each) for each in listed))
            assert isinstance(merged, DictConfig)
            return merged
    raise ValueError(unknown_option(group, name, config_groups()[group]))


def unknown_option(group: str, option: str, options: Sequence[str]) -> str:
    """Return the message for an option that a config group lacks."""
    new = FOREIGN_OPTIONS.get(f"{group}={option}")
    new = new or next(
        (f"{other}={option}" for other, names in config_groups().items() if option in names and other != group), None
    )
    hint = f"; type {new}. The" if new else "; the"
    if not new and (close := near_matches(Path(option).stem.lower().replace("-", "_"), options)):
        hint = f"; did you mean {close[0]}? The"
    return f"unknown {group} '{option}'{hint} choices are {', '.join(options)}"
