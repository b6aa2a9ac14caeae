"""Pictures of charts by matplotlib: SVG whose colors the page's style sheet sets, and PNG in light and dark ones."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_cluster.errors import ConfigError
from rwkv_cluster.report.charts import MARKED, PART_COLORS, PART_NAMES, Chart, Curve
from rwkv_cluster.runtime.rank_env import unchanged_environment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 46, 8, 12, 38  # CSS pixels, as all sizes here
TITLE, LEGEND_ROW, LEGEND_COLUMNS = 22, 20, 3
WIDE, HALF, NARROW = (1160, 340), (560, 250), (360, 240)  # the first chart; the others; a telephone
MARKERS = {"resume": "v", "rollback": "<", "spike": "^", "nonfinite": "X", "early_stop": "s", "stop": "s"}
DASHES = ((), (5, 2), (2, 1.5), (7, 2, 1.5, 2))  # tell the runs apart that share a color
CUT_OFF = 4.0  # times the 98th percentile: what is above would press the rest to the ground
UNITS = {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}
SCIENTIFIC = 1e-3  # below, numbers are written with an exponent
_PNG_DPI = 144
_SETTINGS: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "rwkv-cluster", "text.parse_math": False}
_SETTINGS |= {"font.size": 11, "font.family": "DejaVu Sans", "path.simplify": True}


@dataclass(frozen=True)
class Theme:
    """Colors. series: Okabe and Ito's palette (2008), which the color-blind can tell apart, for this background."""

    text: str
    muted: str
    grid: str
    background: str
    series: tuple[str, ...]


LIGHT = Theme("#1c2128", "#59636e", "#e2e5e9", "#ffffff",
              ("#0072b2", "#d55e00", "#00805d", "#b5508f", "#b88a00", "#56b4e9"))  # fmt: skip
DARK = Theme("#e6edf3", "#9aa4af", "#30363d", "#14181d",
             ("#56b4e9", "#ff8c42", "#2ecc9b", "#e08fc0", "#e9c13b", "#2f81c7"))  # fmt: skip
_STYLED = Theme("#010100", "#010101", "#010102", "#010103", tuple(f"#0102{number:02x}" for number in range(6)))
"""Stands for the style sheet's variables in an SVG, see `_with_variables`."""


def require_matplotlib() -> None:
    """Raises ConfigError where it is not installed."""
    try:
        with unchanged_environment():
            os.environ["MPLBACKEND"] = "agg"  # a notebook's, which its commands inherit, may name one that is not here
            import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "report draws with the package matplotlib, which is not installed",
            remedy="Install it with `pip install 'rwkv-cluster[report]'`",
        ) from error


def svg(chart: Chart, size: tuple[int, int], prefix: str, end: float) -> str:
    """An <svg> element for a page. prefix: makes its ids unique there. end: of the axis of tokens."""
    content = _render(chart, size, end, _STYLED, titled=False, format="svg", metadata={"Date": None, "Creator": None})
    text = content.decode()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg ") :], flags=re.DOTALL)
    text = re.sub(r'(id="|"#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', text, count=1
    )
    text = re.sub(r"font: (\S+) [^;\"]*", r"font-size: \1", text)
    return _with_variables(text)


def _with_variables(text: str) -> str:
    for name, value in vars(_STYLED).items():
        for number, color in enumerate([value] if isinstance(value, str) else value):
            text = text.replace(color, f"var(--{name if isinstance(value, str) else f'series-{number}'})")
    return text


def png(chart: Chart, theme: Theme, end: float) -> bytes:
    """A picture that stands alone, with title and legend."""
    return _render(chart, (800, 420), end, theme, titled=True, format="png", dpi=_PNG_DPI, metadata={"Software": None})


def _render(chart: Chart, size: tuple[int, int], end: float, theme: Theme, *, titled: bool, **options: Any) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that the font does not have
        figure = Figure(figsize=(size[0] / 72, size[1] / 72))
        axes = figure.add_subplot()
        _plot(axes, chart, theme)
        _dress(axes, chart, theme, chart.end or end, narrow=size[0] < 500)
        legend_rows = _entitle(figure, axes, chart, theme) if titled else 0
        _place(figure, size, top=MARGIN_TOP + titled * TITLE, bottom=MARGIN_BOTTOM + legend_rows * LEGEND_ROW)
        figure.savefig(buffer, facecolor=theme.background if titled else "none", **options)
    return buffer.getvalue()


def _plot(axes: Axes, chart: Chart, theme: Theme) -> None:
    for curve in chart.curves:
        _curve(axes, curve, theme)
    if chart.stack is not None:
        _stack(axes, chart, theme)
    for marks in chart.marks:
        color = theme.text if marks.color is None else _color(theme, marks.color)
        height = 1 - 0.06 * list(MARKED).index(marks.kind)
        for x in marks.x:
            axes.axvline(x, color=color, linewidth=0.8, linestyle=(0, (2, 2)), alpha=0.7, zorder=1)
        transform = axes.get_xaxis_transform()
        axes.plot(marks.x, np.full(len(marks.x), height), MARKERS[marks.kind], color=color, markersize=6,
                  transform=transform, clip_on=False, linestyle="none", label=marks.label)  # fmt: skip


