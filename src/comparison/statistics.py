"""Compare groups of runs by Welch's t-test over seeds, with Holm's correction over the tested pairs, in words."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev
from typing import Literal, NamedTuple

from src.comparison.grouping import LOSS_KEYS, Group, differing_in
from src.viz.tables import better_direction, format_number, metric_title

ALPHA = 0.05  # significance level: the probability of a false positive in a family of tests
MAIN = (
    *("fid", "fd_classifier", "fd_dinov2", "kd_efficientnet", "fd_"),
    *("sliced_wasserstein", "bits_per_dim", "kid", "kd_", "val/loss"),
)
"""Metrics in the order of priority for the headline."""

Verdict = Literal["best", "significant", "not significant", "single seed"]


class Summary(NamedTuple):
    """Mean and standard deviation over n seeds; `std` is NaN for n = 1."""

    mean: float
    std: float
    n: int


class Pair(NamedTuple):
    """The difference mean(first) - mean(second) of two groups, its 95% interval, and the test.

    `p` is Welch's p-value, `adjusted` Holm's. All but the difference are NaN where a group has a single seed.
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
        if math.isnan(self.adjusted):
            return "single seed"
        return "significant" if self.adjusted < ALPHA else "not significant"


@dataclass(frozen=True)
class Ranking:
    """A ranking of the groups by one metric. `best` is None if it is not ranked, for the given `reason`."""

    metric: str
    direction: Literal["lower", "higher"] | None
    summaries: Sequence[Summary | None]
    best: int | None
    reason: str
    pairs_with_best: Sequence[Pair]  # the best group with each other one, corrected over these pairs
    pairs: Sequence[Pair]  # all pairs of groups, corrected over all of them

    def verdict(self, group: int) -> Verdict | None:
        """Return the verdict on a group's difference from the best one."""
        if group == self.best:
            return "best"
        return next((pair.verdict for pair in self.pairs_with_best if pair.second == group), None)


def summarize_seeds(values: Sequence[float]) -> Summary | None:
    """Return the mean and the sample standard deviation (n - 1); None without values."""
    if not values:
        return None
    return Summary(fmean(values), stdev(values) if len(values) > 1 else math.nan, len(values))


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Return the p-value of Welch's t-test and the 95% interval of mean(a) - mean(b); NaN for fewer than two values.

    Two groups without variance have p = 0, or p = 1 if they are equal.

    Source: Welch 1947.
    """
    if min(len(a), len(b)) < 2:
        return math.nan, math.nan, math.nan
    difference = fmean(a) - fmean(b)
    if len({*a}) == len({*b}) == 1:
        return float(difference == 0), difference, difference
    from scipy import stats

    with warnings.catch_warnings():  # for nearly equal values, whose mean is exact
        warnings.filterwarnings("ignore", "Precision loss")
        test = stats.ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(1 - ALPHA)
    return float(test.pvalue), float(interval.low), float(interval.high)


def holm(p: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values; the family of tests excludes NaN. Source: Holm 1979."""
    known = sorted((k for k in range(len(p)) if not math.isnan(p[k])), key=lambda k: p[k])
    adjusted, largest = list(p), 0.0
    for rank, k in enumerate(known):
        adjusted[k] = largest = max(largest, min(1.0, (len(known) - rank) * p[k]))
    return adjusted


def compare_pairs(values: Sequence[Sequence[float]], pairs: Sequence[tuple[int, int]]) -> list[Pair]:
    """Test the pairs of groups, corrected over all of them."""
    tests = [welch(values[a], values[b]) for a, b in pairs]
    adjusted = holm([p for p, _, _ in tests])
    return [
        Pair(a, b, fmean(values[a]) - fmean(values[b]), low, high, p, q)
        for (a, b), (p, low, high), q in zip(pairs, tests, adjusted, strict=True)
    ]


