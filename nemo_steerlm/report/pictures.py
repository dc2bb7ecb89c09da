"""The pictures of a report, drawn once for a light and once for a dark page.

Colours are Okabe and Ito's, which people with any colour vision can tell apart; marks differ in shape as well.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from nemo_steerlm.report.tables import number

DOTS_PER_INCH = 144  # one and a half times a screen's 96, so that text stays sharp
COLUMNS = 3  # panels in a row
_MOST_DOTS = 600  # more only turn a cloud into a blot


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


def draw(data: Mapping[str, Any], arrays: Mapping[str, Any], theme: Theme) -> dict[str, bytes]:
    """Draws every picture the data has figures for.

    Args:
        data: a report's figures as plain JSON types, see `write_report`.
        arrays: measurements of single rows, see `write_report`.
        theme: colours.

    Returns:
        PNG bytes by name: regressor, and one for each key of `data` that has a drawer.
    """
    drawers: dict[str, Callable[[Theme], Any]] = {}
    if "regressor" in arrays and data.get("attributes"):
        drawers["regressor"] = lambda theme: _regressor(data, arrays["regressor"], theme)
    for name, drawer in _DRAWERS.items():
        if data.get(name):
            drawers[name] = partial(drawer, data)
    return draw_all(drawers, theme)


def draw_all(drawers: Mapping[str, Callable[[Theme], Any]], theme: Theme) -> dict[str, bytes]:
    """PNG bytes of what each function draws, a matplotlib figure, in the colours and type of a page."""
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


def _panels(names: Sequence[str], x_label: str, y_label: str) -> tuple[Any, dict[str, Any]]:
    """A grid with one panel a name; unused places are left to the legend."""
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


def _square(axis: Any, low: float, high: float, theme: Theme) -> None:
    """Equal scales from low to high, whole-number ticks and the line where both sides agree."""
    high = max(high, low + 1)
    room = 0.1 * (high - low)
    axis.plot([low, high], [low, high], color=theme.quiet, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    step = max(1, round((high - low) / 5))
    ticks = np.arange(low, high + 0.5, step)
    axis.set(xlim=(low - room, high + room), ylim=(low - room, high + room), xticks=ticks, yticks=ticks)


def _numbers(values: Sequence[Any]) -> Any:
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _bounds(points: Sequence[Mapping[str, Any]]) -> tuple[Any, Any]:
    pairs = [point.get("interval") or [None, None] for point in points]
    return _numbers([pair[0] for pair in pairs]), _numbers([pair[1] for pair in pairs])


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside upper left", ncols=max(1, len(labels)))
    for handle in legend.legend_handles:
        if hasattr(handle, "set_sizes"):  # the cloud's dots are too faint to be recognised alone
            handle.set_sizes([26])
            handle.set_alpha(0.8)


def _regressor(data: Mapping[str, Any], arrays: Mapping[str, Any], theme: Theme) -> Any:
    target = np.asarray(arrays["target"], np.float64)
    predicted = np.asarray(arrays["predicted"], np.float64)
    human = np.asarray(arrays["human"], np.float64) if arrays.get("human") is not None else None
    names = list(data["attributes"])
    figure, panels = _panels(names, "oracle", "predicted")
    random = np.random.default_rng(0)
    for k, name in enumerate(names):
        axis, attribute = panels[name], data["attributes"][name]
        low, high = attribute["low"], attribute["high"]
        _square(axis, low, high, theme)
        both = np.flatnonzero(~np.isnan(predicted[:, k] + target[:, k]))
        dots = random.permutation(both)[:_MOST_DOTS]
        shift = random.uniform(-0.12, 0.12, len(dots))  # whole values would hide each other
        axis.scatter(
            target[dots, k] + shift,
            predicted[dots, k],
            s=7,
            color=theme.blue,
            alpha=0.28,
            linewidths=0,
            label="one response",
        )
        axis.plot(
            *_calibration(predicted[:, k], target[:, k]), "-o", color=theme.ink, markersize=4, label="regressor's mean"
        )
        if human is not None:
            curve = _calibration(human[:, k], target[:, k])
            axis.plot(*curve, "--s", color=theme.orange, markersize=4, label="human labels' mean")
        pearson = data.get("regressor", {}).get(name, {}).get("pearson")
        axis.set_title(name if pearson is None else f"{name}   r = {pearson:.3f}")
    _legend(figure, panels[names[0]])
    return figure


def _calibration(values: Any, target: Any) -> tuple[Any, Any]:
    """Mean value for each whole level of the target that has at least five rows."""
    there = ~np.isnan(values + target)
    level = np.rint(target[there])
    levels = [one for one in np.unique(level) if (level == one).sum() >= 5]
    return levels, [values[there][level == one].mean() for one in levels]


def draw_reliability(
    attributes: Mapping[str, Mapping[str, Any]], ranges: Mapping[str, Mapping[str, Any]], theme: Theme
) -> Any:
    """Mean label over mean prediction in each bin, one panel an attribute; `bins` as `grouped.figures` gives them."""
    figure, panels = _panels(list(attributes), "mean prediction", "mean label")
    for name, axis in panels.items():
        _square(axis, ranges[name]["low"], ranges[name]["high"], theme)
        series = [("as predicted", theme.blue, "-o", attributes[name]["bins"])]
        if "corrected" in attributes[name]:
            series.append(("corrected", theme.orange, "--s", attributes[name]["corrected"]["bins"]))
        for label, colour, look, bins in series:
            x, y = (_numbers([one[key] for one in bins]) for key in ("predicted", "label"))
            axis.plot(x, y, look, color=colour, linewidth=1.5, markersize=0, label=None)
            size = 12 + 120 * _numbers([one["n"] for one in bins]) / sum(one["n"] for one in bins)
            axis.scatter(x, y, s=size, color=colour, marker=look[-1], label=label, zorder=3)
        axis.set_title(f"{name}   slope {number(attributes[name]['slope'], 2)}")
    _legend(figure, panels[next(iter(attributes))])
    return figure


def _steerability(data: Mapping[str, Any], theme: Theme) -> Any:
    figures = data["steerability"]
    figure, panels = _panels(list(figures), "requested level", "measured")
    for name, axis in panels.items():
        curve = figures[name]["curve"]
        levels, means = [point["level"] for point in curve], _numbers([point["mean"] for point in curve])
        low, high = _bounds(curve)
        attribute = data.get("attributes", {}).get(name, {"low": min(levels), "high": max(levels)})
        scale = (data.get("scales") or {}).get(name)
        if scale is None:
            _square(axis, attribute["low"], attribute["high"], theme)
        else:
            axis.set(xticks=levels, ylabel=scale.replace("_", " "))
        axis.fill_between(levels, low, high, color=theme.blue, alpha=0.22, linewidth=0, label="95% interval")
        axis.plot(levels, means, "-o", color=theme.blue, linewidth=2, markersize=5, label="mean of the answers")
        spearman = figures[name]["spearman"]
        axis.set_title(name if spearman is None else f"{name}   ρ = {spearman:.3f}")
    _legend(figure, next(iter(panels.values())))
    return figure


def unlike_scales(data: Mapping[str, Any]) -> bool:
    """Whether something is measured on another scale than the attributes' own: slopes cannot be compared then."""
    columns = {column for row in data["cross_talk"].values() for column in row}
    return bool(data.get("scales")) or not columns <= set(data.get("attributes") or columns)


