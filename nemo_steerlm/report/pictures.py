"""The pictures of a report, drawn once for a light and once for a dark page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from nemo_steerlm.report.canvas import (
    Theme,
    add_legend,
    both_themes,
    bounds,
    draw_arms,
    new_figure,
    new_panels,
    numbers,
    readable_on,
    square_axes,
)
from nemo_steerlm.report.tables import number
from nemo_steerlm.report.training import draw_losses

_MOST_DOTS = 600  # more only turn a cloud into a blot


def draw(data: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, tuple[bytes, bytes]]:
    """Draws every picture for which the data has figures.

    Args:
        data: a report's figures as plain JSON types, see `write_report`.
        arrays: measurements of single rows and steps, see `write_report`.

    Returns:
        PNG bytes for a light and a dark page by name: regressor and trainings, and one for each key of `data` that has
        a drawer.
    """
    drawers: dict[str, Callable[[Theme], Any]] = {}
    if arrays.get("trainings"):
        drawers["trainings"] = partial(draw_losses, arrays["trainings"])
    if "regressor" in arrays and data.get("attributes"):
        drawers["regressor"] = partial(_regressor, data, arrays["regressor"])
    for name, drawer in _DRAWERS.items():
        if data.get(name):
            drawers[name] = partial(drawer, data)
    return both_themes(drawers)


def _regressor(data: Mapping[str, Any], arrays: Mapping[str, Any], theme: Theme) -> Any:
    target = np.asarray(arrays["target"], np.float64)
    predicted = np.asarray(arrays["predicted"], np.float64)
    human = np.asarray(arrays["human"], np.float64) if arrays.get("human") is not None else None
    names = list(data["attributes"])
    figure, panels = new_panels(names, "oracle", "predicted")
    random = np.random.default_rng(0)
    for k, name in enumerate(names):
        axis, attribute = panels[name], data["attributes"][name]
        low, high = attribute["low"], attribute["high"]
        square_axes(axis, low, high, theme)
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
    add_legend(figure, panels[names[0]])
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
    figure, panels = new_panels(list(attributes), "mean prediction", "mean label")
    for name, axis in panels.items():
        square_axes(axis, ranges[name]["low"], ranges[name]["high"], theme)
        series = [("as predicted", theme.blue, "-o", attributes[name]["bins"])]
        if "corrected" in attributes[name]:
            series.append(("corrected", theme.orange, "--s", attributes[name]["corrected"]["bins"]))
        for label, colour, look, bins in series:
            x, y = (numbers([one[key] for one in bins]) for key in ("predicted", "label"))
            axis.plot(x, y, look, color=colour, linewidth=1.5, markersize=0, label=None)
            size = 12 + 120 * numbers([one["n"] for one in bins]) / sum(one["n"] for one in bins)
            axis.scatter(x, y, s=size, color=colour, marker=look[-1], label=label, zorder=3)
        axis.set_title(f"{name}   slope {number(attributes[name]['slope'], 2)}")
    add_legend(figure, panels[next(iter(attributes))])
    return figure


def _steerability(data: Mapping[str, Any], theme: Theme) -> Any:
    figures = data["steerability"]
    figure, panels = new_panels(list(figures), "requested level", "measured")
    for name, axis in panels.items():
        curve = figures[name]["curve"]
        levels, means = [point["level"] for point in curve], numbers([point["mean"] for point in curve])
        low, high = bounds(curve)
        attribute = data.get("attributes", {}).get(name, {"low": min(levels), "high": max(levels)})
        scale = (data.get("scales") or {}).get(name)
        if scale is None:
            square_axes(axis, attribute["low"], attribute["high"], theme)
        else:
            axis.set(xticks=levels, ylabel=scale.replace("_", " "))
        axis.fill_between(levels, low, high, color=theme.blue, alpha=0.22, linewidth=0, label="95% interval")
        axis.plot(levels, means, "-o", color=theme.blue, linewidth=2, markersize=5, label="mean of the answers")
        spearman = figures[name]["spearman"]
        axis.set_title(name if spearman is None else f"{name}   ρ = {spearman:.3f}")
    add_legend(figure, next(iter(panels.values())))
    return figure


def unlike_scales(data: Mapping[str, Any]) -> bool:
    """Whether any score has another scale than the attributes: slopes cannot be compared then."""
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
    figure, panels = new_panels(list(costs), "requested level", f"change of {quality}")
    for name, axis in panels.items():
        levels, gains = [one["level"] for one in costs[name]], numbers([one["gain"] for one in costs[name]])
        low, high = bounds(costs[name])
        axis.axhline(0, color=theme.quiet, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axis.fill_between(levels, low, high, color=theme.orange, alpha=0.22, linewidth=0, label="95% interval")
        axis.plot(levels, gains, "-s", color=theme.orange, linewidth=2, markersize=5, label="against the default")
        axis.set(xticks=levels)
        axis.set_title(name)
    add_legend(figure, next(iter(panels.values())))
    return figure


def slope_colours(theme: Theme) -> Callable[[Any], Any]:
    """Gives the colours `[..., 4]` (red, green, blue, opacity) behind slopes or correlations `[...]`."""
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    colours: Any = LinearSegmentedColormap.from_list("slopes", [theme.orange, theme.page, theme.blue])
    colours = colours.with_extremes(bad=theme.page)
    scale = Normalize(-1.15, 1.15)
    return lambda slope: colours(scale(np.ma.masked_invalid(slope)))


def _cross_talk(data: Mapping[str, Any], theme: Theme) -> Any:
    table = data["cross_talk_rank"] if unlike_scales(data) else data["cross_talk"]
    rows, columns = list(table), list(next(iter(table.values())))
    slopes = np.array([numbers([table[i][j] for j in columns]) for i in rows])
    figure = new_figure(2.2 + 1.05 * len(columns), 1.5 + 0.62 * len(rows))
    axis = figure.subplots()
    colours = slope_colours(theme)(slopes)
    axis.imshow(colours, aspect="auto")
    for place, slope in np.ndenumerate(slopes):
        text = number(float(slope), 2)
        # Weight marks the diagonal and leaks of more than a fifth of a level.
        strong = rows[place[0]] == columns[place[1]]
        heavy = "bold" if strong or abs(slope) > 0.2 else "normal"
        colour = readable_on(colours[place])
        axis.text(place[1], place[0], text, ha="center", va="center", color=colour, fontweight=heavy, fontsize=11)
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
