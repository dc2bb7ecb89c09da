"""The bars of a run, fixed before it; a report says for each whether it was reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_steerlm.evaluate.metrics import json_ready
from nemo_steerlm.evaluate.reports import Asked, Bar, BootstrapReport, Matrix, Response
from nemo_steerlm.evaluate.steerability import mean_spearman
from nemo_steerlm.report.tables import NOTHING, interval, number


@dataclass(frozen=True, kw_only=True, slots=True)
class Bars:
    """Thresholds of the bars.

    Attributes:
        pearson: regressor vs oracle, every attribute at least this and above the human labels' own.
        spearman: requested vs measured over single samples, every attribute at least this.
        spearman_mean: the same on average over the attributes.
        empty: share of empty answers, however the policy is asked, at most this.
        cross_talk: size of every off-diagonal slope at most this.
        label_gain: mean Spearman with predicted labels above the one with human labels by at least this.
        permuted: size of the mean Spearman with permuted labels at most this.
    """

    pearson: float = 0.9
    spearman: float = 0.8
    spearman_mean: float = 0.88
    empty: float = 0.01
    cross_talk: float = 0.2
    label_gain: float = 0.04
    permuted: float = 0.15


def check_bars(data: Mapping[str, Any], bars: Bars | None = None) -> list[Bar]:
    """Compares a report with the bars; bars of absent parts are left out.

    Args:
        data: the structure `write_report` takes.
        bars: limits that differ from the usual ones.

    Returns:
        The lines. A figure that could not be computed counts as not reached.
    """
    bars, data = bars or Bars(), json_ready(data)
    lines: list[Bar] = []
    for key, check in _CHECKS.items():
        if data.get(key):
            lines += check(data[key], bars)
    return lines


def bar_rows(lines: Sequence[Bar]) -> list[list[str]]:
    """Rows for a table with the columns measure, value, bar, result; the result in words, never by colour alone."""
    words = {True: "reached", False: "missed", None: "no bar"}
    return [[line["name"], line["text"], line["wanted"], words[line["reached"]]] for line in lines]


def _bar(
    name: str, detail: str, value: float | None, wanted: str, reached: bool | None, text: str | None = None
) -> Bar:
    shown = number(value) if text is None else text
    return {"name": name, "detail": detail, "value": value, "text": shown, "wanted": wanted, "reached": reached}


def _regressor(regressor: dict[str, Any], bars: Bars) -> list[Bar]:
    where, lowest = _lowest({name: one["pearson"] for name, one in regressor.items()})
    name = "Regressor: lowest Pearson"
    lines = [_bar(name, where, lowest, f"≥ {bars.pearson:g}", _at_least(lowest, bars.pearson))]
    human = {name: one["human"] for name, one in regressor.items() if one.get("human")}
    if human:
        where, lead = _lowest({one: _minus(regressor[one]["pearson"], human[one]["pearson"]) for one in human})
        name = "Regressor: smallest lead over the human labels' Pearson"
        lines.append(_bar(name, where, lead, "> 0", lead is not None and lead > 0, number(lead, sign=True)))
    return lines


def _steerability(steerability: dict[str, Response], bars: Bars) -> list[Bar]:
    where, lowest = _lowest({name: one["spearman"] for name, one in steerability.items()})
    mean, count = mean_spearman(steerability), len(steerability)
    bent = [name for name, one in steerability.items() if not one["monotone"]]
    rising, detail = count - len(bent), f"not {', '.join(bent)}" if bent else ""
    each, average = "Steering: lowest per-sample Spearman", "Steering: mean per-sample Spearman"
    return [
        _bar(each, where, lowest, f"≥ {bars.spearman:g}", _at_least(lowest, bars.spearman)),
        _bar(average, f"{count} attributes", mean, f"≥ {bars.spearman_mean:g}", _at_least(mean, bars.spearman_mean)),
        _bar("Steering: means rise with every level", detail, rising, "all", not bent, f"{rising} of {count}"),
    ]


def _cross_talk(cross_talk: Matrix, bars: Bars) -> list[Bar]:
    slopes = {f"{i} → {j}": slope for i, row in cross_talk.items() for j, slope in row.items() if i != j}
    if not slopes:
        return []
    where, _ = _lowest({name: None if slope is None else -abs(slope) for name, slope in slopes.items()})
    largest = slopes[where]
    reached = largest is not None and abs(largest) <= bars.cross_talk
    name, wanted = "Cross-talk: largest off-diagonal slope", f"within ±{bars.cross_talk:g}"
    return [_bar(name, where, largest, wanted, reached, number(largest, sign=True))]


def _requests(requests: list[Asked], bars: Bars) -> list[Bar]:
    shares = {row["asked"]: row["empty"] / row["n"] for row in requests}
    where = max(shares, key=lambda name: shares[name])
    name, wanted = "Answers: largest share of empty ones", f"≤ {bars.empty:g}"
    return [_bar(name, f"asked for {where}", shares[where], wanted, shares[where] <= bars.empty)]


def _label_source(sources: dict[str, dict[str, Response]], bars: Bars) -> list[Bar]:
    mean = {source: mean_spearman(figures) for source, figures in sources.items()}
    lines = []
    if {"none", "human", "predicted"} <= mean.keys():
        steps = [_minus(mean["human"], mean["none"]), _minus(mean["predicted"], mean["human"])]
        reached = all(step is not None and step > 0 for step in steps)
        text = f"{number(mean['none'])}, {number(mean['human'])}, {number(mean['predicted'])}"
        name, least = "Labels: none < human < predicted", _lowest(dict(zip(("human", "predicted"), steps)))[1]
        lines.append(_bar(name, "mean Spearman", least, "in this order", reached, text))
    if {"human", "predicted"} <= mean.keys():
        gain, name = _minus(mean["predicted"], mean["human"]), "Labels: predicted above human"
        reached, wanted = _at_least(gain, bars.label_gain), f"≥ {bars.label_gain:g}"
        lines.append(_bar(name, "mean Spearman", gain, wanted, reached, number(gain, sign=True)))
    if "permuted" in mean:
        value, name = mean["permuted"], "Labels: permuted control near 0"
        reached, wanted = value is not None and abs(value) <= bars.permuted, f"within ±{bars.permuted:g}"
        lines.append(_bar(name, "mean Spearman", value, wanted, reached, number(value, sign=True)))
    return lines


def _bootstrap(bootstrap: BootstrapReport, bars: Bars) -> list[Bar]:
    lines = []
    for name, arm in (("Step 4: gain", bootstrap), ("Step 4: gain of the control arm", bootstrap.get("control"))):
        if arm:
            detail = interval(arm.get("interval"), sign=True)
            lines.append(_bar(name, detail, arm["gain"], NOTHING, None, number(arm["gain"], sign=True)))
    return lines


_CHECKS: dict[str, Callable[[Any, Bars], list[Bar]]] = {
    "regressor": _regressor,
    "steerability": _steerability,
    "requests": _requests,
    "cross_talk": _cross_talk,
    "label_source": _label_source,
    "bootstrap": _bootstrap,
}


def _minus(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second


def _at_least(value: float | None, limit: float) -> bool:
    return value is not None and value >= limit


def _lowest(values: Mapping[str, float | None]) -> tuple[str, float | None]:
    """Name and value of the lowest; an undefined value is lower than any."""
    return min(values.items(), key=lambda item: -math.inf if item[1] is None else item[1])
