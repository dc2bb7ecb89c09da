"""`STEM.report.html` of annotated conversations: the labels before and after, and how they agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_steerlm.report.page import Commands, Row, Table, render, shaded
from nemo_steerlm.report.tables import number

_SIDES = {"human": "annotators", "predicted": "regressor"}


def annotation_page(report: Mapping[str, Any], commands: Commands | None = None) -> str:
    """Render the page of `STEM.report.json`, whose name `report` has under "file"."""
    parts = {"labels": _labels(report["labels"]), "agreement": _agreement(report["attributes"])}
    return render("annotation.html.j2", report, parts, commands=commands)


def _labels(labels: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Table:
    """A histogram a line: labels of annotators, and the regressor's in their place."""
    levels = sorted({int(level) for sides in labels.values() for counts in sides.values() for level in counts})
    rows: list[Row] = []
    for name, sides in labels.items():
        for side, counts in sides.items():
            total, most = sum(counts.values()), max(counts.values(), default=0)
            cells = [counts.get(str(level), 0) for level in levels]
            rows.append([name, _SIDES[side], number(total), *(shaded(number(one), one, most) for one in cells)])
    return Table(["Attribute", "Given by", "#n", *(f"#{level}" for level in levels)], rows)


def _agreement(attributes: Mapping[str, Mapping[str, Any]]) -> Table:
    keys = ("mean", "std", "pearson_with_human")
    rows = [[name, *(number(one[key]) for key in keys)] for name, one in attributes.items()]
    return Table(["Attribute", "#Mean", "#Deviation", "#Pearson with annotators"], rows)
