"""What differs between runs and how much of it is chance: pure functions over records, for `src.compare`.

Runs with the same settings but for the seed are a group. Groups are compared by Welch's t-test (Welch 1947) of their
seeds' figures, with Holm's correction (Holm 1979) over the pairs that are asked about.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from src.viz.tables import better_direction, format_number

LEVEL = 0.05
"""Of the tests: how often one or more of a family of pairs that do not differ would be called real."""
OF_WORK = (
    *("run_dir", "resume", "trust", "optimized_metric", "keep_checkpoints", "checkpoint_every", "validate_every"),
    *("data.num_workers", "data.microbatch_size", "data.root", "data.skip_unreadable", "neighbors", "logger"),
    *(f"trainer.{name}" for name in ("accelerator", "devices", "num_nodes", "strategy", "accumulate_grad_batches")),
    *("trainer.enable_progress_bar", "trainer.log_every_n_steps", "compile"),
    *(
        f"callbacks.{name}"
        for name in ("progress", "samples", "best", "checkpoint_every", "graceful_shutdown", "quality", "bits_per_dim")
    ),
    *(f"callbacks.{name}" for name in ("run_info", "throughput", "loss_by_noise", "wandb_artifact")),
)
"""Settings, or nodes of them, that say how and where a run works, not what it learns."""
LOSS_KEYS = ("schedule", "loss", "timestep_sampler", "diffusion", "snr_shift", "zero_terminal_snr")
"""Settings with which the loss measures something else."""
OF_DATA = (
    *("_target_", "source", "root", "image_size", "channels", "num_values", "val_fraction", "split_seed"),
    *("columns", "mean", "std"),  # of a table, wherever it lies
)
"""Settings of the data with which figures measure something else; of a generated distribution all are."""
MAIN = ("fid", "fd_classifier", "fd_dinov2", "fd_", "sliced_wasserstein", "bits_per_dim", "kid", "kd_", "val/loss")
"""By which of the figures, the first that there is, the page says what is best."""

Verdict = Literal["best", "real", "not told apart by so few seeds", "one seed only: cannot be told"]


@dataclass(frozen=True)
class Record:
    """What is known of one run: its settings by dotted names, and figures by theirs."""

    name: str
    seed: int
    settings: Mapping[str, Any]
    values: Mapping[str, float]
    choices: Mapping[str, str] = field(default_factory=dict)
    """The file chosen of each group of conf/."""
    typed_overrides: Sequence[str] = ()
    """Names of the settings and choices that were given on the command line."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Of the figures that have one: how far chance in sampling, not in training, may have moved them."""
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone; `settings` are the few that tell this group from the others."""

    label: str
    settings: Mapping[str, Any]
    records: Sequence[Record]

    def values(self, metric: str) -> list[float]:
        """The finite ones, a run each."""
        found = (record.values.get(metric) for record in self.records)
        return [x for x in found if x is not None and math.isfinite(x)]


class Summary(NamedTuple):
    """Of n seeds; `std` is NaN for one."""

    mean: float
    std: float
    n: int


class Pair(NamedTuple):
    """Groups by their numbers, the mean of `first` minus that of `second` with its 95% interval, and the test.

    `p` is Welch's, `adjusted` Holm's; all four are NaN where a group has one seed only.
    """

    first: int
    second: int
    difference: float
    low: float
    high: float
    p: float
    adjusted: float

    @property
    def verdict(self) -> Verdict:
        """Whether the difference is more than seeds make of themselves."""
        if math.isnan(self.adjusted):
            return "one seed only: cannot be told"
        return "real" if self.adjusted < LEVEL else "not told apart by so few seeds"


@dataclass(frozen=True)
class Ranking:
    """One metric over the groups. `best` is None where it is not ranked, and `why` says the reason."""

    metric: str
    direction: Literal["lower", "higher"] | None
    summaries: Sequence[Summary | None]
    best: int | None
    why: str
    against_best: Sequence[Pair]
    """The best, and each of the others; corrected over these."""
    pairs: Sequence[Pair]
    """Each with each; corrected over all of them."""

    def verdict(self, group: int) -> Verdict | None:
        """Of a group's difference from the best one."""
        if group == self.best:
            return "best"
        return next((pair.verdict for pair in self.against_best if pair.second == group), None)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def of_node(name: str, nodes: Sequence[str]) -> bool:
    """Whether a dotted name is, or lies below, one of the nodes."""
    return any(name == node or name.startswith(f"{node}.") for node in nodes)


