"""Group runs by their settings: pure functions over records. Runs that differ only in the seed form a group."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

RUNTIME_SETTINGS = (
    "recipe",  # other settings read it
    *("run_dir", "resume", "trust", "optimized_metric", "keep_checkpoints", "checkpoint_every", "validate_every"),
    *("data.num_workers", "data.microbatch_size", "data.root", "data.skip_unreadable", "neighbors", "logger"),
    *(f"trainer.{name}" for name in ("accelerator", "devices", "num_nodes", "strategy", "accumulate_grad_batches")),
    *("trainer.enable_progress_bar", "trainer.log_every_n_steps", "compile"),
    *(
        f"callbacks.{name}"
        for name in ("progress", "samples", "best", "checkpoint_every", "graceful_shutdown", "quality", "bits_per_dim")
    ),
    *(f"autoencoder.{name}" for name in ("batch_size", "cache_dir")),
    *(f"callbacks.{name}" for name in ("run_info", "throughput", "loss_by_noise", "wandb_artifact", "power_ema")),
)
"""Settings, or nodes of settings, that do not change the trained model."""
ENCODERS = {
    "autoencoder.fingerprint": "autoencoder.path",
    "conditioning.encode.fingerprint": "conditioning.encode.model",
}
"""The setting that identifies a frozen encoder, and that of its path."""
LOSS_KEYS = (
    *("schedule", "loss", "timestep_sampler", "diffusion", "snr_shift", "zero_terminal_snr", "autoencoder"),
    "data.coupling",
)
"""Settings that change the meaning of the loss."""
DATA_SETTINGS = (
    *("_target_", "source", "root", "image_size", "channels", "num_values", "val_fraction", "split_seed"),
    *("columns", "mean", "std"),  # statistics of a table
)
"""Settings of the data that change the meaning of metrics. For a generated distribution these are all settings."""


@dataclass(frozen=True)
class RunRecord:
    """One run: its settings by dotted names, and its metrics."""

    name: str
    seed: int
    settings: Mapping[str, Any]
    values: Mapping[str, float]
    choices: Mapping[str, str] = field(default_factory=dict)  # the chosen file of each config group
    typed_overrides: Sequence[str] = ()  # names of the settings and groups in the command line's overrides
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Intervals that cover the randomness of sampling, not of training."""
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed; `settings` are those that name the group."""

    label: str
    settings: Mapping[str, Any]
    records: Sequence[RunRecord]

    @property
    def formatted_settings(self) -> dict[str, str]:
        return {name: format_setting(value) for name, value in self.settings.items()}

    def values(self, metric: str) -> list[float]:
        """Return the finite values of a metric, one per run."""
        values = (record.values.get(metric) for record in self.records)
        return [x for x in values if x is not None and math.isfinite(x)]


def is_below(name: str, nodes: Sequence[str]) -> bool:
    return any(name == node or name.startswith(f"{node}.") for node in nodes)


def identity_settings(record: RunRecord) -> dict[str, Any]:
    """Return the settings that determine the model: all but the seed, the run folder and `RUNTIME_SETTINGS`."""
    seed, folder = record.settings.get("seed"), record.settings.get("run_dir")
    return {
        name: value.replace(folder, "") if folder and isinstance(value, str) else value
        for name, value in record.settings.items()
        if not is_below(name, RUNTIME_SETTINGS) and not (name.rpartition(".")[2] == "seed" and value == seed)
    }


def data_of(settings: Mapping[str, Any], root: bool = True) -> dict[str, Any]:
    """Return the settings that determine a run's data and its split, and with `root` also their location."""
    own = {name.removeprefix("data."): value for name, value in settings.items() if name.startswith("data.")}
    points = "num_samples" in own
    runtime = ("batch_size", "microbatch_size", "coupling", "num_workers", "seed")
    return {
        name: value
        for name, value in own.items()
        if (name not in runtime if points else is_below(name, DATA_SETTINGS)) and (root or name != "root")
    }


