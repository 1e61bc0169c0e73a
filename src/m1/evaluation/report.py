"""A report that is one HTML file: text, tables and plots inline, nothing to fetch, readable in any browser.

Knows how to lay out a page and how to draw the project's kinds of plots; what goes on it is the caller's.
"""

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no screen is needed, or there

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from m1.storage import write_text

COLORS = {"Transformer": "#4c72b0", "hybrid": "#dd8452"}
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.7rem; }
h2 { font-size: 1.25rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 0.8rem 0; }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #888; }
figure { margin: 1rem 0; }
figure svg { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: 0.9rem; }
pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto; white-space: pre-wrap; }
"""


@dataclass
class Report:
    """A page that grows by parts, in order; `write` puts it on disk whole."""

    title: str
    parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
        self.parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def figure(self, figure: Figure, caption: str) -> None:
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :]
        self.parts.append(f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>")

    def write(self, path: str | Path) -> None:
        title = html.escape(self.title)
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
            f"<body><h1>{title}</h1>{''.join(self.parts)}</body></html>\n"
        )
        write_text(path, page)


def line_plot(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    log_y: bool = False,
) -> Figure:
    """One line a name: (x values, y values)."""
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.add_subplot()
    for name, (x, y) in series.items():
        axes.plot(x, y, label=name, color=COLORS.get(name), marker="o" if len(x) < 15 else None, markersize=3)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if log_y:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend()
    return figure


@dataclass(frozen=True)
class Curve:
    """One line of a `curve_plot`; the same `color` number is the same colour, `band` its half-width around y.

    A line whose name is empty is not in the legend.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    dashed: bool = False
    band: Sequence[float] | None = None


def curve_plot(curves: Sequence[Curve], *, x_label: str, y_label: str, x_base: int = 10) -> Figure:
    """Shares against a cost: a logarithmic x axis with ticks at powers of 2, or at 1, 2, 5 times powers of 10."""
    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.add_subplot()
    for curve in curves:
        color, y = f"C{curve.color}", np.asarray(curve.y)
        axes.plot(curve.x, y, "--" if curve.dashed else "-", label=curve.name, color=color, marker="o", markersize=3)
        if curve.band is not None:
            band = np.asarray(curve.band)
            axes.fill_between(curve.x, y - band, y + band, color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=x_base)
    axes.xaxis.set_major_locator(LogLocator(x_base, subs=(1,) if x_base == 2 else (1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def grouped_bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    y_label: str,
    errors: Mapping[str, Sequence[float]] | None = None,
    percent: bool = True,
) -> Figure:
    """Bars side by side: one cluster a group, one bar a series, its value written above, error bars where given."""
    figure = Figure(figsize=(max(6.4, 1.1 * len(groups) * len(series)), 3.4))
    axes = figure.add_subplot()
    width = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        x = [group + (index - (len(series) - 1) / 2) * width for group in range(len(groups))]
        bars = axes.bar(x, values, width * 0.95, label=name, color=COLORS.get(name), yerr=errors.get(name) if errors else None)
        axes.bar_label(bars, fmt=(lambda v: f"{v:.0%}") if percent else "%.3g", padding=2, fontsize=8)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(y_label)
    axes.margins(y=0.15)
    axes.grid(axis="y", alpha=0.3)
    if len(series) > 1:
        axes.legend()
    return figure
