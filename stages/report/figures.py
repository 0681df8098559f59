"""Figures as SVG for a page: labels stay text, in the text colour of the page."""

import io
import re
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from stages.store.digests import id_of
from stages.sweep.values import Value

INK = "#010203"
"""Placeholder for the text colour of the page; no figure uses this colour for anything else."""
PALETTE = ("#3b76b8", "#d1703c", "#5b9a57", "#8a63a8", "#b84a62", "#7a7a7a", "#c2a13a")
STYLE: Any = {
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif", "figure.facecolor": "none",
    "axes.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False, "text.parse_math": False,
}  # fmt: skip


def svg(figure: Figure) -> str:
    """Render a figure as an `svg` element whose ids no other figure of a page has."""
    out = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": "lorapar"}):
        # The resolution matters only to what is rasterized.
        figure.savefig(out, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    digest = id_of(text)
    # matplotlib numbers its ids, so two figures share some; a prefix keeps definitions and references apart.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1f{digest}-", text)
    # As wide as drawn (96 px per inch) where the page has room; below three quarters labels are not legible.
    pixels = 96 * figure.get_figwidth()
    width = f'style="width: {pixels:.0f}px; min-width: {0.75 * pixels:.0f}px"'
    # The fixed width and height of the root element go; its viewBox keeps the aspect ratio.
    size = r'<svg ([^>]*?)(?:width|height)="[^"]*" ([^>]*?)(?:width|height)="[^"]*"'
    return re.sub(size, rf"<svg {width} \1\2", text, count=1)


def _new() -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.9, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


@rc_context(STYLE)
def line_plot(
    series: dict[str, list[tuple[float, Value]]],
    published: dict[str, list[tuple[float, float]]],
    lines: dict[str, float],
    x: str,
    y: str,
    mixture: Sequence[tuple[float, float]] = (),
) -> Figure:
    """Draw a line for each series, a dashed one for each published series, and `lines` as horizontal lines.

    series: name → position on the x axis, and accuracy, of each point. published: series → positions and
    values, in the colour of the series of that name. mixture: ends of one more line.
    """
    figure, axes = _new()
    axes.plot([at for at, _ in mixture], [percent for _, percent in mixture], "--", color=INK, linewidth=0.9)
    for name, colour in zip(dict.fromkeys([*series, *published]), cycle(PALETTE), strict=False):
        points = sorted(series.get(name, []), key=lambda point: (point[0], point[1].mean))
        for at, value in points:
            if reach := value.over_items or value.over_seeds:
                ends = [100 * reach.low, 100 * reach.high]
                axes.plot([at, at], ends, color=colour, linewidth=1.4, alpha=0.6)
        if points:
            means = [100 * value.mean for _, value in points]
            axes.plot([at for at, _ in points], means, "o-", color=colour, markersize=4, label=name)
        if pairs := sorted(published.get(name, [])):
            positions, values = zip(*pairs, strict=True)
            (line,) = axes.plot(positions, values, "D--", color=colour, label=f"{name}, published")
            line.set(markersize=4, fillstyle="none", linewidth=0.9)
    for number, (name, percent) in enumerate(lines.items()):
        axes.axhline(percent, color=INK, linewidth=0.8, linestyle=(":", "-.")[number % 2], label=name)
    axes.set(xlabel=x, ylabel=y, title=f"{y.removesuffix(', %')} over {x}")
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@rc_context(STYLE)
def scatter(groups: dict[str, tuple[list[float], list[float]]], title: str) -> Figure:
    """Scatter the points of each group on logarithmic axes. All values must be positive.

    groups: name → first values, second values.
    """
    figure, axes = _new()
    for (name, (first, second)), colour in zip(groups.items(), PALETTE, strict=False):
        # Rasterized: thousands of dots as SVG elements would take megabytes.
        axes.scatter(first, second, s=3, color=colour, alpha=0.35, linewidths=0, rasterized=True)
        axes.scatter([], [], s=14, color=colour, label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="System 1 importance", ylabel="System 2 importance", title=title
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=7))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-"))
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