def rank_groups(groups: Sequence[Group], metric: str) -> Ranking:
    """Rank the groups by one metric, if it has a better direction and the same meaning in all groups."""
    values = [group.values(metric) for group in groups]
    summaries = [summarize_seeds(each) for each in values]
    present = [k for k, each in enumerate(summaries) if each is not None]
    pairs = compare_pairs(values, list(combinations(present, 2)))
    direction, reason = better_direction(metric), ""
    if direction is None:
        reason = "neither direction is better"
    elif names := differing_in(groups, meaning_of(metric)):
        reason = f"its meaning depends on {join_names(names)}, which differ{'s' if len(names) == 1 else ''}"
    elif len({value for k in present for value in values[k]}) == 1 and len(present) > 1:
        reason = "it is equal in all groups"
    if reason or len(present) < 2:
        return Ranking(metric, direction, summaries, None, reason, [], pairs)
    sign = 1 if direction == "lower" else -1
    best = min(present, key=lambda k: sign * fmean(values[k]))
    with_best = compare_pairs(values, [(best, k) for k in present if k != best])
    return Ranking(metric, direction, summaries, best, "", with_best, pairs)


def meaning_of(metric: str) -> Sequence[str]:
    """Return the settings that change the meaning of a metric: a loss has several, a likelihood the latents."""
    if metric.endswith("bits_per_dim"):
        return ("autoencoder",)
    return LOSS_KEYS if metric.startswith("val/") else ()


def metrics_of(groups: Sequence[Group]) -> list[str]:
    """Return the metrics of all runs: the main ones first, then in the order of the runs."""
    names = dict.fromkeys(name for group in groups for record in group.records for name in record.values)

    def priority(name: str) -> int:
        return next((k for k, start in enumerate(MAIN) if name.startswith(start)), len(MAIN))

    return sorted(names, key=priority)


def format_summary(each: Summary | None) -> str:
    if each is None:
        return "-"
    if each.n == 1 or each.std == 0:
        return format_number(each.mean)
    return f"{format_number(each.mean, each.std)} ± {format_number(each.std, each.std)}"


def format_difference(pair: Pair) -> str:
    width = (pair.high - pair.low) / 2
    if math.isnan(width) or width <= 0:
        return format_number(pair.difference, sign="+")
    value, low, high = (format_number(x, width, "+") for x in (pair.difference, pair.low, pair.high))
    return f"{value} [{low}, {high}]"


def format_p_value(p: float) -> str:
    return "-" if math.isnan(p) else "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def join_names(names: Sequence[str]) -> str:
    """Format names as `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def describe_ranking(groups: Sequence[Group], ranking: Ranking) -> str:
    """Return which group is better by one metric, and whether the difference is significant."""
    metric = metric_title(ranking.metric)
    if ranking.best is None:
        return f"{metric} is not ranked: {ranking.reason or 'only one group has it'}."
    best, others = ranking.best, ranking.pairs_with_best
    values = {k: format_summary(each) for k, each in enumerate(ranking.summaries)}
    metric = f"{metric} ({ranking.direction} is better)"
    if len(others) == 1:
        (pair,) = others
        a, b = groups[best].label, groups[pair.second].label
        counts = " and ".join(str(len(groups[k].values(ranking.metric))) for k in (best, pair.second))
        result = {
            "significant": f"{a} is better than {b}",
            "not significant": f"{a} and {b} do not differ significantly",
            "single seed": f"{a} has a better value than {b}",
        }[pair.verdict]
        difference = f"is {format_difference(pair)} with {counts} seeds ({format_p_value(pair.adjusted)})."
        if pair.verdict == "single seed":
            difference = "may be by chance, since a single seed does not show its significance: add seed=0,1,2."
        return f"{result} in {metric}: {values[best]} and {values[pair.second]}. The difference {difference}"
    parts = [f"{groups[best].label} is best in {metric}: {values[best]}."]
    by_verdict: dict[str, list[str]] = {}
    for pair in sorted(others, key=lambda pair: abs(pair.difference)):
        by_verdict.setdefault(pair.verdict, []).append(groups[pair.second].label)
    for verdict, words in (
        ("significant", "The difference is significant from"),
        ("not significant", "It is not significant from"),
        ("single seed", "A single seed does not show the significance (add seed=0,1,2) of the difference from"),
    ):
        if labels := by_verdict.get(verdict):
            parts.append(f"{words} {'all others' if len(labels) == len(others) else join_names(labels)}.")
    return " ".join(parts)


def headline(groups: Sequence[Group], rankings: Sequence[Ranking]) -> str:
    if len(groups) == 1:
        return f"All {len(groups[0].records)} runs have the same settings and differ only in their seed."
    main = next((ranking for ranking in rankings if ranking.best is not None), None)
    if main is None:
        return "No metric can be ranked: none was measured in two groups."
    return describe_ranking(groups, main)