def _curve(axes: Axes, curve: Curve, theme: Theme) -> None:
    label = f" {curve.label}" if curve.label.startswith("_") else curve.label  # matplotlib hides those with _
    looks: dict[str, Any] = {"color": _color(theme, curve.color), "label": label}
    if curve.style == "raw":
        looks |= {"linewidth": 0.8, "alpha": 0.45}
    elif curve.style == "line":
        looks |= {"linewidth": 1.6, "dashes": DASHES[curve.color // len(theme.series) % len(DASHES)] or (None, None)}
    else:
        looks |= {"linewidth": 1.3, "dashes": (3, 2)}
    alone = len(curve.x) == 1 or (curve.markers and len(curve.x) <= 60)
    axes.plot(curve.x, curve.y, marker="o" if alone else None, markersize=4, **looks)


def _color(theme: Theme, number: int) -> str:
    return theme.series[number % len(theme.series)]


def _stack(axes: Axes, chart: Chart, theme: Theme) -> None:
    assert chart.stack is not None
    below = np.zeros(len(chart.stack.edges))
    for color, (name, values) in zip(PART_COLORS, chart.stack.parts.items(), strict=True):
        above = below + np.append(values, values[-1:])
        axes.fill_between(
            chart.stack.edges, below, above, step="post", color=theme.series[color], linewidth=0, label=PART_NAMES[name]
        )
        below = above


def _dress(axes: Axes, chart: Chart, theme: Theme, end: float, *, narrow: bool) -> None:
    """Axes, grid and numbers."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

    axes.set_xlim(0, 1.006 * end)  # the last point is not cut in half
    if chart.log:
        axes.set_yscale("log")
    elif (top := cut_off(chart)) is not None:
        axes.set_ylim(0, top)
    elif chart.stack is not None or chart.key in ("lr", "tokens_per_s", "mfu", "memory_mb"):
        axes.set_ylim(0, max(float(chart.values.max()) * 1.08, 1e-12))
    axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8, min_n_ticks=3))
    if not chart.log:
        axes.yaxis.set_major_locator(MaxNLocator(5, min_n_ticks=3))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        ticks = [tick for tick in axis.get_majorticklocs() if limits[0] <= tick <= limits[1]]
        axis.set_ticks(ticks, labels=tick_labels(ticks))
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.muted, length=0, pad=5)
    axes.set_xlabel("tokens", color=theme.muted, loc="right")
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.muted)


def cut_off(chart: Chart) -> float | None:
    """Where the axis ends when few values are far above the others; None where it holds all."""
    usual = float(np.percentile(chart.values, 98))
    return 2 * usual if not chart.log and 0 < CUT_OFF * usual < chart.values.max() else None


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Short numbers of one kind, with as many digits as tell them apart: 0, 250k, 500k; 2e-3, 5e-4; 1B, 1.5B."""
    size = max(map(abs, ticks), default=0.0)
    tiny = any(0 < abs(tick) < SCIENTIFIC and abs(tick) > 1e-6 * size for tick in ticks)
    write = scientific if tiny else short
    labels: list[str] = []
    for digits in range(1, 12):
        labels = [write(tick, digits) for tick in ticks]
        if all(abs(_value(label) - tick) <= 1e-6 * size for label, tick in zip(labels, ticks, strict=True)):
            break
    return labels


def short(value: float, digits: int = 3) -> str:
    """A number as people write it, in `digits` significant ones at most: 8.77k, 1.02M, 0.0015, 2e-4."""
    rounded = float(f"{value:.{digits}g}")
    for unit, size in UNITS.items():
        if abs(rounded) >= size:
            return f"{_plain(rounded / size, digits)}{unit}"
    return _plain(rounded, digits) if rounded == 0 or abs(rounded) >= SCIENTIFIC else scientific(rounded, digits)


def scientific(value: float, digits: int) -> str:
    """2e-4; 0 is 0."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}" if value else "0"


def _plain(value: float, digits: int) -> str:
    return str(np.format_float_positional(value, precision=digits, fractional=False, trim="-"))


def _value(label: str) -> float:
    return float(label[:-1]) * UNITS[label[-1]] if label[-1] in UNITS else float(label)


def _entitle(figure: Figure, axes: Axes, chart: Chart, theme: Theme) -> int:
    """Title, and a legend where there is more than one thing to tell apart; the number of its rows."""
    axes.set_title(f"{chart.title}, {chart.unit}" if chart.unit else chart.title, loc="left", color=theme.text)
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) < 2 and not chart.marks:
        return 0
    figure.legend(handles, labels, loc="lower center", ncols=LEGEND_COLUMNS, frameon=False, labelcolor=theme.text)
    return -(-len(handles) // LEGEND_COLUMNS)


def _place(figure: Figure, size: tuple[int, int], *, top: float, bottom: float) -> None:
    """The same margins in pixels for every chart, so that those below each other have their axes in line."""
    width, height = size
    figure.subplots_adjust(MARGIN_LEFT / width, bottom / height, 1 - MARGIN_RIGHT / width, 1 - top / height)