def compared(record: Record) -> dict[str, Any]:
    """The settings that make a run what it is: without its seed and folder, in whatever place, and how it works."""
    seed, folder = record.settings.get("seed"), record.settings.get("run_dir")
    return {
        name: value.replace(folder, "") if folder and isinstance(value, str) else value
        for name, value in record.settings.items()
        if not of_node(name, OF_WORK) and not (name.rpartition(".")[2] == "seed" and value == seed)
    }


def data_of(settings: Mapping[str, Any], root: bool = True) -> dict[str, Any]:
    """The settings that say which data a run has, and which of them it held out; `root` with where they lie."""
    found = {name.removeprefix("data."): value for name, value in settings.items() if name.startswith("data.")}
    points = "num_samples" in found
    of_work = ("batch_size", "microbatch_size", "num_workers", "seed")
    return {
        name: value
        for name, value in found.items()
        if (name not in of_work if points else of_node(name, OF_DATA)) and (root or name != "root")
    }


def without_repeats(records: Sequence[Record]) -> tuple[list[Record], list[tuple[Record, Record]]]:
    """Runs of which no two have the same settings and seed, the last of each; and the pairs (left out, kept).

    The same run twice would count as two seeds, and make the spread seem smaller than it is.
    """
    last: dict[str, Record] = {}
    repeats = []
    for record in records:
        key = repr((record.seed, sorted(compared(record).items(), key=lambda item: item[0])))
        if key in last:
            repeats.append((last.pop(key), record))
        last[key] = record
    return list(last.values()), repeats


def grouped(records: Sequence[Record]) -> tuple[list[Group], dict[str, list[Any]]]:
    """Groups of runs that differ in their seed alone, and the settings that came along with those that name them.

    Of the settings that differ, those that were typed come first, then choices of files, then the others; one that
    tells no groups apart that those before it have not told apart is not needed to name them: it is among the second,
    with its value in each group.
    """
    members: dict[str, list[Record]] = {}
    for record in records:
        key = repr(sorted(compared(record).items(), key=lambda item: item[0]))
        members.setdefault(key, []).append(record)
    runs = [sorted(group, key=lambda record: record.seed) for group in members.values()]
    settings = [compared(group[0]) for group in runs]
    names = list(dict.fromkeys(name for each in settings for name in each))
    columns: dict[str, list[Any]] = {}
    for name in dict.fromkeys(name for group in runs for record in group for name in record.choices):
        chosen = [{record.choices.get(name) for record in group} for group in runs]
        if name not in OF_WORK and all(len(each) == 1 for each in chosen):
            columns[name] = [each.pop() for each in chosen]
    columns |= {name: [each.get(name) for each in settings] for name in names if name not in columns}
    differing = {name: values for name, values in columns.items() if len(set(map(repr, values))) > 1}
    typed_overrides = {name for group in runs for record in group for name in record.typed_overrides}
    order = sorted(differing, key=lambda name: (name not in typed_overrides, name not in runs[0][0].choices))
    naming: dict[str, list[Any]] = {}
    apart = [""] * len(runs)
    for name in order:
        finer = [f"{before};{value!r}" for before, value in zip(apart, differing[name], strict=True)]
        if len(set(finer)) > len(set(apart)):
            naming[name], apart = differing[name], finer
    groups = []
    for k, group in enumerate(runs):
        own = {name: values[k] for name, values in naming.items()}
        groups.append(Group(label_of(own), own, group))
    return groups, {name: differing[name] for name in order if name not in naming}


