"""Drawing of pictures: the colours of a page, figures and panels, and rows of dots with intervals.

Colours are Okabe and Ito's, which people with any colour vision can tell apart; marks differ in shape as well.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DOTS_PER_INCH = 144  # one and a half times a screen's 96, so that text stays sharp
COLUMNS = 3  # panels in a row


@dataclass(frozen=True, kw_only=True, slots=True)
class Theme:
    """Colours of a page."""

    page: str
    ink: str
    quiet: str
    line: str
    blue: str
    orange: str
    green: str
    pink: str


LIGHT = Theme(
    page="#ffffff",
    ink="#1c2330",
    quiet="#5d6675",
    line="#d9dde4",
    blue="#0072b2",
    orange="#d55e00",
    green="#009e73",
    pink="#b5568e",
)
DARK = Theme(
    page="#1a1f29",
    ink="#e6e9ef",
    quiet="#a2abba",
    line="#39414f",
    blue="#56b4e9",
    orange="#f0913c",
    green="#2fc79b",
    pink="#dd8fbb",
)


def draw_all(drawers: Mapping[str, Callable[[Theme], Any]], theme: Theme) -> dict[str, bytes]:
    """PNG bytes of the matplotlib figure that each function draws, in the colours and font of a page."""
    from matplotlib import rc_context

    settings: dict[Any, Any] = {
        "figure.facecolor": theme.page,
        "axes.facecolor": theme.page,
        "savefig.facecolor": theme.page,
        "text.color": theme.ink,
        "axes.labelcolor": theme.quiet,
        "axes.titlecolor": theme.ink,
        "axes.edgecolor": theme.line,
        "xtick.color": theme.quiet,
        "ytick.color": theme.quiet,
        "grid.color": theme.line,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.labelsize": 9,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "font.size": 10,
    }
    with rc_context(settings):
        return {name: _png(drawer(theme)) for name, drawer in drawers.items()}


def both_themes(drawers: Mapping[str, Callable[[Theme], Any]]) -> dict[str, tuple[bytes, bytes]]:
    """As `draw_all`, for a light and a dark page."""
    light, dark = draw_all(drawers, LIGHT), draw_all(drawers, DARK)
    return {name: (light[name], dark[name]) for name in drawers}


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of so many inches for `draw_all`."""
    # The object interface with the Agg canvas needs no display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.canvas.print_png(buffer)  # savefig would lay the figure out twice
    return buffer.getvalue()


def new_panels(names: Sequence[str], x_label: str, y_label: str) -> tuple[Any, dict[str, Any]]:
    """A grid with one panel a name; the legend takes unused places."""
    columns = 2 if len(names) == 4 else min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    figure = new_figure(3.4 * columns, 2.9 * rows + 0.35)
    axes = figure.subplots(rows, columns, squeeze=False)
    for place, axis in enumerate(axes.flat):
        if place >= len(names):
            axis.set_axis_off()
            continue
        if place + columns >= len(names):
            axis.set_xlabel(x_label)
        if place % columns == 0:
            axis.set_ylabel(y_label)
    return figure, dict(zip(names, axes.flat))


def square_axes(axis: Any, low: float, high: float, theme: Theme) -> None:
    """Equal scales from low to high, whole-number ticks and the line where both sides agree."""
    high = max(high, low + 1)
    room = 0.1 * (high - low)
    axis.plot([low, high], [low, high], color=theme.quiet, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    step = max(1, round((high - low) / 5))
    ticks = np.arange(low, high + 0.5, step)
    axis.set(xlim=(low - room, high + room), ylim=(low - room, high + room), xticks=ticks, yticks=ticks)


def numbers(values: Sequence[Any]) -> Any:
    """An array of floats, NaN for None."""
    return np.array([math.nan if value is None else value for value in values], np.float64)


def bounds(points: Sequence[Mapping[str, Any]]) -> tuple[Any, Any]:
    """The lower and the upper ends of the points' "interval", NaN where there is none."""
    pairs = [point.get("interval") or [None, None] for point in points]
    return numbers([pair[0] for pair in pairs]), numbers([pair[1] for pair in pairs])


def add_legend(figure: Any, axis: Any) -> None:
    """The legend of one axis above the figure."""
    handles, labels = axis.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside upper left", ncols=max(1, len(labels)))
    for handle in legend.legend_handles:
        if hasattr(handle, "set_sizes"):  # the cloud's dots are too faint to be recognised alone
            handle.set_sizes([26])
            handle.set_alpha(0.8)


def readable_on(background: Sequence[float]) -> str:
    """Black or white, by the higher contrast with a colour (red, green, blue from 0 to 1): at least 4.5 to 1.

    Contrast and luminance are those of WCAG 2.2; at a luminance of 0.18 both have a contrast of 4.58 to 1.
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance + 0.05 > (1.05 * 0.05) ** 0.5 else "#ffffff"


def draw_arms(
    names: Sequence[str],
    arms: Mapping[str, tuple[str, str, Mapping[str, Mapping[str, Any]]]],
    value: str,
    x_label: str,
    theme: Theme,
    nothing: float = 0.0,
) -> Any:
    """Rows of names, in each one dot and interval an arm; arms are label -> (colour, marker, figures by name).

    A line marks `nothing`, the figure of no effect.
    """
    figure = new_figure(3.4 * COLUMNS, 1.1 + (0.24 * len(arms) + 0.22) * len(names))
    axis = figure.subplots()
    gap = 0.62 / max(1, len(arms))
    for place, (label, (colour, marker, figures)) in enumerate(arms.items()):
        height = np.arange(len(names)) + gap * (place - (len(arms) - 1) / 2)
        points = [figures.get(name, {}) for name in names]
        low, high = bounds(points)
        axis.hlines(height, low, high, color=colour, linewidth=2, alpha=0.55)
        middle = numbers([point.get(value) for point in points])
        axis.plot(middle, height, marker, color=colour, markersize=6.5, label=label)
    axis.axvline(nothing, color=theme.quiet, linewidth=1)
    axis.set_yticks(range(len(names)), names)
    for border in np.arange(0.5, len(names) - 1):
        axis.axhline(border, color=theme.line, linewidth=0.8)
    axis.set(xlabel=x_label, ylim=(len(names) - 0.5, -0.5))
    axis.grid(False, axis="y")
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    add_legend(figure, axis)
    return figure
