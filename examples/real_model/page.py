"""The result page of `make real-model`: what the policies do that they are asked for, and what is not reached.

    python examples/real_model/page.py outputs/real-model

Reads what the steps left in their folders; a part that is not there has no section. Fills the folder page:
report.html, report.json and the pictures.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nemo_steerlm.agreement import Floats
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation
from nemo_steerlm.evaluate.metrics import json_ready
from nemo_steerlm.evaluate.steerability import Request, describe_answers, setting_costs, steerability
from nemo_steerlm.provenance import versions
from nemo_steerlm.report.canvas import DARK, LIGHT, Theme, both_themes, new_figure
from nemo_steerlm.report.page import picture, render, table, with_interval, write_folder
from nemo_steerlm.report.pictures import draw
from nemo_steerlm.report.tables import number, text_table
from nemo_steerlm.verbs.evaluate_steerability import read_answers

SCALES = {"verbosity": "words", "grade": "school grade", "positivity": "sentiment", "quality": "predicted quality"}
FROM_DATA = ("quality", "toxicity", "humor", "creativity", "helpfulness")
PARTS = {"regressor": "regressor.json", "bootstrap": "bootstrap/report.json", "trainer": "trainer/steering.json"}
WORTH = "val/label_information"
BAR = 0.8
SHOWN = 20

Figures = dict[str, Any]


def main(folder: Path) -> None:
    """Write the page."""
    schema = AttributeSchema.load(str(folder / "steered.yaml"))
    found = collect(folder, schema)
    found["bars"] = check(found)
    figures = json_ready(found)
    drawn = json_ready(found["default"]) | {"attributes": schema.to_dict(), "scales": SCALES}
    light, dark = draw(drawn, {}, LIGHT), draw(drawn, {}, DARK)
    pictures = {name: (light[name], dark[name]) for name in light}
    pictures |= both_themes({"learning": partial(draw_learning, found["curve"])})
    write_folder(folder / "page", page(found, pictures), figures, pictures)
    rows = [
        [one["measure"], number(one["value"]), one["bar"], "reached" if one["reached"] else "not reached"]
        for one in found["bars"]
    ]
    told = text_table(rows, ["measure", "value", "bar", "result"])
    sys.stdout.write(f"{told}\n\npage: {folder / 'page' / 'report.html'}\n")


# -- what there is ----------------------------------------------------------------------------------------------------


def collect(folder: Path, schema: AttributeSchema) -> Figures:
    """All figures of the run."""
    policies = sorted(folder.glob("steering-policy-*/answers.jsonl"))
    found: Figures = {"seeds": len(policies), "attributes": schema.to_dict(), "versions": versions()}
    for way in ("default", "all"):
        found[way] = pooled([read_answers(path, way) for path in policies], schema)
    each = [read_answers(path, "default") for path in policies]
    found["each"] = [pooled([one], schema)["steerability"] for one in each]
    found["default"]["costs"] = costs_of(each, schema)
    found["listening"] = [load(path.parent / "report.json")["listening"] for path in policies]
    found["answers"] = default_answers(*each[0], schema)
    found["curve"] = [grown(folder, path.parent.name.removeprefix("steering-policy-")) for path in policies]
    for name, path in PARTS.items():
        if (folder / path).is_file():
            found[name] = load(folder / path)
    return found


def grown(folder: Path, seed: str) -> dict[int, float]:
    """What labels were worth at the validations of a policy's training, by the number of answers seen."""
    run = folder / f"policy-{seed}"
    size = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["global_batch_size"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {int(one["step"]) * size: one[WORTH] for one in lines if WORTH in one}


def load(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text())


Answers = tuple[list[Request], list[Conversation]]


def pooled(answers: Sequence[Answers], schema: AttributeSchema) -> Figures:
    """Requested against measured over the policies of all seeds; the intervals resample the prompts."""
    requests = [request for one, _ in answers for request in one]
    rows = [row for _, one in answers for row in one]
    texts, prompts = [row.turns[-1].text for row in rows], len({request.prompt for request in requests})
    names = [name for name in rows[0].extra["measured"] if name in schema or name in FROM_DATA]
    columns = {name: measured(rows, name) for name in names}
    found = steerability(requests, columns, schema, seed=0, answers=texts)
    return found | {"prompts": prompts, "answers": len(texts), "empty": describe_answers(texts)["empty"]}


def measured(rows: Sequence[Conversation], name: str) -> Floats:
    """One score of all answers, NaN where there is none."""
    return np.array([row.extra["measured"].get(name) for row in rows], np.float64)


def costs_of(answers: Sequence[Answers], schema: AttributeSchema) -> dict[str, Any]:
    """Change of the regressor's quality against the defaults, each policy's prompt against itself."""
    requests, values = [], []
    for place, (asked, rows) in enumerate(answers):
        prompts = len({request.prompt for request in asked})
        requests += [dataclasses.replace(one, prompt=place * prompts + one.prompt) for one in asked]
        values.append(measured(rows, "quality"))
    return setting_costs(requests, np.concatenate(values), schema, seed=0)


def default_answers(
    requests: Sequence[Request], rows: Sequence[Conversation], schema: AttributeSchema
) -> list[dict[str, str]]:
    """What the first policy answers where every attribute is at its default."""
    asked = {row.turns[-2].text: row for one, row in zip(requests, rows) if one.values == schema.defaults()}
    return [{"prompt": prompt, "answer": row.turns[-1].text} for prompt, row in list(asked.items())[:SHOWN]]


# -- the bars ---------------------------------------------------------------------------------------------------------


def check(found: Figures) -> list[Figures]:
    """What was to be reached, and whether it was."""
    steered = found["default"]["steerability"]
    lines = []
    for name in ("verbosity", "grade", best_of_the_data(steered)):
        if name in steered:
            one = steered[name]
            reached = one["spearman"] >= BAR and one["interval"][0] > 0
            lines.append(bar(f"{name}: requested against measured, Spearman", one["spearman"], f">= {BAR}", reached))
    if "regressor" in found:
        rows = found["regressor"].values()
        better = sum(one["pearson"] > max(one["words"], one["length"]) for one in rows)
        lines.append(bar("attributes where the regressor is above words and length", better, ">= 5", better >= 5))
    return lines


def best_of_the_data(steered: Mapping[str, Figures]) -> str | None:
    """The attribute of the data that follows its request best."""
    return max((n for n in steered if n in FROM_DATA), key=lambda n: steered[n]["spearman"], default=None)


def bar(measure: str, value: float, bound: str, reached: bool) -> Figures:
    """A line of the table."""
    return {"measure": measure, "value": value, "bar": bound, "reached": reached}


# -- the page ---------------------------------------------------------------------------------------------------------

Section = tuple[str, str, str]  # anchor, title, body


def page(found: Figures, pictures: Mapping[str, tuple[bytes, bytes]]) -> str:
    """The page as HTML."""
    makers = (bars, steering, costs, listening, regressor, bootstrap, trainer, cross_talk, answers)
    parts = [part for part in (make(found, pictures) for make in makers) if part]
    lead = (
        "SmolLM2-135M-Instruct, steered by attributes: the four steps on real text, on two CPU cores. Everything was "
        "chosen on prompts for development; this is measured on prompts of held-out OASST trees."
    )
    return render("SteerLM on a real chat model", lead, parts)


def bars(found: Figures, _: Any) -> Section:
    """What was to be reached."""
    rows = [
        [escape(one["measure"]), number(one["value"]), escape(one["bar"]), "yes" if one["reached"] else "<b>no</b>"]
        for one in found["bars"]
    ]
    return "bars", "What was to be reached", table(["Measure", "#Value", "#Bar", "Reached"], rows)


def steering(found: Figures, pictures: Any) -> Section:
    """Requested against measured."""
    asked, together = found["default"], found["all"]["steerability"]
    rows = [
        [
            escape(name), escape(SCALES[name]), with_interval(one, "spearman"),
            "&ensp;".join(number(each[name]["spearman"], 2) for each in found["each"]), number(one["per_prompt"]),
            with_interval(together.get(name) or {}, "spearman"),
            "&ensp;".join(number(point["mean"], 2) for point in one["curve"]),
        ]
        for name, one in asked["steerability"].items()
    ]  # fmt: skip
    heads = ["Attribute", "Measured by", "#Spearman", "#Each seed", "#Within a prompt", "#All at random levels"]
    heads += ["#Mean at each level"]
    text = (
        f"<p>Policies: {found['seeds']}, one a seed; prompts: {asked['prompts']}; answers, drawn among 50 tokens: "
        f"{asked['answers']:,}, {asked['empty']} of them empty. Each attribute is asked for at each level, the "
        "others at their default. Spearman is over single answers, intervals resample the prompts.</p>"
    )
    drawn = picture("measured value at each requested level of each attribute", pictures.get("steerability"))
    return "steering", "Requested against measured", text + drawn + table(heads, rows)


def costs(_: Figures, pictures: Any) -> Section | None:
    """What each setting costs in quality."""
    if "costs" not in pictures:
        return None
    text = "<p>How far the regressor's quality moves when one attribute leaves its default, prompt by prompt.</p>"
    return "costs", "What a setting costs", text + picture("change of quality at each level", pictures["costs"])


def draw_learning(curves: Sequence[Mapping[int, float]], theme: Theme) -> Any:
    """What labels are worth to the policy of each seed, by the answers it was trained on."""
    figure = new_figure(6.8, 3.2)
    axis = figure.subplots()
    colours = (theme.blue, theme.orange, theme.green, theme.pink)
    for seed, curve in enumerate(curves, start=1):
        colour, mark = colours[(seed - 1) % len(colours)], "osDv"[(seed - 1) % 4]
        axis.plot(list(curve), list(curve.values()), f"-{mark}", color=colour, markersize=5, label=f"seed {seed}")
    axis.set(xlabel="answers seen", ylabel="nats an answer")
    axis.set_ylim(bottom=min(0.0, *axis.get_ylim()))
    axis.legend(loc="upper left")
    return figure


def listening(found: Figures, pictures: Any) -> Section:
    """What labels are worth, and how that grew."""
    rows = [
        [f"seed {seed}", *(with_interval(one[shown], "gain", sign=True) for shown in ("permuted", "none"))]
        for seed, one in enumerate(found["listening"], start=1)
    ]
    steps = {step: values for one in found["curve"] for step, values in one.items()}
    grown = [[f"{step:,}", *(number(one.get(step), 2) for one in found["curve"])] for step in steps]
    text = "<p>How much less likely held-out answers are under other answers' labels, and under none, in nats.</p>"
    body = table(["Policy", "#Labels of others", "#No labels"], rows) + "<h3>While it was trained</h3>"
    body += picture("what labels are worth by answers seen, a line for each seed", pictures.get("learning"))
    heads = ["Answers seen", *(f"#Seed {seed}" for seed in range(1, len(found["curve"]) + 1))]
    return "listening", "What labels are worth to the policies", text + body + table(heads, grown)


def regressor(found: Figures, _: Any) -> Section | None:
    """The regressor beside its baselines."""
    if "regressor" not in found:
        return None
    rows = [
        [escape(name), with_interval(one, "pearson"), number(one["words"]), number(one["length"])]
        for name, one in found["regressor"].items()
    ]
    text = "<p>Pearson correlation with human labels and with what a library measures, on held-out trees.</p>"
    return "regressor", "The regressor", text + table(["Attribute", "#Regressor", "#TF-IDF", "#Length"], rows)


def bootstrap(found: Figures, _: Any) -> Section | None:
    """What step 4 changed."""
    if "bootstrap" not in found:
        return None
    kept = found["bootstrap"]["rounds"][-1]["kept"]
    rows = [
        [escape(name), with_interval(one, "gain", sign=True)] for name, one in found["bootstrap"]["attributes"].items()
    ]
    text = (
        f"<p>Policy 1 went on with {kept:,} of its own answers, the best ones of each prompt for development by their "
        "predicted quality. Change of what the regressor predicts for its answers on held-out trees.</p>"
    )
    return "bootstrap", "What the bootstrap changed", text + table(["Predicted", "#Change"], rows)


def trainer(found: Figures, _: Any) -> Section | None:
    """The same training by transformers."""
    if "trainer" not in found:
        return None
    ours, theirs = found["each"][0], found["trainer"]["steerability"]
    rows = [[escape(name), *(with_interval(one[name], "spearman") for one in (ours, theirs))] for name in theirs]
    text = (
        "<p>The same start, rows, template, rate, batch, adapters and steps with transformers' Trainer and PEFT, "
        "answered by transformers. Trainer has one rate for the adapters and the embeddings of attribute tokens; the "
        "policy's embeddings are 75 times as fast, in units of a typical one.</p>"
    )
    return "trainer", "Beside transformers' Trainer", text + table(["Attribute", "#Policy, seed 1", "#Trainer"], rows)


def cross_talk(found: Figures, pictures: Any) -> Section:
    """What else moves."""
    text = "<p>Rank correlation of what is asked of one attribute (row) with what is measured of another (column).</p>"
    return "cross_talk", "What else moves", text + picture("cross-talk", pictures.get("cross_talk"))


def answers(found: Figures, _: Any) -> Section:
    """Answers to read."""
    said = "".join(f"<h3>{escape(one['prompt'])}</h3><p>{escape(one['answer'])}</p>" for one in found["answers"])
    return "answers", f"{len(found['answers'])} answers at the default", said


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
