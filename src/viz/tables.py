"""Tables in Markdown, number formats, and metrics as JSON."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

METRICS: Mapping[str, tuple[str, Literal["lower", "higher"] | None]] = {
    "bits_per_dim": ("bits/dim", "lower"),
    "fid": ("FID", "lower"),
    "kid": ("KID", "lower"),
    "fd": ("Fréchet distance", "lower"),
    "kd": ("kernel distance", "lower"),
    "precision": ("precision", "higher"),
    "recall": ("recall", "higher"),
    "density": ("density", "higher"),
    "coverage": ("coverage", "higher"),
    "class_score": ("class score", "higher"),
    "class_variation": ("error of class frequencies", "lower"),
    "inception_score": ("inception score", "higher"),
    "nearest_ratio": ("distance to training data", None),
    "copies": ("copies", None),
    "sliced_wasserstein": ("sliced Wasserstein distance", "lower"),
    "energy_distance": ("energy distance", "lower"),
    "mmd": ("MMD", "lower"),
}
"""Title of each metric and which direction is better. Full names append features and the number of samples."""
USUAL = {"nearest": "1", "copies": "0.05"}
"""Expected memorization metrics of a model that does not copy its training data."""


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` as indented JSON and replace the file atomically. NaN and infinities become null."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_json_value(values), indent=2) + "\n")
    os.replace(temporary, path)


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _json_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table without a newline at its end."""
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def metric_title(metric: str) -> str:
    """Return a metric's readable name: `Fréchet distance (classifier, 1k)` for `fd_classifier_1k`."""
    for prefix, (title, _) in METRICS.items():
        if metric == prefix or metric.startswith(f"{prefix}_"):
            rest = metric.removeprefix(prefix).strip("_").replace("_", ", ")
            return f"{title} ({rest})" if rest else title
    return metric


def better_direction(metric: str) -> Literal["lower", "higher"] | None:
    """Return whether lower or higher values of a metric are better; None if neither."""
    if metric.startswith("val/"):
        return "lower"
    return next((side for name, (_, side) in METRICS.items() if metric == name or metric.startswith(f"{name}_")), None)


def direction_arrow(metric: str) -> str:
    """Return ` ↓` if lower values of a metric are better, ` ↑` if higher ones are, or nothing."""
    return {"lower": " ↓", "higher": " ↑", None: ""}[better_direction(metric)]


def strip_sample_count(metric: str) -> str:
    """Return a metric's name without the number of samples: `fid` for `fid_10k`."""
    return metric.rpartition("_")[0]


def format_number(value: float, error: float = math.nan, sign: Literal["", "+"] = "") -> str:
    """Format a number to the second significant digit of `error`, or to four significant digits without one."""
    if math.isnan(value):
        return "-"
    if 0 < error < math.inf:
        places = min(8, max(0, 1 - math.floor(math.log10(error))))
        value = round(value, places) + 0.0  # turns -0.0 into 0.0
        return f"{value:{sign}{',' if abs(value) >= 1e4 else ''}.{places}f}"
    return f"{value:{sign},.0f}" if 1e4 <= abs(value) < math.inf else f"{value:{sign}.4g}"


def format_metric(metric: Mapping[str, float]) -> str:
    """Format a metric with its interval: `12.3 [11.2, 13.5]`."""
    value, low, high = (metric[name] for name in ("value", "low", "high"))
    error = (high - low) / 2 or 0.01
    return f"{format_number(value, error)} [{format_number(low, error)}, {format_number(high, error)}]"


def format_duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} seconds"


def format_bits(metrics: Mapping[str, Any], num_terms: int | None) -> str:
    """Return the likelihood in bits/dim as text."""
    if "bits_per_dim" not in metrics:
        flow = metrics.get("flow_bits_per_dim")
        shown = "add ode=true for the likelihood by the flow" if flow is None else f"{flow:.4f} bits/dim by the flow"
        return f"no variational bound with data.coupling=ot; {shown}"
    kind = "at most" if num_terms is None else f"estimated from {num_terms} terms each:"
    error, flow = metrics["standard_error"], metrics.get("flow_bits_per_dim")
    text = f"{kind} {metrics['bits_per_dim']:.4f}{f' ± {error:.4f}' if error == error else ''} bits/dim"
    text += f" (prior {metrics['prior']:.4f}, decoder {metrics['decoder']:.4f})"
    return text if flow is None else f"{text}; {flow:.4f} by the probability flow"


def markdown(metrics: Mapping[str, Any]) -> str:
    """Return the tables of one evaluated run: likelihood and sample quality, and prompt alignment."""
    tables = []
    if "bits_per_dim" in metrics or metrics.get("samplers") or "alignment" not in metrics:
        tables.append(_quality_table(metrics))
    if "table" in metrics:
        tables.append(_rows_table(metrics["table"]))
    if "alignment" in metrics:
        tables.append(_alignment_table(metrics["alignment"]))
    return "\n".join(tables)


