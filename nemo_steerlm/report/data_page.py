"""`report.html` of prepared data, from its `report.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nemo_steerlm.report.page import Cell, Commands, Row, Table, bars, render, shaded
from nemo_steerlm.report.tables import number

Data = Mapping[str, Any]
_SIDES = ("train", "val")


def data_page(report: Data, commands: Commands | None = None) -> str:
    """Render the page; a part that the report does not have gets no section."""
    parts = {key: part(report) for key, part in _PARTS.items() if report.get(key)}
    return render("data.html.j2", report, parts, commands=commands)


def _read(report: Data) -> Table:
    rows = [[_words(name), number(count), ""] for name, count in report["read"].items()]
    rows += [["dropped", number(count), _words(reason)] for reason, count in report.get("dropped", {}).items()]
    for key, count in report.get("unused_keys", {}).items():
        rows.append(["not in any prompt", number(count), f"turns with the key {key}"])
    for side in _SIDES:
        kept = report.get(side) or {}
        rows += [[f"kept in {side}", number(count), _words(name)] for name, count in kept.items()]
    if report.get("shared_turns"):
        rows.append(["context only", number(report["shared_turns"]), "turns that an earlier row trains on already"])
    return Table(["", "#Count", "Of what, or why"], rows)


def _labels(report: Data) -> Table:
    labels = report["labels"]
    values = sorted({int(value) for histogram in labels.values() for value in histogram})
    statistics = report.get("label_statistics") or {}
    rows: list[Row] = []
    for name, histogram in labels.items():
        figures = statistics.get(name) or {}
        most = max(histogram.values(), default=0)
        cells = [shaded(number(histogram.get(str(value))), histogram.get(str(value), 0), most) for value in values]
        total = number(figures.get("n", sum(histogram.values())))
        rows.append([name, total, number(figures.get("mean"), 2), number(figures.get("std"), 2), *cells])
    return Table(["Attribute", "#n", "#Mean", "#Deviation", *(f"#{value}" for value in values)], rows)


def _correlations(report: Data) -> Table:
    figures = report["label_correlations"]
    names = [name for name, row in figures.items() if any(value is not None for value in row.values())]
    rows: list[Row] = []
    for name in names:
        values = [figures[name][other] or 0.0 for other in names]
        cells = [shaded(number(r, 2), abs(r), 1, "shade" if r >= 0 else "shade bad") for r in values]
        rows.append([name, *cells])
    return Table(["", *(f"#{name}" for name in names)], rows)


def _lengths(report: Data) -> dict[str, Any]:
    titles = {"response_lengths": "Responses", "conversation_lengths": "Whole conversations"}
    whole = report["conversation_lengths"]
    over = [[f"over {limit}", f"{100 * share:.2f} %"] for limit, share in (whole.get("share_over") or {}).items()]
    return {
        "histograms": [
            (title, report[key]["unit"], bars("Up to", report[key]["histogram"]))
            for key, title in titles.items()
            if key in report
        ],
        "over": Table([f"Length, {whole['unit']}", "#Share"], over),
    }


def _prompts(report: Data) -> dict[str, Any]:
    figures = report["prompts"]
    rows = [["different prompts", number(figures["train"]), number(figures["val"])]]
    if report.get("held_out_rows_in_train"):
        rows.append(["rows the dataset itself holds out", number(report["held_out_rows_in_train"]), ""])
    rows.append(["of them on both sides", number(figures["in_both"]), number(figures["in_both"])])
    near = figures.get("near")
    if near:
        compared = [number(near[f"{side}_prompts_compared"]) for side in _SIDES]
        rows.append(["compared for near-duplicates", *compared])
        rows.append(["with a near-duplicate in train", "", number(near["val_prompts_with_a_near_twin"])])
    pairs = [[pair["val"], pair["train"]] for pair in near["examples"]] if near else []
    threshold = f"{100 * near['threshold']:.0f}%" if near else None
    return {
        "counts": Table(["", "#train", "#val"], rows),
        "threshold": threshold,
        "pairs": Table(["val", "train"], pairs),
    }


def _suspicious(report: Data) -> Table:
    rows: list[Row] = [
        [_words(reason), number(found["rows"]), Cell(small=", ".join(map(str, found["examples"])))]
        for reason, found in report["suspicious"].items()
    ]
    return Table(["What", "#Rows", "Ids"], rows)


def _pairs(report: Data) -> dict[str, Table]:
    figures = report["pairs"]
    rows: list[Row] = []
    for side in _SIDES:
        one = figures.get(side) or {}
        words, look = ("complete", "reached") if one.get("complete") else ("halves are missing", "missed")
        counts = [number(one.get(role, 0)) for role in ("chosen", "rejected")]
        rows.append([side, *counts, Cell(text=words, look=f"verdict {look}")])
    return {"counts": Table(["", "#Chosen", "#Rejected", ""], rows), "strengths": bars("", figures["strengths"])}


def _raters(report: Data) -> Table:
    rows: list[Row] = [
        [name, number(one["items"]), number(one["ratings"]), number(one["alpha"], 3)]
        for name, one in report["rater_agreement"].items()
    ]
    return Table(["What was rated", "#Things", "#Ratings", "#Alpha"], rows)


_PARTS: Mapping[str, Callable[[Data], Any]] = {
    "read": _read,
    "labels": _labels,
    "label_correlations": _correlations,
    "people_per_label": lambda report: bars("", report["people_per_label"]),
    "rater_agreement": _raters,
    "pairs": _pairs,
    "conversation_lengths": _lengths,
    "prompts": _prompts,
    "suspicious": _suspicious,
    "datasets": lambda report: bars("", report["datasets"]),
    "languages": lambda report: bars("", report["languages"]),
}


def _words(name: str) -> str:
    return name.replace("_", " ")
