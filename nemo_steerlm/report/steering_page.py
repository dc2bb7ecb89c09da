"""The parts of a page about steering; each is plain data for the macro of the same name in results.html.j2."""

from __future__ import annotations

import math
from typing import Any

from nemo_steerlm.evaluate.reports import Results
from nemo_steerlm.evaluate.steerability import WAYS, mean_spearman
from nemo_steerlm.report.page import Cell, Row, Table, with_interval
from nemo_steerlm.report.pictures import unlike_scales
from nemo_steerlm.report.tables import NOTHING, number


def listening(data: Results) -> Table:
    """Label information of the policy."""
    heard = data["listening"]
    assert heard is not None, "there is no section about it otherwise"
    rows: list[Row] = [
        ["no attribute string", with_interval(heard["none"], "gain", sign=True)],
        ["the labels of other responses", with_interval(heard["permuted"], "gain", sign=True)],
    ]
    for name, one in heard["attributes"].items():
        rows.append([Cell(text=f"{name} alone", look="part"), with_interval(one, "gain", sign=True)])
    return Table(["Shown instead", "#Nats a response"], rows)


def steerability(data: Results) -> dict[str, Any]:
    """Requested against measured, attribute by attribute."""
    steered, scales = data["steerability"], data.get("scales") or {}
    rows: list[Row] = []
    for name, one in steered.items():
        means = "\u2002".join(number(point["mean"], 2) for point in one["curve"])  # an en space
        same = f"{one['identical']:.0%}" if one.get("identical") is not None else NOTHING
        rows.append(
            [
                Cell(text=name, small=scales.get(name, "")), with_interval(one, "spearman"),
                number(one.get("per_prompt")), number(one.get("slope"), 2), "yes" if one["monotone"] else "no", means,
                same, number(one.get("n")),
            ]
        )  # fmt: skip
    head = ["Attribute", "#Spearman", "#Within a prompt", "#Slope", "Means rise", "#Mean at each level"]
    return {"mean": mean_spearman(steered), "table": Table([*head, "#Same answer", "#n"], rows)}


def ways(data: Results) -> Table:
    """The rank correlations in every way of asking."""
    ways = {way: steered for way, steered in data["ways"].items() if steered}
    names = list(dict.fromkeys(name for steered in ways.values() for name in steered))
    rows: list[Row] = [
        [name, *(with_interval(one.get(name) or {}, "spearman") for one in ways.values())] for name in names
    ]
    heads = [WAYS[way][0].upper() + WAYS[way][1:] for way in ways]
    return Table(["Attribute", *(f"#{head}" for head in heads)], rows)


def costs(data: Results) -> dict[str, Any]:
    """The change of quality at each level."""
    quality = str(data.get("quality") or "quality")
    rows: list[Row] = []
    for name, points in data["costs"].items():
        worst = min(points, key=lambda one: math.inf if one["gain"] is None else one["gain"])
        rows.append([name, number(worst["level"]), with_interval(worst, "gain", sign=True)])
    return {"quality": quality, "table": Table(["Attribute", "#Costliest level", f"#Change of {quality}"], rows)}


def cross_talk(data: Results) -> dict[str, Any]:
    """The measured change of one attribute where another is requested."""
    ranks = unlike_scales(data)
    cells = data["cross_talk_rank"] if ranks else data["cross_talk"]
    columns = list(next(iter(cells.values())))
    rows = [[name, *(number(row[column], 2) for column in columns)] for name, row in cells.items()]
    heads = [f"#{column.replace('_', ' ')}" for column in columns]
    return {"ranks": ranks, "table": Table(["Requested", *heads], rows)}
