"""A comparison as files: a page that needs nothing else, its plots, tables and Markdown."""

import base64
from collections.abc import Mapping
from pathlib import Path

from src.comparison.plots import COLORS, file_name, pictures, strip
from src.comparison.report import (
    LEGEND,
    Report,
    arrow,
    columns_of,
    cost_table,
    group_rows,
    mark,
    markdown,
    order_of,
    run_rows,
    shown_metrics,
    title_of,
    write_csv,
)
from src.comparison.statistics import (
    Ranking,
    chance,
    common_settings,
    headline,
    interval,
    number,
    sentence,
    text,
    with_spread,
)

TEMPLATE = Path(__file__).with_suffix(".html")


def write(folder: Path, report: Report) -> Path:
    """All files into `folder`; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = pictures(report)
    for name, (light, _) in drawn.items():
        (folder / f"{name}.png").write_bytes(light)
    rows = run_rows(report)
    write_csv(folder / "runs.csv", rows)
    write_csv(folder / "groups.csv", group_rows(report))
    (folder / "comparison.md").write_text(markdown(report))
    page = folder / "comparison.html"
    page.write_text(html(report, drawn))
    return page


def html(report: Report, drawn: Mapping[str, tuple[bytes, bytes]]) -> str:
    """The page, with all that it shows inside it."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "text": text,
        "chance": chance,
        "interval": interval,
        "spread": with_spread,
        "number": number,
        "title": title_of,
        "uri": lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}",
    }
    shown = shown_metrics(report)
    costs_header, costs = cost_table(report)
    strips = [strip(report, k) for k in range(len(report.groups))]
    return environment.from_string(TEMPLATE.read_text()).render(
        report=report,
        headline=headline(report.groups, report.rankings, title_of),
        sentences=[sentence(report.groups, r, title_of) for r in shown if r.best is not None][1:],
        not_ranked=[sentence(report.groups, r, title_of) for r in shown if r.best is None],
        shown=shown,
        order=order_of(report),
        columns=columns_of(report),
        colors=[COLORS[k % len(COLORS)] for k in range(len(report.groups))],
        mark=mark,
        arrow=arrow,
        legend=LEGEND,
        drawn=drawn,
        dots=[(r, drawn[f"metric_{file_name(r.metric)}"]) for r in shown if f"metric_{file_name(r.metric)}" in drawn],
        strips=[(strip is not None and strip) or b"" for strip in strips],
        real=strip(report, None) or b"",
        costs_header=costs_header,
        costs=costs,
        common=common_settings(report.groups),
        matrix=matrix,
    )


def matrix(report: Report, ranking: Ranking) -> list[list[dict[str, str] | None]]:
    """Each group against each, in the page's order: the row's mean minus the column's, and what it means."""
    order = order_of(report)
    cells: dict[tuple[int, int], dict[str, str]] = {}
    for pair in ranking.pairs:
        for a, b, sign in ((pair.first, pair.second, 1), (pair.second, pair.first, -1)):
            difference = sign * pair.difference
            better = (difference < 0) == (ranking.direction == "lower")
            kind = ("better" if better else "worse") if pair.verdict == "significant" else "same"
            whom = f"{report.groups[a].label} minus {report.groups[b].label}"
            low, high = sorted((sign * pair.low, sign * pair.high))
            words = f"{whom}: {interval(pair._replace(difference=difference, low=low, high=high))}, "
            words += f"{chance(pair.adjusted)}, {pair.verdict}"
            cells[a, b] = {"kind": kind, "value": f"{difference:+.2g}", "words": words}
    return [[cells.get((a, b)) for b in order] for a in order]
