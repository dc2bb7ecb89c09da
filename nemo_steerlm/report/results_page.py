"""Writes what was measured as report.json, as pictures, and as one page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nemo_steerlm.evaluate.metrics import json_ready
from nemo_steerlm.evaluate.steerability import mean_spearman
from nemo_steerlm.report import steering_page
from nemo_steerlm.report.bars import bar_rows, check_bars
from nemo_steerlm.report.canvas import DARK, LIGHT
from nemo_steerlm.report.page import picture, render, settings_section, table, with_interval, write_folder
from nemo_steerlm.report.pictures import PREFERENCE_SCORES, draw
from nemo_steerlm.report.tables import number

Data = Mapping[str, Any]


def write_report(folder: str | Path, data: Data) -> dict[str, Any]:
    """Writes report.html, report.json and one PNG a picture into `folder`.

    Every part is optional; a part that is absent or empty has no section. NaN may stand wherever a float does.

        title, summary   text at the top of the page
        attributes       AttributeSchema.to_dict(): order, ranges
        regressor        {NAME: {pearson, spearman, mae, mse, kappa, accuracy, n, human}} as `attribute_metrics`
                         returns it; human = the same for the human labels, may be absent
        verdict          as `steerability.verdict` returns it
        listening        {rows, loss, permuted, none, attributes: {NAME: ...}} as `label_information` returns them
        measured_by      what measured the answers; "the oracle" when absent
        scales           {NAME: the score that stands for it, where that has another scale}
        steerability     {NAME: ...} as `steerability` returns it
        ways             {way of asking: steerability}, of `steerability.WAYS`
        costs, quality   as `steerability.setting_costs` returns it, and the score it is of
        requests         [{asked, n, empty, distinct_2, spearman}]: one row for each way of asking, as
                         `describe_answers` returns it; spearman may be absent
        cross_talk, cross_talk_rank   {REQUESTED: {MEASURED: slope or rank correlation}}, as `steerability` has them
        label_source     {none | permuted | human | predicted: {NAME: {spearman, interval, ...}}}
        bootstrap        {gain, interval, attributes: {NAME: {gain, interval}}, control: {the same}}; what else it
                         holds on its first level (rounds, sampled, kept, ...) is shown in a line
        preference       {rows: [{name, level, n, model | longer | tfidf: {accuracy, interval, ties, strict}}],
                         notes: [text]}
        seconds          {STEP: seconds, ..., total: seconds}
        settings         nested dict; seed: int; versions: {package: version}
        bars             as `check_bars` returns them; worked out when absent
        samples          [{prompt, requested: {NAME: level}, response, measured: {NAME: value} or None}]; those of one
                         prompt that follow each other are shown together
        arrays           {regressor: {predicted, target, human or None}}, each [n, K] in the order of `attributes`

    All but `samples` and `arrays` goes into report.json, with null for NaN.

    Returns:
        The content of report.json.

    Raises:
        OSError: the folder cannot be written.
    """
    arrays, samples = data.get("arrays") or {}, json_ready(data.get("samples") or [])
    figures: dict[str, Any] = json_ready({key: data[key] for key in data if key not in ("arrays", "samples")})
    figures.setdefault("bars", json_ready(check_bars(figures)))
    light, dark = draw(figures, arrays, LIGHT), draw(figures, arrays, DARK)
    pictures = {name: (light[name], dark[name]) for name in light}
    write_folder(folder, render_page(figures, samples, pictures), figures, pictures)
    return figures


def render_page(data: Data, samples: Sequence[Mapping[str, Any]], pictures: Mapping[str, tuple[bytes, bytes]]) -> str:
    """Renders the page.

    Args:
        data: content of report.json.
        samples: see `write_report`.
        pictures: PNG bytes for a light and a dark page by name, see `pictures.draw`.
    """
    parts: list[tuple[str, str, str]] = []  # anchor, title, body
    for key, title, body in _SECTIONS:
        if data.get(key):
            before, after = body(data)
            parts.append((key, title, before + picture(_ALT.get(key, ""), pictures.get(key)) + after))
    if samples:
        parts.insert(_before(parts, ("seconds", "settings")), ("samples", "Sample texts", _samples(samples)))
    return render(str(data.get("title") or "SteerLM report"), _lead(data), parts)


def _before(parts: Sequence[tuple[str, str, str]], keys: Sequence[str]) -> int:
    return next((place for place, part in enumerate(parts) if part[0] in keys), len(parts))


def _lead(data: Data) -> str:
    judged = [line["reached"] for line in data["bars"] if line["reached"] is not None]
    facts = [str(data["summary"])] if data.get("summary") else []
    if judged:
        facts.append(f"{sum(judged)} of {len(judged)} bars reached.")
    if data.get("seconds", {}).get("total") is not None:
        facts.append(f"Took {_duration(data['seconds']['total'])}.")
    if data.get("seed") is not None:
        facts.append(f"Seed {data['seed']}.")
    return " ".join(facts)


# One function a section: the text before the picture, and what follows it.


def _bars(data: Data) -> tuple[str, str]:
    looks = {True: "reached", False: "missed", None: "open"}
    rows = []
    for line, (name, value, wanted, word) in zip(data["bars"], bar_rows(data["bars"])):
        detail = f"<small>{escape(line['detail'])}</small>" if line["detail"] else ""
        verdict = f'<span class="verdict {looks[line["reached"]]}">{word}</span>'
        rows.append([f"{escape(name)}{detail}", escape(value), escape(wanted), verdict])
    text = "<p>The bars were fixed before the run; each line shows the attribute that decided it.</p>"
    return text, table(["Measure", "#Value", "#Bar", "Result"], rows)


def _regressor(data: Data) -> tuple[str, str]:
    head = ["Attribute", "#Pearson", "#Spearman", "#MAE", "#Quadratic kappa", "#n"]
    keys = ("pearson", "spearman", "mae", "kappa", "n")
    human = any(one.get("human") for one in data["regressor"].values())
    if human:
        head += ["#Human labels: Pearson", "#MAE", "#Quadratic kappa"]
    rows = []
    for name, one in data["regressor"].items():
        row = [escape(name)] + [number(one.get(key)) for key in keys]
        if human:
            row += [number((one.get("human") or {}).get(key)) for key in ("pearson", "mae", "kappa")]
        rows.append(row)
    text = (
        "<p>The regressor scores responses it was not trained on; the oracle knows the true values. A dot is one "
        "response, the line through round marks the mean score at each true level, the dashed diagonal perfect "
        "agreement.</p>"
    )
    return text, table(head, rows)


def _requests(data: Data) -> tuple[str, str]:
    rows = [
        [escape(one["asked"]), number(one.get("spearman")), f"{one['empty']} of {one['n']}", number(one["distinct_2"])]
        for one in data["requests"]
    ]
    text = (
        "<p>A user may ask for every attribute, for one, or for none. Spearman is the mean over the attributes; "
        "distinct-2 is the share of an answer's word pairs that are not repeated in it, 1 without any repetition.</p>"
    )
    return text, table(["Asked for", "#Spearman", "#Empty answers", "#Distinct-2"], rows)


def _label_source(data: Data) -> tuple[str, str]:
    order = [source for source in ("none", "permuted", "human", "predicted") if source in data["label_source"]]
    sources = {source: data["label_source"][source] for source in order}
    rows = []
    for name in next(iter(sources.values())):
        rows.append(
            [escape(name), *(with_interval(figures.get(name) or {}, "spearman") for figures in sources.values())]
        )
    rows.append(["mean", *(number(mean_spearman(figures)) for figures in sources.values())])
    text = (
        "<p>The same policy trained with the same steps on the same responses, only the labels differ: none at all, "
        "the noisy labels of the simulated annotators, or the regressor's. Figures are per-sample Spearman.</p>"
    )
    return text, table(["Attribute", *(f"#{source.capitalize()}" for source in sources)], rows)


def _bootstrap(data: Data) -> tuple[str, str]:
    step = data["bootstrap"]
    control = step.get("control") or {}
    rows = [["together", with_interval(step, "gain", sign=True), with_interval(control, "gain", sign=True)]]
    for name, one in (step.get("attributes") or {}).items():
        other = (control.get("attributes") or {}).get(name) or {}
        rows.append([escape(name), with_interval(one, "gain", sign=True), with_interval(other, "gain", sign=True)])
    facts = [
        f"{key.replace('_', ' ')} {number(one) if isinstance(one, (int, float)) else one}"
        for key, one in step.items()
        if isinstance(one, (int, float, str)) and key not in ("gain", "n")
    ]
    text = (
        "<p>The policy answers with the target attributes at their best, the regressor labels the answers, and the "
        "policy trains on with the best of them. The control arm takes as many more steps on the original data. "
        "The figures are changes of the measured values on prompts that neither saw, whatever their sign.</p>"
    )
    if facts:
        text += f"<p>{escape('; '.join(facts).capitalize())}.</p>"
    return text, table(["Attribute", "#Step 4", "#Control arm"], rows)


def _preference(data: Data) -> tuple[str, str]:
    found = data["preference"]
    scores = {key: title for key, title in PREFERENCE_SCORES.items() if key in found["rows"][0]}
    rows = []
    for row in found["rows"]:
        name = f'<span class="part">{escape(row["name"])}</span>' if row["level"] == "subset" else escape(row["name"])
        cells = [with_interval(row[key], "accuracy") for key in scores]
        rows.append([name, *cells, number(row["n"]), number(row["model"]["ties"]), number(row["model"]["strict"])])
    notes = "".join(f"<li>{escape(note)}</li>" for note in found["notes"])
    text = (
        "<p>The share of comparisons in which the preferred answer scores best, with its 95% interval, beside two "
        "baselines that need no model: the longer answer, and the words of the answer.</p>"
    )
    head = ["", *(f"#{title[0].upper()}{title[1:]}" for title in scores.values()), "#n", "#Ties", "#Strict"]
    return text, table(head, rows) + f"<ul>{notes}</ul>"


def _seconds(data: Data) -> tuple[str, str]:
    steps = {name: one for name, one in data["seconds"].items() if name != "total" and one is not None}
    longest = max(steps.values(), default=1) or 1
    rows = []
    for name, one in steps.items():
        track = f'<span class="bar" style="width:{100 * one / longest:.1f}%"></span>'
        rows.append([escape(name.replace("_", " ")), _duration(one), track])
    if data["seconds"].get("total") is not None:
        rows.append(["total", _duration(data["seconds"]["total"]), ""])
    return "", table(["Step", "#Time", "|"], rows)


_SECTIONS: list[tuple[str, str, Callable[[Data], tuple[str, str]]]] = [
    ("bars", "Results", _bars),
    ("regressor", "Regressor against the oracle", _regressor),
    ("listening", "Does it listen?", steering_page.listening),
    ("steerability", "Steering", steering_page.steerability),
    ("ways", "Ways of asking", steering_page.ways),
    ("requests", "What the answers are like", _requests),
    ("cross_talk", "Cross-talk", steering_page.cross_talk),
    ("costs", "What a setting costs", steering_page.costs),
    ("label_source", "What the labels are worth", _label_source),
    ("bootstrap", "Step 4: learning from its own best answers", _bootstrap),
    ("preference", "Preferred answers score best", _preference),
    ("seconds", "Time", _seconds),
    ("settings", "Settings", settings_section),
]


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    groups: list[list[Mapping[str, Any]]] = []
    for sample in samples:
        if groups and groups[-1][0]["prompt"] == sample["prompt"]:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    body = (
        "<p>Beside each text: what was asked → what was measured; bold is what differs between texts of a prompt.</p>"
    )
    for group in groups:
        body += f'<p class="prompt">{escape(str(group[0]["prompt"]))}</p>'
        requests = [sample["requested"] for sample in group]
        turned = {name for name in requests[0] if len({str(request.get(name)) for request in requests}) > 1}
        body += "".join(_sample(sample, turned) for sample in group)
    return body


def _sample(sample: Mapping[str, Any], turned: set[str]) -> str:
    measured = sample.get("measured") or {}
    lines = ""
    for name, level in sample["requested"].items():
        got = f" → {number(measured.get(name), 1)}" if measured else ""
        look = ' class="turned"' if name in turned else ""
        lines += f"<div{look}><dt>{escape(name)}</dt><dd>{_level(level)}{got}</dd></div>"
    answer = escape(str(sample["response"]))
    return f'<div class="sample"><dl class="asked">{lines}</dl><p class="answer">{answer}</p></div>'


def _level(value: Any) -> str:
    return number(int(value) if isinstance(value, float) and value.is_integer() else value, 1)


_ALT = {
    "regressor": "The regressor's scores over the true values, one panel an attribute; figures in the table below",
    "steerability": "Measured over requested levels, one panel an attribute; figures in the table below",
    "listening": "Nats a response lost under other labels, and under none; figures in the table below",
    "costs": "Change of the quality over the requested level, one panel an attribute; the lowest in the table below",
    "cross_talk": "Slopes of the measured attributes for each requested one; figures in report.json",
    "label_source": "Spearman for each attribute and source of labels; figures in the table below",
    "bootstrap": "Gain of step 4 and of the control arm with intervals; figures in the table below",
    "preference": "Accuracy of the regressor and of the baselines with intervals; figures in the table below",
}


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