def _quality_table(metrics: Mapping[str, Any]) -> str:
    samplers: Mapping[str, Any] = metrics.get("samplers", {})
    columns = [*samplers] or ["model"]
    rows = []
    if "bits_per_dim" in metrics:
        error = metrics["standard_error"]
        bits = format_number(metrics["bits_per_dim"], error)
        bits = "one sample" if math.isnan(error) else f"{bits} ± {format_number(error, error)}"
        rows.append([f"bits/dim of {metrics['num_val']} validation samples ↓", *[bits] * len(columns), ""])
    baseline = {strip_sample_count(name): format_metric(each) for name, each in metrics.get("baseline", {}).items()}
    for name in dict.fromkeys(name for each in samplers.values() for name in each["metrics"]):
        cells = [format_metric(each["metrics"][name]) for each in samplers.values()]
        usual = baseline.get(strip_sample_count(name), USUAL.get(name.split("_")[0], ""))
        rows.append([metric_title(name) + direction_arrow(name), *cells, usual])
    for title, key in (("network calls per sample", "calls_per_image"), ("seconds per sample", "seconds_per_image")):
        if samplers:
            rows.append([title, *(format_number(each[key]) for each in samplers.values()), ""])
    table = markdown_table(["", *columns, "real data" if samplers else ""], rows) + "\n"
    if not samplers:
        return table
    reference, others = "validation", "training"
    if metrics.get("reference") == "train":
        reference, others = others, reference
    note = (
        f"{table}\n± is one standard error; brackets hold 95% bootstrap intervals. ↓ lower is better, ↑ higher. The "
        f"reference is {reference} data; the last column compares {others} data to it, with as many samples as there "
        "are, at most n. The distance to training data is the median over samples, divided by that of validation data. "
        "Copies is the fraction of samples closer to a training sample than 95% of validation data are. A distance far "
        "below 1 with copies far above 0.05 indicates memorization; a distance far above 1 indicates samples unlike "
        "any data. Definitions: docs/metrics.md.\n"
    )
    if "classifier_accuracy" in metrics:
        note += f"The classifier is correct on {metrics['classifier_accuracy']:.1%} of validation images.\n"
    return note


def lengths_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a column for each length of the averages of one run, and a row for each metric and sampler."""
    rows: dict[str, list[str]] = {}
    for column, metrics in enumerate(results.values()):
        cells = {}
        if "bits_per_dim" in metrics:
            cells["bits/dim ↓"] = format_number(metrics["bits_per_dim"], metrics["standard_error"])
        for sampler, each in metrics.get("samplers", {}).items():
            for name, metric in each["metrics"].items():
                cells[f"{metric_title(name)}{direction_arrow(name)}, {sampler}"] = format_metric(metric)
        for title, cell in cells.items():
            rows.setdefault(title, [""] * len(results))[column] = cell
    header = ["length of the average", *results]
    return markdown_table(header, [[title, *cells] for title, cells in rows.items()]) + "\n"


def _rows_table(report: Mapping[str, Any]) -> str:
    """Return a row per column of a generated table, and the comparison of whole rows."""
    pairs = {name: (each["distance"], each["baseline"]) for name, each in report["columns"].items()}
    pairs["mean error of associations"] = report["association_error"], report["association_baseline"]
    rows = [[name, *map(format_number, pair)] for name, pair in pairs.items()]
    rows.append(["nearer to training than to held-out rows", format_metric(report["closer_to_training"]), "0.5"])
    note = (
        f"\nDistances of {report['n']} samples, and of as many training rows, from {report['num_val']} held-out rows; "
        "0 is best: the Kolmogorov-Smirnov statistic of a number, the total variation of a category, the mean absolute "
        "difference of associations. The share of samples nearer to training rows is 0.5 for new rows, 1 for copies.\n"
    )
    return markdown_table(["column", "samples", "training rows"], rows) + "\n" + note


def _alignment_table(alignment: Mapping[str, Any]) -> str:
    """Return a row per guidance scale and group of prompts, one for real images, and a column per metric."""
    groups: Mapping[str, Mapping[str, Any]] = alignment["groups"]
    detector = {strip_sample_count(name): metric for name, metric in alignment["detector"].items()}
    every = [each["metrics"] for scales in groups.values() for each in scales.values()]
    names = list(dict.fromkeys(strip_sample_count(name) for values in every for name in values))
    rows = []
    for scale in next(iter(groups.values())):
        for group, scales in groups.items():
            values = {strip_sample_count(name): metric for name, metric in scales[scale]["metrics"].items()}
            rows.append([scale, group, *(format_metric(values[n]) if n in values else "" for n in names)])
    real = [format_metric(detector[n]) if n in detector else "1" if n == "diversity" else "" for n in names]
    note = (
        f"\nShares of {alignment['n']} samples by {alignment['sampler']} that match their prompt, in each attribute "
        "(among prompts that name it) and in `all` attributes at once, with 95% Wilson intervals; higher is better. "
        "`diversity` is the variation among samples of one prompt, relative to real images of it.\n"
    )
    return markdown_table(["guidance", "prompts", *names], [*rows, ["", "real images", *real]]) + "\n" + note
