"""The HTML page: charts, tables and the plotted numbers in one file that loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from rwkv_cluster import __version__
from rwkv_cluster.report import draw, tables
from rwkv_cluster.report.charts import Chart, Curve, Marks
from rwkv_cluster.report.draw import Theme, short
from rwkv_cluster.report.markup import columns, embedded, escape, section
from rwkv_cluster.report.run_data import Run
from rwkv_cluster.report.run_files import moment

# What a name in a configuration may contain, the browser still neither loads nor runs.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_SHAPES = {
    "v": "0,-4 5,-4 2.5,1",
    "^": "0,1 5,1 2.5,-4",
    "<": "5,-4 5,1 0,-1.5",
    "s": "0,-4 5,-4 5,1 0,1",
    "X": "0,-1.5 2.5,-4 5,-1.5 2.5,1",
}


def html(runs: Sequence[Run], charts: Sequence[Chart], data: Sequence[dict[str, Any]], end: float, made: float) -> str:
    """The whole page. end: of the axis of tokens; made: seconds since 1970."""
    title = " · ".join(run.name for run in runs)
    where = ", ".join(str(run.work.root) for run in runs)
    written = f"rwkv-cluster {__version__}, {moment(made)}"
    figures = "".join(_figure(chart, number, end) for number, chart in enumerate(charts))
    body = [
        f"<header><h1>{escape(title)}</h1><p>{escape(where)}<br>{written}</p></header>\n",
        tables.tiles(runs[0]) if len(runs) == 1 else tables.comparison(runs),
        tables.branches(runs),
        f'<div class="charts">{figures}</div>\n',
        *_tables(runs),
        tables.events(runs),
        _missing(runs),
        embedded("data", {"format": 1, "runs": list(data)}),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_style()}</style>\n"
        f"</head>\n<body>\n<main>\n{''.join(body)}\n</main>\n</body>\n</html>\n"
    )


def _tables(runs: Sequence[Run]) -> list[str]:
    """Those of one run side by side."""
    time_spent, checkpoints = tables.time_spent(runs), tables.checkpoints(runs)
    configuration, data, environment = tables.configuration(runs), tables.data(runs), tables.environment(runs)
    if len(runs) > 1:
        return [configuration, time_spent, checkpoints, data, environment]
    return [columns(time_spent, checkpoints), columns(configuration, data + environment)]


def _style() -> str:
    text = resources.files("rwkv_cluster.report").joinpath("page.css").read_text(encoding="utf-8")
    return text.replace("/* LIGHT */", _variables(draw.LIGHT)).replace("/* DARK */", _variables(draw.DARK))


def _variables(theme: Theme) -> str:
    single = {name: value for name, value in vars(theme).items() if isinstance(value, str)}
    colors = single | {f"series-{number}": color for number, color in enumerate(theme.series)}
    return " ".join(f"--{name}: {color};" for name, color in colors.items())


def _figure(chart: Chart, number: int, end: float) -> str:
    whole = chart.key == "loss" or (chart.stack is not None and chart.key == "step_parts")
    sizes = {"wide": draw.WIDE if whole else draw.HALF, "narrow": draw.NARROW}
    words = escape(_words(chart))
    pictures = ""
    for name, size in sizes.items():
        picture = draw.svg(chart, size, f"c{number}{name[0]}", end)
        pictures += f'<div class="{name}" role="img" aria-label="{words}">{picture}</div>'
    unit = f" <small>{escape(chart.unit)}</small>" if chart.unit else ""
    looks = ' class="whole"' if whole else ""
    return (
        f'<figure{looks} id="chart-{escape(chart.key)}"><h3>{escape(chart.title)}{unit}</h3>\n'
        f"{_legend(chart)}{pictures}{_caption(chart)}</figure>\n"
    )


def _caption(chart: Chart) -> str:
    cut = draw.cut_off(chart)
    notes = [chart.note] if chart.note else []
    notes += [f"values up to {short(float(chart.values.max()))} are cut off"] if cut is not None else []
    return f"<figcaption>{escape('; '.join(notes))}</figcaption>" if notes else ""


def _words(chart: Chart) -> str:
    """The picture for who does not see it."""
    known = [(curve.label, curve.y[np.isfinite(curve.y)]) for curve in chart.curves]  # some begin late or end early
    parts = [f"{label} from {short(float(y[0]), 4)} to {short(float(y[-1]), 4)}" for label, y in known if len(y)]
    parts += [marks.label for marks in chart.marks]
    return f"{chart.title} over tokens: {'; '.join(parts)}" if parts else f"{chart.title} over tokens"


def _legend(chart: Chart) -> str:
    if chart.stack is not None:
        items = [
            (f'<rect x="4" y="0" width="12" height="12" rx="2" fill="var(--series-{color})"/>', draw.PART_NAMES[name])
            for color, name in zip(draw.PART_COLORS, chart.stack.parts, strict=True)
        ]
    else:
        items = [(_swatch(curve), curve.label) for curve in chart.curves]
        items += [(_shape(marks), marks.label) for marks in chart.marks]
    if len(items) < 2:
        return ""
    rows = (
        f'<li><svg viewBox="0 0 24 12" aria-hidden="true">{swatch}</svg>{escape(label)}</li>' for swatch, label in items
    )
    return f'<ul class="legend">{"".join(rows)}</ul>'


def _swatch(curve: Curve) -> str:
    color = f"var(--series-{curve.color % len(draw.LIGHT.series)})"
    dashes = {
        "raw": (),
        "line": draw.DASHES[curve.color // len(draw.LIGHT.series) % len(draw.DASHES)],
        "dashed": (3, 2),
    }[curve.style]
    width, opacity = {"raw": ("1.5", "0.5"), "line": ("2.5", "1"), "dashed": ("2", "1")}[curve.style]
    point = f'<circle cx="12" cy="6" r="3" fill="{color}"/>' if curve.markers else ""
    dashed = f' stroke-dasharray="{" ".join(map(str, dashes))}"' if dashes else ""
    return f'<path d="M0 6H24" stroke="{color}" stroke-width="{width}" opacity="{opacity}"{dashed}/>{point}'


def _shape(marks: Marks) -> str:
    color = "var(--text)" if marks.color is None else f"var(--series-{marks.color % len(draw.LIGHT.series)})"
    points = _SHAPES[draw.MARKERS[marks.kind]]
    return f'<polygon points="{points}" fill="{color}" transform="translate(7 9) scale(2)"/>'


def _missing(runs: Sequence[Run]) -> str:
    sentences = [f"{run.name}: {missing}" if len(runs) > 1 else missing for run in runs for missing in run.missing]
    if not sentences:
        return ""
    return section(
        "Not shown", f'<ul class="missing">{"".join(f"<li>{escape(missing)}</li>" for missing in sentences)}</ul>'
    )