def label_of(settings: Mapping[str, Any]) -> str:
    """What a group is called: the values of what tells it from others, with names where they are numbers."""
    if not settings:
        return "all runs"
    parts = []
    for name, value in settings.items():
        shown = text(value).rpartition(".")[2] if name.endswith("_target_") else text(value)
        parts.append(shown if isinstance(value, str) else f"{name.rpartition('.')[2]} {shown}")
    return ", ".join(parts)


def text(value: Any) -> str:
    """A setting as it is typed."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(text, value))}]"
    return str(value)


def summary(values: Sequence[float]) -> Summary | None:
    """Mean and standard deviation (of n - 1); None of nothing."""
    if not values:
        return None
    return Summary(fmean(values), stdev(values) if len(values) > 1 else math.nan, len(values))


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """p of Welch's t-test, and the 95% interval of mean(a) - mean(b); NaN where either has fewer than two values.

    Of two groups that do not vary at all, any difference is certain: p is 0, or 1 if there is none.
    """
    if min(len(a), len(b)) < 2:
        return math.nan, math.nan, math.nan
    difference = fmean(a) - fmean(b)
    if len({*a}) == len({*b}) == 1:
        return float(difference == 0), difference, difference
    from scipy import stats

    with warnings.catch_warnings():  # of a group whose values are all but one, whose mean is as exact as they are
        warnings.filterwarnings("ignore", "Precision loss")
        test = stats.ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(1 - LEVEL)
    return float(test.pvalue), float(interval.low), float(interval.high)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: below the level are those that a family of tests rejects. NaN are no part of it."""
    known = sorted((k for k in range(len(p)) if not math.isnan(p[k])), key=lambda k: p[k])
    adjusted, largest = list(p), 0.0
    for rank, k in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p[k]))
        adjusted[k] = largest
    return adjusted


def tested(values: Sequence[Sequence[float]], pairs: Sequence[tuple[int, int]]) -> list[Pair]:
    """The pairs of groups, corrected over all of them."""
    tests = [welch(values[a], values[b]) for a, b in pairs]
    adjusted = holm([p for p, _, _ in tests])
    return [
        Pair(a, b, fmean(values[a]) - fmean(values[b]), low, high, p, q)
        for (a, b), (p, low, high), q in zip(pairs, tests, adjusted, strict=True)
    ]


def ranked(groups: Sequence[Group], metric: str) -> Ranking:
    """The groups by one metric, if it measures the same in all of them and has a better side."""
    values = [group.values(metric) for group in groups]
    summaries = [summary(each) for each in values]
    there = [k for k, each in enumerate(summaries) if each is not None]
    pairs = tested(values, list(combinations(there, 2)))
    direction, why = better_direction(metric), ""
    if direction is None:
        why = "neither more nor less of it is better"
    elif metric.startswith("val/") and metric != "val/bits_per_dim" and (names := differing_in(groups, LOSS_KEYS)):
        why = f"it measures something else where {listed(names)} differ{'s' if len(names) == 1 else ''}"
    elif len({value for k in there for value in values[k]}) == 1 and len(there) > 1:
        why = "it is the same in all groups"
    if why or len(there) < 2:
        return Ranking(metric, direction, summaries, None, why, [], pairs)
    sign = 1 if direction == "lower" else -1
    best = min(there, key=lambda k: sign * _mean(summaries[k]))
    against = tested(values, [(best, k) for k in there if k != best])
    return Ranking(metric, direction, summaries, best, "", against, pairs)


def _mean(each: Summary | None) -> float:
    assert each is not None
    return each.mean


def differing_in(groups: Sequence[Group], nodes: Sequence[str]) -> list[str]:
    """Those of the nodes below which the groups' settings differ."""
    settings = [{n: v for n, v in compared(group.records[0]).items() if of_node(n, nodes)} for group in groups]
    names = {name for each in settings for name in each}
    found = [n for n in names if len({repr(each.get(n)) for each in settings}) > 1]
    return [node for node in nodes if any(of_node(name, [node]) for name in found)]


def metrics_of(groups: Sequence[Group]) -> list[str]:
    """The metrics that any run has: first the main ones, then as the runs list them."""
    names = dict.fromkeys(name for group in groups for record in group.records for name in record.values)

    def place(name: str) -> int:
        return next((k for k, start in enumerate(MAIN) if name.startswith(start)), len(MAIN))

    return sorted(names, key=place)


