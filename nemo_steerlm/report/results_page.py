"""Writes results as report.json, as pictures, and as one self-contained page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_steerlm.evaluate.metrics import json_ready
from nemo_steerlm.evaluate.reports import BootstrapReport, Results, Sample
from nemo_steerlm.evaluate.steerability import mean_spearman
from nemo_steerlm.report import steering_page
from nemo_steerlm.report.bars import bar_rows, check_bars
from nemo_steerlm.report.page import Cell, Commands, Row, Table, render, settings_part, with_interval, write_folder
from nemo_steerlm.report.pictures import PREFERENCE_SCORES, draw
from nemo_steerlm.report.tables import duration, number
from nemo_steerlm.report.training import training_table


def write_report(folder: str | Path, data: Results, commands: Commands | None = None) -> Results:
    """Writes report.html, report.json and one PNG a picture into `folder`.

    Args:
        folder: where to.
        data: any float may be NaN, which becomes null in report.json.
        commands: for the foot of the page.

    Returns:
        The content of report.json: all of the data but `samples` and `arrays`.

    Raises:
        OSError: the folder cannot be written.
    """
    arrays, samples = data.get("arrays") or {}, json_ready(data.get("samples") or [])
    figures: Results = json_ready({key: one for key, one in data.items() if key not in ("arrays", "samples")})
    figures.setdefault("bars", json_ready(check_bars(figures)))
    parts = {key: part(figures) for key, part in _PARTS.items() if figures.get(key)}
    if samples:
        parts["samples"] = _samples(samples, figures.get("attributes", {}))
    if arrays.get("trainings"):
        parts["trainings"] = training_table(arrays["trainings"])
    pictures = draw(figures, arrays)
    write_folder(folder, render("results.html.j2", figures, parts, pictures, commands), figures, pictures)
    return figures


# One function a section: plain data for the macro of the same name in results.html.j2.


def _bars(data: Results) -> Table:
    looks = {True: "reached", False: "missed", None: "open"}
    rows: list[Row] = []
    for line, (name, value, wanted, word) in zip(data["bars"], bar_rows(data["bars"])):
        verdict = Cell(text=word, look=f"verdict {looks[line['reached']]}")
        rows.append([Cell(text=name, small=line["detail"]), value, wanted, verdict])
    return Table(["Measure", "#Value", "#Bar", "Result"], rows)


def _regressor(data: Results) -> Table:
    head = ["Attribute", "#Pearson", "#Spearman", "#MAE", "#Quadratic kappa", "#n"]
    keys = ("pearson", "spearman", "mae", "kappa", "n")
    human = any(one.get("human") for one in data["regressor"].values())
    if human:
        head += ["#Human labels: Pearson", "#MAE", "#Quadratic kappa"]
    rows = []
    for name, one in data["regressor"].items():
        row = [name] + [number(one.get(key)) for key in keys]
        if human:
            row += [number((one.get("human") or {}).get(key)) for key in ("pearson", "mae", "kappa")]
        rows.append(row)
    return Table(head, rows)


def _requests(data: Results) -> Table:
    rows: list[Row] = [
        [one["asked"], number(one.get("spearman")), f"{one['empty']} of {one['n']}", number(one["distinct_2"])]
        for one in data["requests"]
    ]
    return Table(["Asked for", "#Spearman", "#Empty answers", "#Distinct-2"], rows)


def _label_source(data: Results) -> Table:
    order = [source for source in ("none", "permuted", "human", "predicted") if source in data["label_source"]]
    sources = {source: data["label_source"][source] for source in order}
    rows: list[Row] = [
        [name, *(with_interval(figures.get(name) or {}, "spearman") for figures in sources.values())]
        for name in next(iter(sources.values()))
    ]
    rows.append(["mean", *(number(mean_spearman(figures)) for figures in sources.values())])
    return Table(["Attribute", *(f"#{source.capitalize()}" for source in sources)], rows)


def _bootstrap(data: Results) -> dict[str, Any]:
    step = data["bootstrap"]
    facts = [
        f"{key.replace('_', ' ')} {number(one) if isinstance(one, (int, float)) else one}"
        for key, one in step.items()
        if isinstance(one, (int, float, str)) and key not in ("gain", "n")
    ]
    return {"facts": "; ".join(facts).capitalize(), "change": change_table(step)}


def change_table(step: BootstrapReport) -> Table:
    """The change by step 4, and by the control arm if there is one: all targets together, and each attribute."""
    arms = {"Step 4": step, "Control arm": step.get("control")}
    there = {title: {"together": arm, **(arm.get("attributes") or {})} for title, arm in arms.items() if arm}
    rows: list[Row] = [
        [name, *(with_interval(arm.get(name) or {}, "gain", sign=True) for arm in there.values())]
        for name in there["Step 4"]
    ]
    return Table(["Attribute", *(f"#{title}" for title in there)], rows)


def _preference(data: Results) -> Table:
    found = data["preference"]["rows"]
    scores = {key: title for key, title in PREFERENCE_SCORES.items() if key in found[0]}
    rows: list[Row] = []
    for row in found:
        name = Cell(text=row["name"], look="part" if row["level"] == "subset" else "")
        cells = [with_interval(row[key], "accuracy") for key in scores]
        rows.append([name, *cells, number(row["n"]), number(row["model"]["ties"]), number(row["model"]["strict"])])
    titles = (f"#{title[0].upper()}{title[1:]}" for title in scores.values())
    return Table(["", *titles, "#n", "#Ties", "#Strict"], rows)


def _seconds(data: Results) -> Table:
    steps = {name: one for name, one in data["seconds"].items() if name != "total" and one is not None}
    longest = max(steps.values(), default=1) or 1
    rows: list[Row] = [
        [name.replace("_", " "), duration(one), Cell(look="bar", share=round(100 * one / longest, 1))]
        for name, one in steps.items()
    ]
    if data["seconds"].get("total") is not None:
        rows.append(["total", duration(data["seconds"]["total"]), ""])
    return Table(["Step", "#Time", "|"], rows)


_PARTS: Mapping[str, Callable[[Results], Any]] = {
    "bars": _bars,
    "regressor": _regressor,
    "listening": steering_page.listening,
    "steerability": steering_page.steerability,
    "ways": steering_page.ways,
    "requests": _requests,
    "cross_talk": steering_page.cross_talk,
    "costs": steering_page.costs,
    "label_source": _label_source,
    "bootstrap": _bootstrap,
    "preference": _preference,
    "seconds": _seconds,
    "settings": settings_part,
}


def _samples(samples: Sequence[Sample], schema: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Consecutive answers, grouped by prompt."""
    groups: list[dict[str, Any]] = []
    for sample in samples:
        if not groups or groups[-1]["prompt"] != sample["prompt"]:
            groups.append({"prompt": sample["prompt"], "answers": []})
        asked = asked_levels(sample["requested"], sample.get("measured"), schema)
        groups[-1]["answers"].append({"asked": asked, "text": sample["response"]})
    return groups


def asked_levels(
    requested: Mapping[str, Any], measured: Mapping[str, Any] | None, schema: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Requested and measured levels of an answer, and whether the request differs from the attribute's default."""
    return [
        {
            "name": name,
            "level": number(int(level) if isinstance(level, float) and level.is_integer() else level, 1),
            "measured": number(measured.get(name), 1) if measured else None,
            "turned": name in schema and level != schema[name]["default"],
        }
        for name, level in requested.items()
    ]