def _listening(data: Mapping[str, Any], theme: Theme) -> Any:
    heard = data["listening"]
    rows = {"all labels": heard["permuted"], **heard["attributes"]}
    arms = {"labels of other responses": (theme.blue, "D", rows)}
    arms |= {"no labels": (theme.orange, "s", {"all labels": heard["none"]})}
    label = "nats a response lost under these labels, 95% interval"
    return draw_arms(list(rows), arms, "gain", label, theme)


def _costs(data: Mapping[str, Any], theme: Theme) -> Any:
    costs, quality = data["costs"], data.get("quality") or "quality"
    figure, panels = _panels(list(costs), "requested level", f"change of {quality}")
    for name, axis in panels.items():
        levels, gains = [one["level"] for one in costs[name]], _numbers([one["gain"] for one in costs[name]])
        low, high = _bounds(costs[name])
        axis.axhline(0, color=theme.quiet, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axis.fill_between(levels, low, high, color=theme.orange, alpha=0.22, linewidth=0, label="95% interval")
        axis.plot(levels, gains, "-s", color=theme.orange, linewidth=2, markersize=5, label="against the default")
        axis.set(xticks=levels)
        axis.set_title(name)
    _legend(figure, next(iter(panels.values())))
    return figure


def _cross_talk(data: Mapping[str, Any], theme: Theme) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    table = data["cross_talk_rank"] if unlike_scales(data) else data["cross_talk"]
    rows, columns = list(table), list(next(iter(table.values())))
    slopes = np.array([_numbers([table[i][j] for j in columns]) for i in rows])
    figure = new_figure(2.2 + 1.05 * len(columns), 1.5 + 0.62 * len(rows))
    axis = figure.subplots()
    colours = LinearSegmentedColormap.from_list("slopes", [theme.orange, theme.page, theme.blue])
    axis.imshow(slopes, cmap=colours, vmin=-1.15, vmax=1.15, aspect="auto")
    for place, slope in np.ndenumerate(slopes):
        text = number(float(slope), 2)
        # Weight marks the diagonal and leaks of more than a fifth of a level.
        strong = rows[place[0]] == columns[place[1]]
        heavy = "bold" if strong or abs(slope) > 0.2 else "normal"
        bright = theme.page if abs(slope) > 0.6 else theme.ink
        axis.text(place[1], place[0], text, ha="center", va="center", color=bright, fontweight=heavy, fontsize=11)
    axis.set_xticks(range(len(columns)), [column.replace("_", "\n") for column in columns])
    axis.set_yticks(range(len(rows)), rows)
    axis.set(xlabel="measured", ylabel="requested")
    axis.set_xticks(np.arange(-0.5, len(columns)), minor=True)
    axis.set_yticks(np.arange(-0.5, len(rows)), minor=True)
    axis.grid(False)
    axis.grid(True, which="minor", color=theme.page, linewidth=3)
    axis.tick_params(which="both", length=0)
    axis.xaxis.set_ticks_position("top")
    axis.xaxis.set_label_position("top")
    for spine in axis.spines.values():
        spine.set_visible(False)
    return figure


def draw_arms(
    names: Sequence[str],
    arms: Mapping[str, tuple[str, str, Mapping[str, Mapping[str, Any]]]],
    value: str,
    x_label: str,
    theme: Theme,
    nothing: float = 0.0,
) -> Any:
    """Rows of names, in each one dot and interval an arm; arms are label -> (colour, marker, figures by name).

    A line stands at `nothing`, the figure of no effect.
    """
    figure = new_figure(3.4 * COLUMNS, 1.1 + (0.24 * len(arms) + 0.22) * len(names))
    axis = figure.subplots()
    gap = 0.62 / max(1, len(arms))
    for place, (label, (colour, marker, figures)) in enumerate(arms.items()):
        height = np.arange(len(names)) + gap * (place - (len(arms) - 1) / 2)
        points = [figures.get(name, {}) for name in names]
        low, high = _bounds(points)
        axis.hlines(height, low, high, color=colour, linewidth=2, alpha=0.55)
        middle = _numbers([point.get(value) for point in points])
        axis.plot(middle, height, marker, color=colour, markersize=6.5, label=label)
    axis.axvline(nothing, color=theme.quiet, linewidth=1)
    axis.set_yticks(range(len(names)), names)
    for border in np.arange(0.5, len(names) - 1):
        axis.axhline(border, color=theme.line, linewidth=0.8)
    axis.set(xlabel=x_label, ylim=(len(names) - 0.5, -0.5))
    axis.grid(False, axis="y")
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    _legend(figure, axis)
    return figure


def _label_source(data: Mapping[str, Any], theme: Theme) -> Any:
    looks = {
        "none": ("no labels", theme.quiet, "o"),
        "permuted": ("permuted labels", theme.pink, "X"),
        "human": ("human labels", theme.orange, "s"),
        "predicted": ("predicted labels", theme.blue, "D"),
    }
    sources = data["label_source"]
    arms = {looks[key][0]: (*looks[key][1:], sources[key]) for key in looks if sources.get(key)}
    names = list(next(iter(sources.values())))
    return draw_arms(names, arms, "spearman", "Spearman of requested and measured, single samples", theme)


def _bootstrap(data: Mapping[str, Any], theme: Theme) -> Any:
    step = data["bootstrap"]
    arms = {}
    for label, colour, marker, arm in (
        ("step 4", theme.blue, "D", step),
        ("control: as many more steps on the original data", theme.orange, "s", step.get("control")),
    ):
        if arm:
            arms[label] = (colour, marker, {"together": arm, **(arm.get("attributes") or {})})
    names = ["together", *(step.get("attributes") or {})]
    return draw_arms(names, arms, "gain", "change of the measured value, 95% interval", theme)


#: Whose accuracy a row of `preference` holds, in the order they are shown.
PREFERENCE_SCORES = {"model": "regressor", "longer": "the longer answer", "tfidf": "TF-IDF and logistic regression"}


def _preference(data: Mapping[str, Any], theme: Theme) -> Any:
    rows = data["preference"]["rows"]
    looks = {"model": (theme.blue, "D"), "longer": (theme.orange, "s"), "tfidf": (theme.green, "o")}
    arms = {
        PREFERENCE_SCORES[key]: (*look, {row["name"]: row[key] for row in rows})
        for key, look in looks.items()
        if key in rows[0]
    }
    names = [row["name"] for row in rows]
    best_of_four = data["preference"].get("layout") == "rewardbench2"
    chance, text = (0.25, "chance among four answers") if best_of_four else (0.5, "a coin")
    label = f"share of comparisons won, 95% interval; the line is {text}"
    figure = draw_arms(names, arms, "accuracy", label, theme, chance)
    for row, name in zip(rows, figure.axes[0].get_yticklabels()):
        name.set_fontweight("normal" if row["level"] == "subset" else "bold")
    return figure


_DRAWERS: dict[str, Callable[[Mapping[str, Any], Theme], Any]] = {
    "listening": _listening,
    "steerability": _steerability,
    "cross_talk": _cross_talk,
    "costs": _costs,
    "label_source": _label_source,
    "bootstrap": _bootstrap,
    "preference": _preference,
}
