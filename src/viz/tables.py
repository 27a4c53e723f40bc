"""Tables as text and Markdown, and results as JSON."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def write_json(path: Path, values: dict[str, Any]) -> None:
    """`values` as indented JSON, replacing the file at once."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_of_json(values), indent=2) + "\n")
    os.replace(temporary, path)


def _of_json(value: Any) -> Any:
    """A value without NaN and infinities, which JSON does not know."""
    if isinstance(value, Mapping):
        return {k: _of_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_of_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, a line for each row, with no newline at the end."""
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def markdown(metrics: Mapping[str, Any]) -> str:
    """All figures of likelihood and quality in one table, and those of alignment in another."""
    tables = []
    if "bits_per_dim" in metrics or metrics.get("samplers") or "alignment" not in metrics:
        tables.append(_of_quality(metrics))
    if "alignment" in metrics:
        tables.append(_of_alignment(metrics["alignment"]))
    return "\n".join(tables)


def _of_quality(metrics: Mapping[str, Any]) -> str:
    """A row for each figure, a column for each sampler, and one for the floor."""
    samplers: Mapping[str, Any] = metrics.get("samplers", {})
    columns = [*samplers] or ["the model"]
    rows = []
    if "bits_per_dim" in metrics:
        error = metrics["standard_error"]
        bits = f"{metrics['bits_per_dim']:.4f} ± {error:.4f}" if not math.isnan(error) else "one sample"
        rows.append([f"bits/dim of {metrics['num_val']} held-out", *[bits] * len(columns), ""])
    floor: Mapping[str, Any] = metrics.get("baseline", {})
    names = {name: None for each in samplers.values() for name in each["metrics"]}
    for name in names:
        cells = [interval(each["metrics"][name]) for each in samplers.values()]
        real = next((figure for key, figure in floor.items() if stem(key) == stem(name)), None)
        rows.append([name, *cells, interval(real) if real else USUAL.get(name.split("_")[0], "")])
    if samplers:
        rows.append(["network calls/sample", *(str(each["calls_per_image"]) for each in samplers.values()), ""])
        rows.append(["seconds/sample", *(f"{each['seconds_per_image']:.2g}" for each in samplers.values()), ""])
    header = ["", *columns, "real data (floor)" if samplers else ""]
    reference, others = "held-out", "training"
    if metrics.get("reference") == "train":
        reference, others = others, reference
    right = metrics.get("classifier_accuracy")
    note = (
        f"\n± is one standard error; brackets hold 95% bootstrap intervals. Everything is against {reference} data; "
        f"the floor is {others} data against them, as many as were drawn or as there are. `nearest_ratio` is the "
        "median distance to the nearest training sample over that of held-out data, `copies` the share of samples "
        "nearer to one than 95% of held-out data are: far below 1, and far above 0.05, tell of copies; far above 1, of "
        "samples that are unlike all data. What each figure is, and which way is better: docs/metrics.md.\n"
    ) + (f"The classifier is right on {right:.1%} of held-out images.\n" if right is not None else "")
    return table(header, rows) + "\n" + (note if samplers else "")


def _of_alignment(alignment: Mapping[str, Any]) -> str:
    """A row for each scale and group of prompts, and one for the judge; a column for each figure."""
    groups: Mapping[str, Mapping[str, Any]] = alignment["groups"]
    detector = {stem(named): figure for named, figure in alignment["detector"].items()}
    of_all = [each["metrics"] for scales in groups.values() for each in scales.values()]
    names = list(dict.fromkeys(stem(named) for figures in of_all for named in figures))
    rows = []
    for scale in next(iter(groups.values())):
        for group, scales in groups.items():
            figures = {stem(named): figure for named, figure in scales[scale]["metrics"].items()}
            rows.append([scale, group, *(interval(figures[n]) if n in figures else "" for n in names)])
    real = [interval(detector[n]) if n in detector else "1" if n == "diversity" else "" for n in names]
    rows.append(["", "real images, as judged", *real])
    note = (
        f"\nShares of {alignment['n']} samples by {alignment['sampler']} that show what they were asked to, in each "
        "attribute (among those asked for it) and in `all` at once, with 95% Wilson intervals, for these prompts; "
        "`diversity` is how much the samples of one prompt differ, where real images of it differ by 1.\n"
    )
    return table(["guidance", "asked for", *names], rows) + "\n" + note


USUAL = {"nearest": "1", "copies": "0.05"}
"""What the figures of memorisation are for data that were not trained on."""


def stem(named: str) -> str:
    """A figure's name without the number of samples: `fid` of `fid_10k`."""
    return named.rpartition("_")[0]


def interval(figure: Mapping[str, float]) -> str:
    """A figure and its interval, to as many digits as tell something."""
    value, low, high = figure["value"], figure["low"], figure["high"]
    digits = max(0, 1 - math.floor(math.log10(high - low))) if high > low else 3
    shown = [f"{round(x, digits) + 0.0:.{digits}f}" for x in (value, low, high)]  # + 0.0 takes the sign off -0
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def duration(seconds: float) -> str:
    """A time to one or two digits, in the unit that fits it."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} seconds"
