"""Generate docs/reference.md from conf/: every group, its options, and each setting with its default and comment.

Run it by `make reference`. The first comment of a file describes the option. The comment of a setting is at the end
of its line or above it, in this file or in one that its defaults list includes (`_unet.yaml`, `_images.yaml`).
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
TARGET = ROOT / "docs" / "reference.md"
GROUPS = {
    "experiment": "Recipes: tested combinations of options and settings.",
    "task": "What is trained; the default is `diffusion`.",
    "data": "Datasets.",
    "model": "Networks.",
    "schedule": "Noise schedules.",
    "loss": "Loss functions.",
    "weighting": "Loss weights by noise level.",
    "timestep_sampler": "Distributions of noise levels in training.",
    "conditioning": "Conditions for conditional models. The default is `null`.",
    "lora": "Low-rank adapters for fine-tuning ([finetuning.md](finetuning.md)). The default is `null`.",
    "repa": "Alignment of hidden features ([flows.md](flows.md)). The default is `null`.",
    "sampler": "Samplers.",
    "optimizer": "Optimizers; see [design.md](design.md#optimizers).",
    "lr_scheduler": "Learning-rate schedules.",
    "trainer": "Lightning's Trainer.",
    "callbacks": "Callbacks.",
    "logger": "Loggers; `logger=[csv,wandb]` uses several.",
    "debug": "Presets for debugging.",
    "sweep": "Ready-made sweeps, with `-m`.",
    "analytic": "Distributions with a known answer, for `src.evaluate analytic=...`.",
    "hydra/launcher": "Where the jobs of a sweep run.",
    "hydra/sweeper": "How a sweep chooses values.",
    "hydra/callbacks": "Actions after a sweep.",
}
COMMANDS = ("train", "sample", "evaluate", "compare", "schedules", "export", "ema", "dashboard", "doctor")
SECTION = re.compile(r"^(?P<indent> *)(?P<key>[\w./]+):(?:\s+(?P<rest>.*))?$")


def reference() -> str:
    """Return the text of docs/reference.md."""
    lines = [
        "# Settings",
        "",
        "`make reference` generates this page from the comments in `conf/`. `python -m src.train --cfg job` prints the",
        "composed configuration of a command. Each option is a file, `conf/<group>/<option>.yaml`. Settings have the",
        "names that you type. An option lists the settings in which it differs from the options above it.",
        "",
    ]
    for command in COMMANDS:
        lines += [f"## src.{command}", "", *usage(CONF / f"{command}.yaml"), *table(CONF / f"{command}.yaml", ""), ""]
    groups = {str(path.parent.relative_to(CONF)) for path in CONF.glob("*/**/*.yaml")}
    for group in [*GROUPS, *sorted(groups - set(GROUPS))]:
        if group in groups:
            lines += [f"## {group}", "", *filter(None, [GROUPS.get(group)]), *group_section(group)]
    return "\n".join(lines).rstrip() + "\n"


def usage(path: Path) -> list[str]:
    """Return the example commands in the first comments of a command's file, as a code block."""
    examples = [line for line in header(path) if line.startswith("python ")]
    return ["```", *examples, "```", ""] if examples else []


def group_section(group: str) -> list[str]:
    """Return the options of a group, and the settings of each that another one of the group has not listed."""
    options = [path for path in sorted((CONF / group).glob("*.yaml")) if not path.stem.startswith("_")]
    default = default_of(group)
    options.sort(key=lambda path: path.stem != default)
    lines = ["", "| option | |", "|---|---|"]
    for path in options:
        about = " ".join(header(path))
        lines.append(f"| `{path.stem}`{' (default)' if path.stem == default else ''} | {cell(about)} |")
    listed: set[tuple[str, str, str]] = set()
    for path in options:
        rows = [row for row in settings(path, group) if row not in listed]
        listed |= set(rows)
        if rows:
            lines += ["", f"### {group}={path.stem}", "", *rows_of(rows)]
    return [*lines, ""]


