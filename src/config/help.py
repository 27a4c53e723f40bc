"""The text of --help: usage, examples, config groups and the settings of a command with their comments."""

import re
from collections.abc import Collection, Mapping, Sequence

from src.config.search_path import CONF

EXAMPLES = {
    "train": (
        "experiment=digits",
        "data=cifar10 model=unet_small schedule=cosine trainer.devices=4",
        "-m data=points seed=0,1,2 optimizer.lr=1e-3,3e-3",
    ),
    "sample": (
        "run=outputs/train/RUN n=64",
        "run=outputs/train/RUN sampler=ddim sampler.steps=50",
        "run=outputs/train/RUN cond=[0,1] guidance.scale=2",
    ),
    "evaluate": (
        "run=outputs/train/RUN",
        "run=outputs/train/RUN sampler=ddim,dpmpp_2m sampler.steps=10,20",
        "analytic=mixture",
    ),
    "compare": (
        "outputs/sweeps/SWEEP",
        "outputs/train/RUN_A outputs/train/RUN_B",
        "outputs/sweeps/SWEEP sampler=ddim sampler.steps=50",
    ),
    "export": (
        "run=outputs/train/RUN",
        "ckpt=outputs/train/RUN/checkpoints/best.ckpt",
        "run=outputs/train/RUN ema=false",
    ),
    "schedules": ("names=[linear,cosine]", "num_steps=100 zero_terminal_snr=true", "data=mnist frames=9"),
    "dashboard": ("entity=TEAM", "entity=TEAM report=true", "entity=TEAM project=PROJECT"),
}
"""Example overrides."""


def help_text(command: str, groups: Mapping[str, Sequence[str]]) -> str:
    """Return the help of `src.<command>`: conf/<command>.yaml and the options that its defaults list chooses."""
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
        *("", "Examples:", *(f"  python -m src.{command} {words}" for words in EXAMPLES[command])),
        *(["", "Config groups (GROUP=OPTION), files under conf/ and in --config-dir:", *lists] if lists else []),
        *("", "Settings (SETTING=VALUE):", *_settings(text, groups)),
    ]
    for group, option in chosen.items():
        if (file := CONF / group / f"{option}.yaml").is_file() and (settings := _settings(file.read_text(), ())):
            lines += ["", f"Settings of {group}={option}:", *settings]
    lines += ["", "--cfg job prints all settings with their values, --hydra-help the flags of Hydra."]
    return "\n".join(lines)


def _settings(text: str, groups: Collection[str]) -> list[str]:
    """Return the settings in a YAML as lines, without Hydra's and without placeholders of `groups`."""
    text = re.sub(r"^(?:defaults|run_dir|hydra):.*\n?(?:  .*\n?)*", "", text, flags=re.MULTILINE)
    lines = [line for line in text.splitlines() if line.strip() and not re.match(r"#|\s*_\w+_:", line)]
    return [f"  {line}" for line in lines if line.partition(":")[0] not in groups]
