"""Predicted beside human labels by dataset, language and number of annotators: the page and the table."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from nemo_steerlm.evaluate.label_noise import LEAST_ROWS
from nemo_steerlm.evaluate.metrics import json_ready
from nemo_steerlm.report.canvas import Theme, both_themes, draw_arms
from nemo_steerlm.report.page import picture, render, settings_section, table, write_folder
from nemo_steerlm.report.regressor_page import with_bounds
from nemo_steerlm.report.tables import interval, number, text_table

KINDS = {"dataset": "Datasets", "language": "Languages", "annotators": "Numbers of annotators"}
_TEXTS = {
    "dataset": (
        "Of rows the regressor was trained on the agreement is too good. Higher and lower: share of responses whose "
        "prediction rounds above or below the label. Entropy of the labels in bits. Ties: labels at an exact half, "
        "where rounding decides. The reliability of the labels is at least r squared; the ceiling is the correlation "
        "that a perfect predictor would reach, estimated where labels are means of different numbers of annotators."
    ),
    "language": f"All datasets together, by the row's own language; those with at least {LEAST_ROWS} responses.",
    "annotators": "By the number of annotators whose mean a label is. With noisy annotators it rises with the number.",
}


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


def write_report(folder: str | Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Write report.html, report.json and the pictures.

    Args:
        folder: where to.
        data: `parts` (from `evaluate.label_noise.measure`), `attributes` (the schema's dict), `summary` (plain text),
            `settings`, `seed`, `versions`; all of it goes into report.json.

    Returns:
        The content of report.json.
    """
    report: dict[str, Any] = json_ready(data)
    parts = {kind: named for kind, named in report["parts"].items() if named}
    pictures = both_themes({kind: partial(_draw, named) for kind, named in parts.items() if any(named.values())})
    sections = [(kind, KINDS[kind], _section(kind, named, pictures.get(kind))) for kind, named in parts.items()]
    sections.append(("settings", "Settings", "".join(settings_section(report))))
    html = render("Predicted against human labels", str(report.get("summary") or ""), sections)
    write_folder(folder, html, report, pictures)
    return report


def _section(kind: str, named: Mapping[str, Any], pair: tuple[bytes, bytes] | None) -> str:
    first = ["Attribute", KINDS[kind].removesuffix("s")]
    agreement = [*first, "#Pearson", "#Spearman", "#MAE", "#Kappa", "#Bias", "#Higher", "#Lower", "#n"]
    noise = [*first, "#Entropy", "#Ties", "#Reliability at least", "#Noise of one annotator", "#Ceiling"]
    agreement_rows, noise_rows = [], []
    for name, attributes in named.items():
        for attribute, one in attributes.items():
            start = [escape(attribute), escape(name)]
            bounded = [with_bounds(one, key) for key in ("pearson", "spearman", "mae", "kappa", "bias")]
            shares = [number(one[key], 2) for key in ("higher", "lower")]
            agreement_rows.append([*start, *bounded, *shares, number(one["n"])])
            labels = [number(one[key], 2) for key in ("entropy", "ties", "reliability_least")]
            annotator = with_bounds({**one, "interval": {"noise": one.get("noise_interval")}}, "noise")
            noise_rows.append([*start, *labels, annotator, number(one.get("ceiling"))])
    alt = f"Pearson correlation for each attribute by {kind}; figures in the table below"
    body = picture(alt, pair) + table(agreement, agreement_rows)
    return f"<p>{_TEXTS[kind]}</p>{body}<h3>What the labels allow</h3>" + table(noise, noise_rows)


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