def common_settings(groups: Sequence[Group]) -> dict[str, Any]:
    """What all runs have in common, of the settings that are compared."""
    first, *others = (compared(group.records[0]) for group in groups)
    return {n: v for n, v in first.items() if all(n in each and each[n] == v for each in others)}


def with_spread(each: Summary | None) -> str:
    """Mean ± standard deviation, to the second digit of the latter."""
    if each is None:
        return "-"
    if each.n == 1 or each.std == 0:
        return format_number(each.mean)
    return f"{format_number(each.mean, each.std)} ± {format_number(each.std, each.std)}"


def interval(pair: Pair) -> str:
    """The difference with its 95% interval, to the second digit of half the width."""
    width = (pair.high - pair.low) / 2
    if math.isnan(width) or width <= 0:
        return format_number(pair.difference, sign="+")
    value, low, high = (format_number(x, width, "+") for x in (pair.difference, pair.low, pair.high))
    return f"{value} [{low}, {high}]"


def chance(p: float) -> str:
    """A p-value as it is written."""
    return "-" if math.isnan(p) else "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def sentence(groups: Sequence[Group], ranking: Ranking, title: Callable[[str], str] = str) -> str:
    """Which group is better by one metric, and whether the difference is real; `title` is what a metric is called."""
    metric = title(ranking.metric)
    if ranking.best is None:
        only = ranking.why or "only one group has it"
        return f"{metric} is not ranked: {only}."
    best, others = ranking.best, ranking.against_best
    shown = {k: with_spread(each) for k, each in enumerate(ranking.summaries)}
    by = f"{metric} ({ranking.direction} is better)"
    if len(others) == 1:
        (pair,) = others
        a, b = groups[best].label, groups[pair.second].label
        figures = f"{shown[best]} against {shown[pair.second]}"
        match pair.verdict:
            case "real":
                counts = " and ".join(str(len(groups[k].values(ranking.metric))) for k in (best, pair.second))
                return (
                    f"{a} is better than {b} by {by}: {figures}. The difference, {interval(pair)} with {counts} seeds, "
                    f"is real ({chance(pair.adjusted)})."
                )
            case "not told apart by so few seeds":
                return (
                    f"By {by}, {a} and {b} cannot be told apart by so few seeds: {figures}. The difference, "
                    f"{interval(pair)}, may be chance ({chance(pair.adjusted)})."
                )
            case _:
                return (
                    f"{a} came out better than {b} by {by}: {figures}. Whether the difference is real cannot be told "
                    "from one seed: add seed=0,1,2."
                )
    parts = [f"{groups[best].label} comes out best by {by}: {shown[best]}."]
    by_verdict: dict[str, list[str]] = {}
    for pair in sorted(others, key=lambda pair: abs(pair.difference)):
        by_verdict.setdefault(pair.verdict, []).append(groups[pair.second].label)
    if real := by_verdict.get("real"):
        parts.append(f"Its advantage is real over {'all others' if len(real) == len(others) else listed(real)}.")
    if same := by_verdict.get("not told apart by so few seeds"):
        whom = "all others" if len(same) == len(others) else listed(same)
        parts.append(f"Not told apart from it by so few seeds: {whom}.")
    if untold := by_verdict.get("one seed only: cannot be told"):
        whom = "any of it" if len(untold) == len(others) else f"it over {listed(untold)}"
        parts.append(f"Whether {whom} is real cannot be told from one seed: add seed=0,1,2.")
    return " ".join(parts)


def headline(groups: Sequence[Group], rankings: Sequence[Ranking], title: Callable[[str], str] = str) -> str:
    """Which is better, and is the difference real: by the main metric."""
    if len(groups) == 1:
        counts = len(groups[0].records)
        return f"All {counts} runs have the same settings: there is nothing to compare but their spread over seeds."
    main = next((ranking for ranking in rankings if ranking.best is not None), None)
    if main is None:
        return "No figure that could be ranked was measured in two groups or more."
    return sentence(groups, main, title)
