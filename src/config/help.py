"""The text of --help: usage, examples, config groups and the settings of a command with their comments."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from src.config.search_path import CONF


def help_text(
    command: str,
    groups: Mapping[str, Sequence[str]],
    typed: Mapping[str, Sequence[str]] | None = None,
    folders: Sequence[Path] = (CONF,),
) -> str:
    """Return the help of `src.<command>`: conf/<command>.yaml, whose head has examples, and the settings of options.

    These are the default options, or those in `typed`, by group, whose files are in `folders`.
    """
    text = (CONF / f"{command}.yaml").read_text(encoding="utf-8")
    chosen = {
        group: option
        for group, option in re.findall(r"^  - (?:override )?/?([\w/]+): *(\w+)", text, re.MULTILINE)
        if group in groups
    }
    width = max(map(len, chosen), default=0) + 1
    lists = [f"  {f'{group}:':<{width}} {', '.join(groups[group])} (default {chosen[group]})" for group in chosen]
    lines = [
        f"Usage: python -m src.{command} [GROUP=OPTION ...] [SETTING=VALUE ...]",
        *("", "Examples:", *(f"  {line}" for line in re.findall(r"^# (python .*)$", text, re.MULTILINE))),
        *(["", "Config groups (GROUP=OPTION), files under conf/ and in --config-dir:", *lists] if lists else []),
        *("", "Settings (SETTING=VALUE):", *_settings(text, groups)),
    ]
    options = {group: [option] for group, option in chosen.items()} | dict(typed or {})
    for group, option in [(each, option) for each in chosen for option in options[each]]:
        files = [file for folder in folders if (file := folder / group / f"{option}.yaml").is_file()]
        if files and (settings := _settings(files[0].read_text(encoding="utf-8"), ())):
            lines += ["", f"Settings of {group}={option}:", *settings]
    lines += ["", "Quote values with brackets for the shell, as in 'optimizer.betas=[0.9,0.99]'."]
    lines += ["--cfg job prints all settings with their values, --hydra-help the flags of Hydra."]
    return "\n".join(lines)


def _settings(text: str, groups: Collection[str]) -> list[str]:
    """Return the settings in a YAML as lines, without Hydra's and without placeholders of `groups`."""
    text = re.sub(r"^(?:defaults|run_dir|hydra):.*\n?(?:  .*\n?)*", "", text, flags=re.MULTILINE)
    lines = [line for line in text.splitlines() if line.strip() and not re.match(r"#|\s*_\w+_:", line)]
    return [f"  {line}" for line in lines if line.partition(":")[0] not in groups]
