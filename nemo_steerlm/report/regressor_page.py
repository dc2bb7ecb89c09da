"""A regressor beside human labels: the page of `evaluate task=regressor` and its table for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from nemo_steerlm.evaluate.metrics import json_ready
from nemo_steerlm.evaluate.regressor import SHOWN
from nemo_steerlm.report.canvas import Theme, both_themes, draw_arms
from nemo_steerlm.report.page import picture, render, settings_section, table, write_folder
from nemo_steerlm.report.pictures import draw_reliability
from nemo_steerlm.report.tables import interval, number, text_table


def summary_table(datasets: Mapping[str, Any]) -> str:
    """The figures for a terminal: a line a dataset and attribute."""
    rows = []
    for name, dataset in datasets.items():
        for attribute, one in dataset["attributes"].items():
            bounds = interval((one.get("interval") or {}).get("pearson"), 2)
            shown = [one["pearson"], bounds, *(one[key] for key in SHOWN[1:])]
            extra = [one["corrected"]["mse"]] if "corrected" in one else []
            rows.append([name, attribute, one["n"], *shown, one["skill_mean"], one["skill_length"], *extra])
    head = ["dataset", "attribute", "n", "Pearson", "95%", "Spearman", "MSE", "MAE", "kappa", "accuracy"]
    head += ["over mean", "over length"]
    if rows and len(rows[0]) > len(head):
        head += ["corrected MSE"]
    return text_table(rows, head)


def write_report(folder: str | Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Write report.html, report.json and the pictures.

    Args:
        folder: where to.
        data: `datasets` (from `evaluate.regressor.measure`), `attributes` (the schema's dict), `summary` (plain text),
            `correction` (plain text, or None), `settings`, `seed`, `versions`; all of it goes into report.json.

    Returns:
        The content of report.json.
    """
    report: dict[str, Any] = json_ready(data)
    datasets = report["datasets"]
    first = next(iter(datasets.values()))["attributes"]
    pictures = both_themes(
        {
            "agreement": partial(_draw_agreement, first),
            "reliability": partial(draw_reliability, first, report["attributes"]),
        }
        if first
        else {}
    )
    parts = [
        ("agreement", "Agreement with annotators", _agreement(datasets, pictures.get("agreement"))),
        ("baselines", "Beside the baselines", _baselines(datasets)),
        ("calibration", "Calibration", _calibration(datasets, report, pictures.get("reliability"))),
        ("length", "Length", _length(datasets)),
        ("settings", "Settings", "".join(settings_section(report))),
    ]
    html = render("Regressor against human labels", str(report.get("summary") or ""), parts)
    write_folder(folder, html, report, pictures)
    return report


def _lines(
    datasets: Mapping[str, Any], head: Sequence[str], cells: Callable[[Mapping[str, Any]], Sequence[str]]
) -> str:
    rows = [
        [escape(attribute), escape(name), *cells(one)]
        for name, dataset in datasets.items()
        for attribute, one in dataset["attributes"].items()
    ]
    return table(["Attribute", "Dataset", *head], rows)


def with_bounds(one: Mapping[str, Any], key: str) -> str:
    """A figure with its interval in small below it, two digits each: so the tables fit a screen."""
    bounds = (one.get("interval") or {}).get(key)
    return number(one.get(key)) + (f"<small>{interval(bounds, 2)}</small>" if bounds else "")


def _agreement(datasets: Mapping[str, Any], pair: tuple[bytes, bytes] | None) -> str:
    text = (
        "<p>Intervals hold 95% of the resamples of prompts (rows with the same first turn stay together). Kappa has "
        "quadratic weights; it and accuracy see values rounded to the scale.</p>"
    )
    alt = "Pearson correlation for each attribute beside that of length alone; figures in the table below"
    head = ["#Pearson", "#Spearman", "#MSE", "#MAE", "#Quadratic kappa", "#Accuracy", "#n"]
    rows = _lines(datasets, head, lambda one: [*(with_bounds(one, key) for key in SHOWN), number(one["n"])])
    return text + picture(alt, pair) + rows


def _baselines(datasets: Mapping[str, Any]) -> str:
    text = (
        "<p>What needs no model: the mean label, and least squares on the logarithm of the response's characters, "
        "fitted on four fifths of the prompts and judged on the rest. A gain is the share of the baseline's squared "
        "error that the regressor saves; below zero the baseline is better.</p>"
    )
    head = ["#MSE", "#MSE of the mean", "#Gain over it", "#MSE of length", "#Gain over it", "#Pearson of length"]

    def cells(one: Mapping[str, Any]) -> list[str]:
        mean, length = one["floor"]["mean"], one["floor"]["length"]
        first = [number(one["mse"]), number(mean["mse"]), with_bounds(one, "skill_mean")]
        return [*first, number(length["mse"]), with_bounds(one, "skill_length"), number(length["pearson"])]

    return text + _lines(datasets, head, cells)


def _calibration(datasets: Mapping[str, Any], report: Mapping[str, Any], pair: tuple[bytes, bytes] | None) -> str:
    corrected = any("corrected" in one for part in datasets.values() for one in part["attributes"].values())
    text = (
        "<p>A point is a tenth of the range: the mean label of the responses predicted there, the dashed diagonal is "
        "perfect calibration. The error is the mean distance from it in levels, weighted by rows (noise alone makes "
        "it positive). A slope of labels on predictions above 1 says that predictions shrink to their mean, below 1 "
        "that they exaggerate; the spread is their standard deviation over that of the labels.</p>"
    )
    if report.get("correction"):
        text += f"<p>{escape(str(report['correction']))}</p>"
    head = ["#Calibration error", "#Bias", "#Slope", "#Spread"]
    head += ["#Corrected: error", "#Slope", "#MSE", "#Pearson"] if corrected else []

    def cells(one: Mapping[str, Any]) -> list[str]:
        row = [number(one["ece"]), with_bounds(one, "bias"), with_bounds(one, "slope"), number(one["spread"])]
        other = one.get("corrected") or {}
        return row + ([number(other.get(key)) for key in ("ece", "slope", "mse", "pearson")] if corrected else [])

    alt = "Mean label over mean prediction, one panel an attribute; figures in report.json"
    return text + picture(alt, pair) + _lines(datasets, head, cells)


def _length(datasets: Mapping[str, Any]) -> str:
    text = (
        "<p>Correlations with the logarithm of a response's characters. The last column is what matters: of two "
        "responses with the same label, does the longer one get the higher prediction? Zero is unbiased.</p>"
    )
    head = ["#Labels", "#Predictions", "#Predictions given the label"]
    keys = ("length_label", "length_predicted", "length_partial")
    return text + _lines(datasets, head, lambda one: [with_bounds(one, key) for key in keys])


def _draw_agreement(attributes: Mapping[str, Any], theme: Theme) -> Any:
    def points(key: str, of: Callable[[Any], Any]) -> dict[str, Any]:
        return {
            name: {"pearson": of(one).get("pearson"), "interval": (of(one).get("interval") or {}).get("pearson")}
            for name, one in attributes.items()
        }

    arms = {
        "regressor": (theme.blue, "D", points("pearson", lambda one: one)),
        "length alone": (theme.quiet, "o", points("pearson", lambda one: one["floor"]["length"])),
    }
    return draw_arms(list(attributes), arms, "pearson", "Pearson correlation with the label", theme)
