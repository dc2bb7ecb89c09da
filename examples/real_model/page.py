"""The page of `make real-model`: how far policies follow requests, beside the bars set before the run.

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
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nemo_steerlm.agreement import Floats
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import GenerateConfig
from nemo_steerlm.config.command import command
from nemo_steerlm.conversation import Conversation
from nemo_steerlm.evaluate.metrics import json_ready
from nemo_steerlm.evaluate.steerability import Request, describe_answers, setting_costs, steerability
from nemo_steerlm.provenance import versions
from nemo_steerlm.report.canvas import Theme, both_themes, new_figure
from nemo_steerlm.report.page import Cell, Commands, Table, render, with_interval, write_folder
from nemo_steerlm.report.pictures import draw
from nemo_steerlm.report.steering_page import costs, cross_talk
from nemo_steerlm.report.tables import number, text_table
from nemo_steerlm.report.training import losses, training_table
from nemo_steerlm.verbs.evaluate_steerability import read_answers

SCALES = {"verbosity": "words", "grade": "school grade", "positivity": "sentiment", "quality": "predicted quality"}
FROM_DATA = ("quality", "toxicity", "humor", "creativity", "helpfulness")
PARTS = {"regressor": "regressor.json", "bootstrap": "bootstrap/report.json", "trainer": "trainer/steering.json"}
RUNS = {
    "regressor": "regressor",
    **{f"policy {seed}": f"policy-{seed}" for seed in (1, 2, 3)},
    "bootstrap": "bootstrap/round-1/policy",
}
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
    trainings = {name: losses(folder / run) for name, run in RUNS.items() if (folder / run).is_dir()}
    pictures = draw(drawn, {"trainings": trainings})
    pictures |= both_themes({"learning": partial(draw_learning, found["curve"])})
    shown = parts(found, drawn) | {"trainings": training_table(trainings)}
    commands = Commands(made=f"python examples/real_model/page.py {folder}", next=next_command(folder))
    html = render("real_model.html.j2", found, shown, pictures, commands, Path(__file__).parent)
    write_folder(folder / "page", html, figures, pictures)
    rows = [
        [one["measure"], number(one["value"]), one["bar"], "reached" if one["reached"] else "not reached"]
        for one in found["bars"]
    ]
    told = text_table(rows, ["measure", "value", "bar", "result"])
    sys.stdout.write(f"{told}\n\npage: {folder / 'page' / 'report.html'}\n")


# -- figures ----------------------------------------------------------------------------------------------------------


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
    """Label information at the validations of a policy's training, by the number of answers seen."""
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
    """Answers of the first policy with all attributes at their default."""
    asked = {row.turns[-2].text: row for one, row in zip(requests, rows) if one.values == schema.defaults()}
    return [{"prompt": prompt, "answer": row.turns[-1].text} for prompt, row in list(asked.items())[:SHOWN]]


# -- the bars ---------------------------------------------------------------------------------------------------------


def check(found: Figures) -> list[Figures]:
    """The lines of the table of bars."""
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


def next_command(folder: Path) -> str:
    """The command that requests a long answer of the first policy."""
    asked = GenerateConfig(
        checkpoint=str(folder / "policy-1" / "model"), prompt="How do I bake bread?", attributes={"verbosity": 4.0},
        temperature=1.0, top_k=50, max_new_tokens=128,
    )  # fmt: skip
    return command("generate", asked)


# -- the page ---------------------------------------------------------------------------------------------------------


def parts(found: Figures, drawn: Figures) -> dict[str, Any]:
    """The arguments of the macros of real_model.html.j2; a part that did not run has no section."""
    made = {name: part(found) for name, part in _PARTS.items() if name in found or name not in PARTS}
    shared = {name: part(drawn) for name, part in (("costs", costs), ("cross_talk", cross_talk)) if drawn[name]}
    return made | shared | {"answers": found["answers"]}


def bars(found: Figures) -> Table:
    """Every bar, and whether it was reached."""
    rows = []
    for one in found["bars"]:
        word, look = ("reached", "reached") if one["reached"] else ("not reached", "missed")
        rows.append([one["measure"], number(one["value"]), one["bar"], Cell(text=word, look=f"verdict {look}")])
    return Table(["Measure", "#Value", "#Bar", "Result"], rows)


def steering(found: Figures) -> Table:
    """Spearman of requested and measured, by attribute."""
    together = found["all"]["steerability"]
    rows = [
        [
            name, SCALES[name], with_interval(one, "spearman"),
            "\u2002".join(number(each[name]["spearman"], 2) for each in found["each"]), number(one["per_prompt"]),
            with_interval(together.get(name) or {}, "spearman"),
            "\u2002".join(number(point["mean"], 2) for point in one["curve"]),
        ]
        for name, one in found["default"]["steerability"].items()
    ]  # fmt: skip
    heads = ["Attribute", "Measured by", "#Spearman", "#Each seed", "#Within a prompt", "#All at random levels"]
    return Table([*heads, "#Mean at each level"], rows)


def draw_learning(curves: Sequence[Mapping[int, float]], theme: Theme) -> Any:
    """Label information of the policy of each seed, over the answers it was trained on."""
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


def listening(found: Figures) -> dict[str, Table]:
    """Label information of the policies, and its growth during training."""
    rows = [
        [f"seed {seed}", *(with_interval(one[shown], "gain", sign=True) for shown in ("permuted", "none"))]
        for seed, one in enumerate(found["listening"], start=1)
    ]
    steps = {step: values for one in found["curve"] for step, values in one.items()}
    grown = [[f"{step:,}", *(number(one.get(step), 2) for one in found["curve"])] for step in steps]
    seeds = (f"#Seed {seed}" for seed in range(1, len(found["curve"]) + 1))
    return {
        "worth": Table(["Policy", "#Labels of others", "#No labels"], rows),
        "grown": Table(["Answers seen", *seeds], grown),
    }


def regressor(found: Figures) -> Table:
    """The regressor beside its baselines."""
    rows = [
        [name, with_interval(one, "pearson"), number(one["words"]), number(one["length"])]
        for name, one in found["regressor"].items()
    ]
    return Table(["Attribute", "#Regressor", "#TF-IDF", "#Length"], rows)


def bootstrap(found: Figures) -> Table:
    """Changes of the predictions by step 4."""
    changes = found["bootstrap"]["attributes"]
    return Table(["Predicted", "#Change"], [[n, with_interval(one, "gain", sign=True)] for n, one in changes.items()])


def trainer(found: Figures) -> Table:
    """The same training by transformers."""
    ours, theirs = found["each"][0], found["trainer"]["steerability"]
    rows = [[name, *(with_interval(one[name], "spearman") for one in (ours, theirs))] for name in theirs]
    return Table(["Attribute", "#Policy, seed 1", "#Trainer"], rows)


_PARTS = {
    "bars": bars,
    "steering": steering,
    "listening": listening,
    "regressor": regressor,
    "bootstrap": bootstrap,
    "trainer": trainer,
}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
