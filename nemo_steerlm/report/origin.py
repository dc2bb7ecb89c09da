"""Where a model comes from and how good it is: what run.json and the reports around its folder say."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_steerlm import hub
from nemo_steerlm.errors import DataError
from nemo_steerlm.provenance import read_run_json, sha256_file
from nemo_steerlm.report.tables import interval, number

_LONGEST = 20  # steps from a model back to its base
_LICENSE = ("license", "license_name", "license_link")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One table of figures: what was measured, its headings and its rows."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What is known about a model.

    Attributes:
        base: the weights it began with: a name on the hub, the last part of a path, or None for random weights.
        commit: of the base, where it is of the hub.
        license: `license`, `license_name` and `license_link` of the base's README.md, as far as it has them.
        runs: contents of run.json, from the first step on the base to the last.
        figures: from the reports of this model.
    """

    base: str | None
    commit: str | None
    license: Mapping[str, Any]
    runs: Sequence[Mapping[str, Any]]
    figures: Sequence[Figures]


def origin(folder: Path) -> Origin:
    """What the files around a model folder tell about it; without them, its name alone."""
    runs, base = _history(str(folder))
    pinned = hub.split(base or "")
    name = None if base is None else pinned[0] if pinned else Path(base).name
    return Origin(
        base=name, commit=pinned[1] if pinned else None, license=_license(base), runs=runs[::-1],
        figures=[table for report in _reports(folder) for table in _figures(report)],
    )  # fmt: skip


def _history(model: str) -> tuple[list[dict[str, Any]], str | None]:
    """The steps that made a model, the last one first, and what the first of them began with."""
    runs: list[dict[str, Any]] = []
    found: str | None = model
    while found is not None and len(runs) < _LONGEST:
        path = Path(found)
        run = _run(path) or (_run(path.parent) if path.name == "model" else None)
        if run is None:
            break
        runs.append(run)
        config = run["config"]
        key = {"import": "input", "export": "checkpoint", "bootstrap": "policy"}.get(run["verb"])
        found = config[key] if key else config["model"]["init"]
    return runs, None if found is None else hub.named(found)


def _run(folder: Path) -> dict[str, Any] | None:
    try:
        run = read_run_json(folder)
        known = run["verb"] in ("import", "export", "bootstrap", "train-regressor", "train-sft")
    except (DataError, OSError, KeyError, TypeError):
        return None
    return run if known else None


def _license(base: str | None) -> dict[str, Any]:
    """The license in the front matter of a base's README.md."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.repocard import metadata_load

    pinned = hub.split(base or "")
    readme: Any = Path(base or "") / "README.md"
    if pinned:
        readme = try_to_load_from_cache(pinned[0], "README.md", revision=pinned[1])
    try:
        front = metadata_load(readme) if isinstance(readme, (str, Path)) and Path(readme).is_file() else None
    except (OSError, ValueError):  # yaml's errors too, in huggingface_hub
        return {}
    return {key: front[key] for key in _LICENSE if isinstance(front.get(key), str)} if front else {}


def _reports(folder: Path) -> Iterator[dict[str, Any]]:
    """The reports about this model in its run folder and in the folders beside that."""
    run = folder.parent
    if folder.name != "model":
        return
    files = {*run.rglob("report.json"), *run.parent.glob("*/report.json")}
    reports = [_json(file) for file in sorted(files, key=lambda file: (len(file.parts), file))]
    mine = [report for report in reports if _checkpoint(report) == folder.resolve()]
    yield from mine
    steering, sums = _json(run / "steering.json"), folder / "SHA256SUMS"
    if not any("listening" in report for report in mine) and sums.is_file():
        if steering.get("model") == sha256_file(sums):
            yield steering
    change = _json(run / "report.json")
    if "rounds" in change and "gain" in change:
        yield change


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _checkpoint(report: Mapping[str, Any]) -> Path | None:
    settings = report.get("settings")
    found = settings.get("checkpoint") if isinstance(settings, dict) else None
    return Path(found).resolve() if isinstance(found, str) else None


def _figures(report: Mapping[str, Any]) -> Iterator[Figures]:
    """The main tables of one report."""
    data = Path(str(report.get("settings", {}).get("input"))).name
    for name, one in report.get("datasets", {}).items():
        rows = [
            [key, str(of["n"]), number(of["pearson"]), interval(of.get("interval", {}).get("pearson")),
             number(of["spearman"]), number(of["mae"])]
            for key, of in one["attributes"].items()
        ]  # fmt: skip
        heads = ["attribute", "n", "Pearson", "95% interval", "Spearman", "mean absolute error"]
        yield Figures(title=f"Agreement with the labels of {name} ({data})", headings=heads, rows=rows)
    if "preference" in report:
        rows = [
            [row["name"], str(row["n"]), number(row["model"]["accuracy"]), interval(row["model"]["interval"])]
            for row in report["preference"]["rows"]
        ]
        title = f"Preferences ({data}): share of pairs whose chosen answer gets the higher score"
        yield Figures(title=title, headings=["", "n", "accuracy", "95% interval"], rows=rows)
    if report.get("listening"):
        yield Figures(title="Labels", headings=["labels are worth, nats a response", "95% interval", "n"], rows=[
            [number(one["gain"], sign=True), interval(one["interval"]), str(one["n"])]
            for one in [report["listening"]["permuted"]]
        ])  # fmt: skip
    if report.get("steerability"):
        rows = [
            [name, number(one["spearman"]), interval(one["interval"]),
             f"{number(one['reached'][0], 2)} to {number(one['reached'][1], 2)}", str(one["n"])]
            for name, one in report["steerability"].items()
        ]  # fmt: skip
        heads = ["attribute", "rank correlation asked/measured", "95% interval", "means reached", "n"]
        measures = ", ".join("/".join(Path(one).parts[-2:]) for one in str(report.get("measured_by")).split(", "))
        yield Figures(title=f"Steering, measured by {measures}", headings=heads, rows=rows)
    if "rounds" in report:
        rows = [
            [name, number(one["gain"], sign=True), interval(one["interval"], sign=True), str(one["n"])]
            for name, one in report["attributes"].items()
        ]
        title = "Change by bootstrapping, on held-out prompts as the regressor scores them"
        yield Figures(title=title, headings=["attribute", "change", "95% interval", "n"], rows=rows)
