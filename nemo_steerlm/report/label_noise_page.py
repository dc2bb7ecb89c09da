"""Predicted against human labels by dataset, language and number of annotators: the page and the table."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nemo_steerlm.evaluate.label_noise import LEAST_ROWS
from nemo_steerlm.evaluate.metrics import json_ready
from nemo_steerlm.report.canvas import Theme, both_themes, draw_arms
from nemo_steerlm.report.page import Commands, Row, Table, render, settings_part, write_folder
from nemo_steerlm.report.regressor_page import with_bounds
from nemo_steerlm.report.tables import interval, number, text_table

_COLUMNS = {"dataset": "Dataset", "language": "Language", "annotators": "Number of annotators"}


def summary_table(parts: Mapping[str, Any]) -> str:
    """The figures for a terminal: a line a part and attribute."""
    keys = ("spearman", "mae", "kappa", "higher", "lower", "entropy", "ties", "ceiling")
    rows = [
        [kind, name, attribute, one["n"], one["pearson"], interval((one.get("interval") or {}).get("pearson"), 2)]
        + [one.get(key) for key in keys]
        for kind, named in parts.items()
        for name, attributes in named.items()
        for attribute, one in attributes.items()
    ]
    head = ["by", "part", "attribute", "n", "Pearson", "95%", "Spearman", "MAE", "kappa", "higher", "lower", "entropy"]
    return text_table(rows, [*head, "ties", "ceiling"])


def write_report(folder: str | Path, data: Mapping[str, Any], commands: Commands | None = None) -> dict[str, Any]:
    """Write report.html, report.json and the pictures.

    Args:
        folder: where to.
        data: `parts` (from `evaluate.label_noise.measure`), `attributes` (the schema's dict), `summary` (plain text),
            `settings`, `seed`, `versions`; all of it goes into report.json.
        commands: for the foot of the page.

    Returns:
        The content of report.json.
    """
    report: dict[str, Any] = json_ready(data)
    parts = {kind: named for kind, named in report["parts"].items() if named}
    pictures = both_themes({kind: partial(_draw, named) for kind, named in parts.items() if any(named.values())})
    shown = {kind: _part(kind, named) for kind, named in parts.items()} | {"settings": settings_part(report)}
    html = render("label_noise.html.j2", report, shown, pictures, commands)
    write_folder(folder, html, report, pictures)
    return report


def _part(kind: str, named: Mapping[str, Any]) -> dict[str, Any]:
    first = ["Attribute", _COLUMNS[kind]]
    agreement = [*first, "#Pearson", "#Spearman", "#MAE", "#Kappa", "#Bias", "#Higher", "#Lower", "#n"]
    noise = [*first, "#Entropy", "#Ties", "#Reliability at least", "#Noise of one annotator", "#Ceiling"]
    agreement_rows: list[Row] = []
    noise_rows: list[Row] = []
    for name, attributes in named.items():
        for attribute, one in attributes.items():
            bounded = [with_bounds(one, key) for key in ("pearson", "spearman", "mae", "kappa", "bias")]
            shares = [number(one[key], 2) for key in ("higher", "lower")]
            agreement_rows.append([attribute, name, *bounded, *shares, number(one["n"])])
            labels = [number(one[key], 2) for key in ("entropy", "ties", "reliability_least")]
            annotator = with_bounds({**one, "interval": {"noise": one.get("noise_interval")}}, "noise")
            noise_rows.append([attribute, name, *labels, annotator, number(one.get("ceiling"))])
    return {"least": LEAST_ROWS, "agreement": Table(agreement, agreement_rows), "noise": Table(noise, noise_rows)}


def _draw(named: Mapping[str, Any], theme: Theme) -> Any:
    looks = zip((theme.blue, theme.orange, theme.green, theme.pink, theme.quiet), "Dso^v")
    arms = {}
    for (name, attributes), (colour, marker) in zip(named.items(), looks):  # five at most; the table has them all
        points = {
            attribute: {"pearson": one["pearson"], "interval": (one.get("interval") or {}).get("pearson")}
            for attribute, one in attributes.items()
        }
        arms[name] = (colour, marker, points)
    names = list(dict.fromkeys(attribute for attributes in named.values() for attribute in attributes))
    return draw_arms(names, arms, "pearson", "Pearson correlation of prediction and human label", theme)
