"""A regressor against human labels: the page of `evaluate task=regressor` and its table for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nemo_steerlm.evaluate.metrics import json_ready
from nemo_steerlm.evaluate.regressor import SHOWN
from nemo_steerlm.evaluate.reports import DatasetReport
from nemo_steerlm.report.canvas import Theme, both_themes, draw_arms
from nemo_steerlm.report.page import Cell, Commands, Row, Table, render, settings_part, write_folder
from nemo_steerlm.report.pictures import draw_reliability
from nemo_steerlm.report.tables import interval, number, text_table


def summary_table(datasets: Mapping[str, DatasetReport]) -> str:
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


def write_report(folder: str | Path, data: Mapping[str, Any], commands: Commands | None = None) -> dict[str, Any]:
    """Write report.html, report.json and the pictures.

    Args:
        folder: where to.
        data: `datasets` (from `evaluate.regressor.measure`), `attributes` (the schema's dict), `summary` (plain text),
            `correction` (plain text, or None), `settings`, `seed`, `versions`; all of it goes into report.json.
        commands: for the foot of the page.

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
    parts = {
        "agreement": _agreement(datasets),
        "baselines": _baselines(datasets),
        "calibration": _calibration(datasets),
        "length": _length(datasets),
        "settings": settings_part(report),
    }
    html = render("regressor.html.j2", report, parts, pictures, commands)
    write_folder(folder, html, report, pictures)
    return report


def _lines(
    datasets: Mapping[str, DatasetReport],
    head: Sequence[str],
    cells: Callable[[Mapping[str, Any]], Row],
) -> Table:
    rows: list[Row] = [
        [attribute, name, *cells(one)]
        for name, dataset in datasets.items()
        for attribute, one in dataset["attributes"].items()
    ]
    return Table(["Attribute", "Dataset", *head], rows)


def with_bounds(one: Mapping[str, Any], key: str) -> Cell:
    """A figure with its interval in small below it, two digits each, so that the tables fit a screen."""
    bounds = (one.get("interval") or {}).get(key)
    return Cell(text=number(one.get(key)), small=interval(bounds, 2) if bounds else "")


def _agreement(datasets: Mapping[str, DatasetReport]) -> Table:
    head = ["#Pearson", "#Spearman", "#MSE", "#MAE", "#Quadratic kappa", "#Accuracy", "#n"]
    return _lines(datasets, head, lambda one: [*(with_bounds(one, key) for key in SHOWN), number(one["n"])])


def _baselines(datasets: Mapping[str, DatasetReport]) -> Table:
    head = ["#MSE", "#MSE of the mean", "#Gain over it", "#MSE of length", "#Gain over it", "#Pearson of length"]

    def cells(one: Mapping[str, Any]) -> Row:
        mean, length = one["floor"]["mean"], one["floor"]["length"]
        return [
            number(one["mse"]), number(mean["mse"]), with_bounds(one, "skill_mean"), number(length["mse"]),
            with_bounds(one, "skill_length"), number(length["pearson"]),
        ]  # fmt: skip

    return _lines(datasets, head, cells)


def _calibration(datasets: Mapping[str, DatasetReport]) -> Table:
    corrected = any("corrected" in one for part in datasets.values() for one in part["attributes"].values())
    head = ["#Calibration error", "#Bias", "#Slope", "#Spread"]
    head += ["#Corrected: error", "#Slope", "#MSE", "#Pearson"] if corrected else []

    def cells(one: Mapping[str, Any]) -> Row:
        row: Row = [number(one["ece"]), with_bounds(one, "bias"), with_bounds(one, "slope"), number(one["spread"])]
        other = one.get("corrected") or {}
        return row + ([number(other.get(key)) for key in ("ece", "slope", "mse", "pearson")] if corrected else [])

    return _lines(datasets, head, cells)


def _length(datasets: Mapping[str, DatasetReport]) -> Table:
    head = ["#Labels", "#Predictions", "#Predictions given the label"]
    keys = ("length_label", "length_predicted", "length_partial")
    return _lines(datasets, head, lambda one: [with_bounds(one, key) for key in keys])


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