def default_of(group: str) -> str | None:
    """Return the option that conf/train.yaml chooses."""
    for entry in read(CONF / "train.yaml").get("defaults", []):
        if isinstance(entry, dict) and group in entry:
            return str(entry[group]) if entry[group] is not None else None
    return None


def table(path: Path, prefix: str) -> list[str]:
    return rows_of(settings(path, prefix))


def rows_of(rows: list[tuple[str, str, str]]) -> list[str]:
    lines = ["| setting | default | |", "|---|---|---|"]
    return [
        *lines,
        *(f"| `{name}` | {default and f'`{cell(default)}`'} | {cell(comment)} |" for name, default, comment in rows),
    ]


def settings(path: Path, group: str) -> list[tuple[str, str, str]]:
    """Return (setting, default, comment) of each leaf of a file and of the files of its group that it includes."""
    found: dict[str, tuple[str, str]] = {}
    for part in included(path):
        prefix = "" if is_global(part) else group.replace("/", ".")
        for name, default, comment in leaves(part):
            if name.startswith(("defaults", "hydra.")) or name.rsplit(".", 1)[-1] in ("_partial_", "_target_"):
                continue
            name = f"{prefix}.{name}".lstrip(".")
            before = found.get(name, ("", ""))
            found[name] = (default, comment or before[1])
    return [(name, default, comment) for name, (default, comment) in found.items()]


def included(path: Path) -> Iterator[Path]:
    """Yield the files of the same group in a file's defaults list, as Hydra merges them, and the file itself."""
    for entry in read(path).get("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            base = CONF / f"{entry[1:]}.yaml" if entry.startswith("/") else path.parent / f"{entry}.yaml"
            if base.exists():  # those of Hydra's plugins are documented there
                yield from included(base)
    yield path


def is_global(path: Path) -> bool:
    return "@package _global_" in path.read_text().split("\n", 1)[0]


def leaves(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (dotted name, default as it is written, comment) of each setting, with the comments of its parents.

    The files are plain YAML: nested mappings in block style, lists and mappings of one line as values.
    """
    parents: list[tuple[int, str]] = []
    lines = path.read_text().splitlines()
    first = sum(1 for _ in itertools.takewhile(lambda line: line.startswith("#"), lines))  # below the header
    for number, line in enumerate(lines):
        match = SECTION.match(line)
        if not match:
            continue
        above = itertools.takewhile(lambda before: before.strip().startswith("# "), reversed(lines[:number]))
        about = " ".join(before.strip().removeprefix("# ") for before in reversed([*above])) if number > first else ""
        indent, (value, comment) = len(match["indent"]), split_comment(match["rest"] or "")
        comment = comment or about
        parents = [(depth, key) for depth, key in parents if depth < indent]
        name = ".".join([*(key for _, key in parents), match["key"]])
        following = next(
            (rest for rest in lines[number + 1 :] if rest.strip() and not rest.strip().startswith("#")), ""
        )
        nested = len(following) - len(following.lstrip()) > indent
        if value in ("", ">-", "|") and nested:
            child = SECTION.match(following)
            parents.append((indent, match["key"]))
            if child is None or child["key"] == "":  # a list or a text over several lines
                yield name, "...", comment
            elif comment:
                yield name, "", comment
        else:
            yield name, value, comment


def split_comment(text: str) -> tuple[str, str]:
    """Return a value and the comment behind it."""
    value, mark, comment = text.partition(" # ")
    if text.startswith("# "):
        return "", text[2:].strip()
    return value.strip(), comment.strip() if mark else ""


def header(path: Path) -> list[str]:
    """Return the first comment lines of a file, without the package directive."""
    lines: list[str] = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.removeprefix("#").strip())
    return lines


def read(path: Path) -> dict[str, Any]:
    loaded = yaml.safe_load(path.read_text())
    return loaded if isinstance(loaded, dict) else {}


def cell(text: str) -> str:
    """Return text that a Markdown table can hold."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(reference())
