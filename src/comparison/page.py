"""Write a comparison: a self-contained HTML page, Markdown, CSV tables and charts."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from src.comparison.grouping import common_settings, format_setting
from src.comparison.plots import chart_name, draw_charts
from src.comparison.report import LEGEND, Report, column_title
from src.comparison.statistics import Ranking, describe_ranking, format_difference, format_p_value
from src.viz.figures import series_style
from src.viz.tables import format_number, metric_title

SYMBOLS = {"o": "●", "s": "■", "^": "▲"}  # of the line markers in the charts
TEMPLATE = Path(__file__).with_suffix(".html")
MAX_COLUMNS = 9  # metrics in one table, so that it fits a page of 1200 pixels


def write_files(folder: Path, report: Report) -> Path:
    """Write all files into `folder` and return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    charts = draw_charts(report)
    for name, png in charts.items():
        (folder / f"{name}.png").write_bytes(png)
    for name, rows in (("runs", report.run_rows()), ("groups", report.group_rows())):
        pd.DataFrame(rows, dtype=object).to_csv(folder / f"{name}.csv", index=False)
    (folder / "comparison.md").write_text(report.markdown())
    page = folder / "comparison.html"
    page.write_text(render_page(report, charts))
    return page


def render_page(report: Report, charts: Mapping[str, bytes]) -> str:
    """Return the page as HTML with its images embedded."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "text": format_setting,
        "chance": format_p_value,
        "interval": format_difference,
        "title": metric_title,
        "uri": lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}",
    }
    rankings = [*report.ranked, *report.unranked]
    chunks = [rankings[k : k + MAX_COLUMNS] for k in range(0, len(rankings), MAX_COLUMNS)]
    cost_header, costs = report.cost_table()
    return environment.from_string(TEMPLATE.read_text()).render(
        report=report,
        order=report.order,
        labels=["", *(report.groups[k].label for k in report.order)],
        ranked=report.ranked,
        unranked=report.unranked,
        sentences=[describe_ranking(report.groups, r) for r in [*report.ranked[1:], *report.unranked]],
        tables=[report.group_table(chunk) for chunk in chunks],
        num_settings=len(report.groups[0].settings) or 1,
        best_cells=[[r.best for r in chunk] for chunk in chunks],
        symbols=[(style["color"], SYMBOLS[style["marker"]]) for style in map(series_style, range(len(report.groups)))],
        legend=LEGEND,
        charts=charts,
        chart_name=chart_name,
        cost_header=cost_header,
        costs=costs,
        common=common_settings(report.groups),
        difference_matrix=difference_matrix,
        column_title=column_title,
    )


def difference_matrix(report: Report, ranking: Ranking) -> Sequence[Sequence[Mapping[str, str] | None]]:
    """Return the difference of means, row minus column, of all pairs in the order of the page."""
    cells: dict[tuple[int, int], dict[str, str]] = {}
    for pair in ranking.pairs:
        for a, b, sign in ((pair.first, pair.second, 1), (pair.second, pair.first, -1)):
            low, high = sorted((sign * pair.low, sign * pair.high))
            signed = pair._replace(difference=sign * pair.difference, low=low, high=high)
            better = (signed.difference < 0) == (ranking.direction == "lower")
            kind = ("better" if better else "worse") if pair.verdict == "significant" else "same"
            names = f"{report.groups[a].label} minus {report.groups[b].label}"
            hint = f"{names}: {format_difference(signed)}, {format_p_value(pair.adjusted)}, {pair.verdict}"
            value = format_number(signed.difference, (high - low) / 2, "+")
            cells[a, b] = {"kind": kind, "value": value, "hint": hint}
    return [[cells.get((a, b)) for b in report.order] for a in report.order]