def with_shared_paths(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the records with one path for each frozen encoder: that of the first run with its fingerprint.

    The same encoder at another path would separate groups.
    """
    paths: dict[tuple[str, Any], Any] = {}
    result = []
    for record in records:
        settings = dict(record.settings)
        for name, path in ENCODERS.items():
            if (fingerprint := settings.get(name)) is not None:
                settings[path] = paths.setdefault((name, fingerprint), settings.get(path))
        result.append(replace(record, settings=settings))
    return result


def without_repeats(records: Sequence[RunRecord]) -> tuple[list[RunRecord], list[tuple[RunRecord, RunRecord]]]:
    """Return the last run of each settings and seed, and the pairs (dropped, kept).

    A repeated run would count as a second seed and reduce the standard deviation.
    """
    last: dict[str, RunRecord] = {}
    repeats = []
    for record in records:
        key = repr((record.seed, sorted(identity_settings(record).items())))
        if key in last:
            repeats.append((last.pop(key), record))
        last[key] = record
    return list(last.values()), repeats


def group_by_settings(records: Sequence[RunRecord]) -> tuple[list[Group], dict[str, list[Any]]]:
    """Return groups of runs that differ only in their seed, and the implied settings with their value per group.

    Settings that differ name the groups: first those typed on the command line, then chosen files, then the others.
    A setting that separates no further groups is implied by those before it.
    """
    members: dict[str, list[RunRecord]] = {}
    for record in records:
        members.setdefault(repr(sorted(identity_settings(record).items())), []).append(record)
    runs = [sorted(group, key=lambda record: record.seed) for group in members.values()]
    settings = [identity_settings(group[0]) for group in runs]
    columns: dict[str, list[Any]] = {}
    for name in dict.fromkeys(name for record in records for name in record.choices):
        chosen = [{record.choices.get(name) for record in group} for group in runs]
        if name not in RUNTIME_SETTINGS and all(len(each) == 1 for each in chosen):
            columns[name] = [each.pop() for each in chosen]
    for name in dict.fromkeys(name for each in settings for name in each):
        columns.setdefault(name, [each.get(name) for each in settings])
    differing = {name: values for name, values in columns.items() if len(set(map(repr, values))) > 1}
    typed = {name for record in records for name in record.typed_overrides}
    order = sorted(differing, key=lambda name: (name not in typed, name not in runs[0][0].choices))
    naming: dict[str, list[Any]] = {}
    split = [""] * len(runs)
    for name in order:
        finer = [f"{before};{value!r}" for before, value in zip(split, differing[name], strict=True)]
        if len(set(finer)) > len(set(split)):
            naming[name], split = differing[name], finer
    named = [{name: values[k] for name, values in naming.items()} for k in range(len(runs))]
    groups = [Group(group_label(own), own, group) for own, group in zip(named, runs, strict=True)]
    return groups, {name: differing[name] for name in order if name not in naming}


def group_label(settings: Mapping[str, Any]) -> str:
    """Return a group's name: the values of its settings, with the names of those that are numbers."""
    if not settings:
        return "all runs"
    parts = []
    for name, value in settings.items():
        shown = format_setting(value).rpartition(".")[2] if name.endswith("_target_") else format_setting(value)
        parts.append(shown if isinstance(value, str) else f"{name.removesuffix('.path').rpartition('.')[2]} {shown}")
    return ", ".join(parts)


def format_setting(value: Any) -> str:
    """Return a setting as typed on the command line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_setting, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def differing_in(groups: Sequence[Group], nodes: Sequence[str]) -> list[str]:
    """Return the config nodes in which the groups differ."""

    def values(node: str, group: Group) -> str:
        settings = identity_settings(group.records[0])
        return repr(
            sorted((name, value) for name, value in settings.items() if is_below(name, [node]) and value is not None)
        )

    return [node for node in nodes if len({values(node, group) for group in groups}) > 1]


def common_settings(groups: Sequence[Group]) -> dict[str, Any]:
    """Return the identity settings that are equal in all runs."""
    first, *others = (identity_settings(group.records[0]) for group in groups)
    return {n: v for n, v in first.items() if all(n in each and each[n] == v for each in others)}
