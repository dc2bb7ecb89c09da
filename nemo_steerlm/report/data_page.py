"""`report.html` of prepared data, from its `report.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from nemo_steerlm.report.page import render, table
from nemo_steerlm.report.tables import number

Data = Mapping[str, Any]
_SIDES = ("train", "val")


def data_page(report: Data) -> str:
    """Render the page; a part that the report does not have gets no section."""
    parts = [(key, title, body(report)) for key, title, body in _SECTIONS if report.get(key)]
    rows = {side: (report.get(side) or {}).get("conversations", 0) for side in _SIDES}
    lead = f"{rows['train']} conversations to train on, {rows['val']} to validate, from source={report.get('source')}."
    return render("Prepared data", lead, parts)


def _read(report: Data) -> str:
    rows = [[_words(name), number(count), ""] for name, count in report["read"].items()]
    rows += [["dropped", number(count), _words(reason)] for reason, count in report.get("dropped", {}).items()]
    for key, count in report.get("unused_keys", {}).items():
        rows.append(["not in any prompt", number(count), f"turns with the key {escape(key)}"])
    for side in _SIDES:
        kept = report.get(side) or {}
        rows += [[f"kept in {side}", number(count), _words(name)] for name, count in kept.items()]
    if report.get("shared_turns"):
        rows.append(["context only", number(report["shared_turns"]), "turns that an earlier row trains on already"])
    text = "<p>What was read, what was left out and why, and what is in the two files.</p>"
    return text + table(["", "#Count", "Of what, or why"], rows)


def _labels(report: Data) -> str:
    labels = report["labels"]
    values = sorted({int(value) for histogram in labels.values() for value in histogram})
    statistics = report.get("label_statistics") or {}
    rows = []
    for name, histogram in labels.items():
        figures = statistics.get(name) or {}
        most = max(histogram.values(), default=0)
        cells = [_shaded(number(histogram.get(str(value))), histogram.get(str(value), 0), most) for value in values]
        total = number(figures.get("n", sum(histogram.values())))
        rows.append([escape(name), total, number(figures.get("mean"), 2), number(figures.get("std"), 2), *cells])
    text = "<p>How many responses have which value (rounded); an attribute without labels cannot be learnt.</p>"
    return text + table(["Attribute", "#n", "#Mean", "#Deviation", *(f"#{value}" for value in values)], rows)


def _correlations(report: Data) -> str:
    figures = report["label_correlations"]
    names = [name for name, row in figures.items() if any(value is not None for value in row.values())]
    if not names:
        return "<p>No two labels vary together.</p>"
    rows = []
    for name in names:
        values = [figures[name][other] or 0.0 for other in names]
        cells = [_shaded(number(r, 2), abs(r), 1, "accent" if r >= 0 else "bad") for r in values]
        rows.append([escape(name), *cells])
    text = "<p>Pearson's r over the responses that have both labels.</p>"
    return text + table(["", *(f"#{escape(name)}" for name in names)], rows)


def _lengths(report: Data) -> str:
    text = "<p>A bar counts what is longer than the one above it and not longer than its own length.</p>"
    for key, title in (("response_lengths", "Responses"), ("conversation_lengths", "Whole conversations")):
        if key in report:
            figures = report[key]
            text += f"<h3>{title}, {escape(figures['unit'])}</h3>" + _bars("Up to", figures["histogram"])
    over = report["conversation_lengths"].get("share_over") or {}
    rows = [[f"over {limit}", f"{100 * share:.2f} %"] for limit, share in over.items()]
    unit = escape(report["conversation_lengths"]["unit"])
    return text + f"<h3>Over-long conversations</h3>{table([f'Length, {unit}', '#Share'], rows)}"


def _prompts(report: Data) -> str:
    figures = report["prompts"]
    rows = [["different prompts", number(figures["train"]), number(figures["val"])]]
    if report.get("held_out_rows_in_train"):
        rows.append(["rows the dataset itself holds out", number(report["held_out_rows_in_train"]), ""])
    rows.append(["of them on both sides", number(figures["in_both"]), number(figures["in_both"])])
    near = figures.get("near")
    if near is None:
        note = "<p>Near-duplicates were not looked for: <code>pip install 'nemo_steerlm[data]'</code>.</p>"
        return table(["", "#train", "#val"], rows) + note
    rows += [
        ["compared for near-duplicates", number(near["train_prompts_compared"]), number(near["val_prompts_compared"])],
        ["with a near-duplicate in train", "", number(near["val_prompts_with_a_near_twin"])],
    ]
    text = (
        "<p>A prompt is a first turn, case and white space aside. Near-duplicates share at least "
        f"{100 * near['threshold']:.0f}% of their word triples; of many prompts a sample is compared, which "
        "holds near-duplicates together.</p>"
    )
    pairs = [[escape(pair["val"]), escape(pair["train"])] for pair in near["examples"]]
    examples = "<h3>Near-duplicates</h3>" + table(["val", "train"], pairs) if pairs else ""
    return text + table(["", "#train", "#val"], rows) + examples


def _suspicious(report: Data) -> str:
    rows = []
    for reason, figures in report["suspicious"].items():
        names = ", ".join(escape(str(name)) for name in figures["examples"])
        rows.append([_words(reason), number(figures["rows"]), f"<small>{names}</small>"])
    text = "<p>Rows that are kept but deserve a look, with the ids of the first few.</p>"
    return text + table(["What", "#Rows", "Ids"], rows)


def _pairs(report: Data) -> str:
    figures = report["pairs"]
    rows = []
    for side in _SIDES:
        one = figures.get(side) or {}
        complete = '<span class="verdict reached">complete</span>' if one.get("complete") else (
            '<span class="verdict missed">halves are missing</span>'
        )  # fmt: skip
        rows.append([side, number(one.get("chosen", 0)), number(one.get("rejected", 0)), complete])
    return table(["", "#Chosen", "#Rejected", ""], rows) + "<h3>Strength</h3>" + _bars("", figures["strengths"])


def _raters(report: Data) -> str:
    rows = [
        [escape(name), number(one["items"]), number(one["ratings"]), number(one["alpha"], 3)]
        for name, one in report["rater_agreement"].items()
    ]
    text = "<p>Krippendorff's alpha between annotators who rated the same thing: 1 is agreement, 0 is chance.</p>"
    return text + table(["What was rated", "#Things", "#Ratings", "#Alpha"], rows)


def _counts(key: str, text: str) -> Callable[[Data], str]:
    return lambda report: f"<p>{text}</p>" + _bars("", report[key])


_SECTIONS: Sequence[tuple[str, str, Callable[[Data], str]]] = [
    ("read", "In and out", _read),
    ("labels", "Labels", _labels),
    ("label_correlations", "Correlations of the labels", _correlations),
    (
        "people_per_label",
        "Annotators behind a label",
        _counts("people_per_label", "Labels by how many annotators gave them."),
    ),
    ("rater_agreement", "Agreement of the annotators", _raters),
    ("pairs", "Preference pairs", _pairs),
    ("conversation_lengths", "Lengths", _lengths),
    ("prompts", "Prompts and leaks", _prompts),
    ("suspicious", "Rows to look at", _suspicious),
    ("datasets", "Datasets", _counts("datasets", "Conversations by dataset.")),
    ("languages", "Languages", _counts("languages", "Conversations by the language that the dataset tells.")),
]


def _bars(title: str, counts: Mapping[str, int]) -> str:
    most = max(counts.values(), default=0) or 1
    rows = []
    for name, count in counts.items():
        bar = f'<span class="bar" style="width:{100 * count / most:.1f}%"></span>'
        rows.append([escape(name), number(count), bar])
    return table([title, "#Count", "|"], rows)


def _shaded(text: str, value: float, most: float, colour: str = "accent") -> str:
    share = 45 * value / most if most else 0
    style = f"background:color-mix(in srgb, var(--{colour}) {share:.0f}%, transparent)"
    return f'<span style="{style};padding:0.15rem 0.45rem;border-radius:4px">{text}</span>'


def _words(name: str) -> str:
    return escape(name.replace("_", " "))
