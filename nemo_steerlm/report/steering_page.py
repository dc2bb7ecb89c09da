"""The sections of a page about steering; each gives the text before its picture, and what follows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from nemo_steerlm.evaluate.steerability import WAYS, mean_spearman
from nemo_steerlm.report.page import table, with_interval
from nemo_steerlm.report.pictures import unlike_scales
from nemo_steerlm.report.tables import NOTHING, number

Data = Mapping[str, Any]


def listening(data: Data) -> tuple[str, str]:
    """What labels are worth to the policy."""
    heard = data["listening"]
    rows = [
        ["no attribute string", with_interval(heard["none"], "gain", sign=True)],
        ["the labels of other responses", with_interval(heard["permuted"], "gain", sign=True)],
    ]
    for name, one in heard["attributes"].items():
        shown = f'<span class="part">{escape(name)} alone</span>'
        rows.append([shown, with_interval(one, "gain", sign=True)])
    text = (
        f"<p>{number(heard['permuted']['n'])} held-out responses of {number(heard['rows'])} rows are read with their "
        f"own labels (loss {number(heard['loss'], 1)} nats a response) and with others. The difference is what the "
        "policy takes from the labels; a policy that does not listen has 0 where the labels are of other responses. "
        "Alone: this attribute's value is of another response.</p>"
    )
    return text, table(["Shown instead", "#Nats a response"], rows)


def steerability(data: Data) -> tuple[str, str]:
    """Requested against measured, attribute by attribute."""
    steered, scales = data["steerability"], data.get("scales") or {}
    rows = []
    for name, one in steered.items():
        means = "&ensp;".join(number(point["mean"], 2) for point in one["curve"])
        shown = escape(name) + (f"<small>{escape(scales[name])}</small>" if name in scales else "")
        same = f"{one['identical']:.0%}" if one.get("identical") is not None else NOTHING
        rows.append(
            [
                shown, with_interval(one, "spearman"), number(one.get("per_prompt")), number(one.get("slope"), 2),
                "yes" if one["monotone"] else "no", means, same, number(one.get("n")),
            ]
        )  # fmt: skip
    text = (
        "<p>Every attribute is asked for at each of its levels while the others stay at their default; "
        f"{escape(data.get('measured_by') or 'the oracle')} measures each answer. ρ is the rank correlation of "
        f"requested and measured value over single answers (mean {number(mean_spearman(steered))}); bands and "
        "intervals resample the prompts. Within a prompt is the mean of each prompt's own rank correlation; same "
        "answer is the share of pairs of answers to one prompt, asked for different levels, that are one text.</p>"
    )
    head = ["Attribute", "#Spearman", "#Within a prompt", "#Slope", "Means rise", "#Mean at each level"]
    head += ["#Same answer", "#n"]
    return text, table(head, rows)


def ways(data: Data) -> tuple[str, str]:
    """The rank correlations in every way of asking."""
    ways = {way: steered for way, steered in data["ways"].items() if steered}
    names = list(dict.fromkeys(name for steered in ways.values() for name in steered))
    rows = [
        [escape(name), *(with_interval(steered.get(name) or {}, "spearman") for steered in ways.values())]
        for name in names
    ]
    text = "<p>Spearman of requested and measured over single answers, for each way in which a user may ask.</p>"
    heads = [WAYS[way][0].upper() + WAYS[way][1:] for way in ways]
    return text, table(["Attribute", *(f"#{head}" for head in heads)], rows) if rows else ""


def costs(data: Data) -> tuple[str, str]:
    """What each setting costs in quality."""
    quality = escape(str(data.get("quality") or "quality"))
    text = (
        f"<p>How far the measured {quality} of an answer moves when one attribute is asked for at another level, "
        "against all attributes at their default, prompt by prompt.</p>"
    )
    rows = []
    for name, points in data["costs"].items():
        worst = min(points, key=lambda one: math.inf if one["gain"] is None else one["gain"])
        rows.append([escape(name), number(worst["level"]), with_interval(worst, "gain", sign=True)])
    return text, table(["Attribute", "#Costliest level", f"#Change of {quality}"], rows)


def cross_talk(data: Data) -> tuple[str, str]:
    """What is measured of one attribute when another is asked for."""
    if unlike_scales(data):
        text = (
            "<p>Rank correlation of what is asked of an attribute (row) with what is measured of another (column), "
            "over single answers. Ideal is 1 on the diagonal and 0 elsewhere; above 0.2 is bold.</p>"
        )
        cells = data["cross_talk_rank"]
    else:
        text = (
            "<p>How much a measured attribute (column) moves when the requested level of another (row) rises by one. "
            "Ideal is 1 on the diagonal and 0 elsewhere; slopes above 0.2 are bold.</p>"
        )
        cells = data["cross_talk"]
    columns = list(next(iter(cells.values())))
    rows = [[escape(name), *(number(row[column], 2) for column in columns)] for name, row in cells.items()]
    heads = [f"#{escape(column.replace('_', ' '))}" for column in columns]
    return text, f"<details><summary>as a table</summary>{table(['Requested', *heads], rows)}</details>"
