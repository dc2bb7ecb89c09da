"""`report.html` of a bootstrap: the change, the answers before and after side by side, the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_steerlm.conversation import Conversation
from nemo_steerlm.evaluate.metrics import json_ready
from nemo_steerlm.evaluate.reports import BootstrapReport
from nemo_steerlm.report.page import Commands, Table, render, settings_part, write_folder
from nemo_steerlm.report.pictures import draw
from nemo_steerlm.report.results_page import asked_levels, change_table
from nemo_steerlm.report.tables import number
from nemo_steerlm.report.training import Losses, training_table

_SHOWN = 10  # prompts whose answers are shown
_WORDS = {"overlong": "prompt too long", "unjudged": "not scored"}  # of counts whose keys are older


def write_report(
    folder: str | Path,
    change: BootstrapReport,
    about: Mapping[str, Any],
    answers: tuple[Sequence[Conversation], Sequence[Conversation]],
    trainings: Mapping[str, Losses],
    commands: Commands | None = None,
) -> None:
    """Write report.html, report.json and the pictures.

    Args:
        folder: where to.
        change: the content of report.json.
        about: `policy`, `target` (names), `attributes` (the schema's dict), `settings`, `seed`, `versions`.
        answers: to the same prompts before and after, by id, with their measured values in `label_predicted`.
        trainings: their losses by name.
        commands: for the foot of the page.

    Raises:
        OSError: the folder cannot be written.
    """
    report: BootstrapReport = json_ready(change)
    parts = {
        "change": change_table(report),
        "answers": _answers(*answers, about["attributes"], about["target"]),
        "rounds": _rounds(report["rounds"]),
        "trainings": training_table(trainings),
        "settings": settings_part(about),
    }
    pictures = draw({"bootstrap": report}, {"trainings": trainings})
    html = render("bootstrap.html.j2", {**about, **report}, parts, pictures, commands)
    write_folder(folder, html, report, pictures)


def _answers(
    before: Sequence[Conversation], after: Sequence[Conversation], schema: Mapping[str, Any], target: Sequence[str]
) -> list[dict[str, Any]]:
    """The first prompts that both policies answered, with both answers."""
    later = {row.id: row for row in after}
    both = [(row, later[row.id]) for row in before if row.id in later]
    return [
        {
            "prompt": row.turns[-2].text,
            "asked": asked_levels(row.extra.get("requested") or {}, None, schema),
            "sides": [
                {"title": title, "text": one.turns[-1].text, "measured": _measured(one, target)}
                for title, one in (("Before", row), ("After", other))
            ],
        }
        for row, other in both[:_SHOWN]
    ]


def _measured(row: Conversation, target: Sequence[str]) -> list[tuple[str, str]]:
    values = row.turns[-1].label_predicted or {}
    return [(name, number(values.get(name), 2)) for name in target]


def _rounds(rounds: Sequence[Mapping[str, Any]]) -> Table:
    """Counts of answers that each round sampled, left out and kept."""
    names = list(dict.fromkeys(name for one in rounds for name in one))
    rows = [
        [_WORDS.get(name, name.replace("_", " ")), *(number(one.get(name), 2) for one in rounds)] for name in names
    ]
    return Table(["Answers", *(f"#Round {place}" for place in range(1, len(rounds) + 1))], rows)
