"""The example of a real model without its hours: its commands compose, its scripts work, its page tells all."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from nemo_steerlm import config
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.cli import VERBS
from nemo_steerlm.config import compose
from nemo_steerlm.conversation import Conversation, Turn, read_conversations, write_conversations
from nemo_steerlm.evaluate.steerability import plan_requests

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "real_model"
SYSTEM = "You are a helpful assistant."


def script(name: str) -> ModuleType:
    """A script of the example as a module."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(question: str, answer: str, *more: str, label: dict[str, float] | None = None) -> Conversation:
    turns = [Turn("User", question), Turn("Assistant", answer, label=label, label_human=label)]
    return Conversation([*turns, *(Turn("User", text) for text in more)], system="Another system.", mask="User")


@pytest.mark.parametrize("fast", ["false", "true"])
def test_every_command_of_the_makefile_composes(tmp_path: Path, fast: str) -> None:
    for name in ("trees.jsonl", "answers.jsonl"):
        (tmp_path / name).touch()
    given = [f"trees={tmp_path}/trees.jsonl", f"answers={tmp_path}/answers.jsonl", f"output={tmp_path}/out"]
    words = ["make", "-f", str(FOLDER / "Makefile"), *given, f"fast={fast}", f"python={sys.executable}", "base=m.gguf"]
    subprocess.run([*words, f"{tmp_path}/out/all.yaml", f"{tmp_path}/out/steered.yaml"], cwd=ROOT, check=True)
    made = subprocess.run([*words, "-n"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    commands = [shlex.split(line) for line in made.replace("\\\n", " ").splitlines()]
    verbs = [words[3:] for words in commands if words[1:3] == ["-m", "nemo_steerlm"]]
    settings = {verb: compose.load(verb, getattr(config, VERBS[verb][1]), keys) for verb, *keys in verbs}
    held_out = f"{tmp_path}/out/labelled/report.jsonl"  # nothing is trained on the prompts of the report
    assert settings["evaluate"].input == settings["bootstrap"].data.change_prompts == held_out
    assert settings["bootstrap"].data.prompts == f"{tmp_path}/out/labelled/val.jsonl"
    told = {keys[0] for keys in verbs}
    assert told >= {"import", "prepare", "train-regressor", "annotate", "train-sft", "bootstrap", "evaluate"}
    assert sum(keys[0] == "train-sft" for keys in verbs) >= (1 if fast == "true" else 3)
    scripts = {Path(words[1]) for words in commands if len(words) > 1 and words[1].endswith(".py")}
    assert scripts and all((ROOT / path).is_file() for path in scripts)


def test_without_trees_the_makefile_says_what_is_missing(tmp_path: Path) -> None:
    words = ["make", "-n", "-f", str(FOLDER / "Makefile"), "trees=", f"python={sys.executable}"]
    made = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 2 and "trees is missing: say trees=FILE" in made.stderr


def test_picked_rows_are_starts_of_first_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "word " * 50
    rows = [row("Why?", "It is so.", "And?", label={"quality": 2}), row("Why?", "It is so."), row("How?", long)]
    write_conversations(tmp_path / "train.jsonl", [*rows, row("When?", "No."), row(long, "A fine question.")])
    write_conversations(tmp_path / "val.jsonl", [row("Who?", "You and me. " + long)])
    files = [str(tmp_path / "train.jsonl"), str(tmp_path / "val.jsonl")]
    words = [*files, "--most-words", "20", "--draws", "9", "--output", str(tmp_path / "out" / "picked.jsonl")]
    monkeypatch.setattr(sys, "argv", ["pick_answers.py", *words])
    script("pick_answers").main()
    found = {one.turns[0].text: one for one in read_conversations(tmp_path / "out" / "picked.jsonl")}
    assert {question: one.turns[1].text for question, one in found.items()} == {
        "Why?": "It is so.", "Who?": "You and me."
    }  # fmt: skip
    one = found["Why?"]
    assert len(one.turns) == 2 and one.turns[1].label is None and one.turns[1].label_human is None
    assert one.system == SYSTEM and one.type == "VALUE_TO_TEXT"


@pytest.mark.parametrize(
    ("text", "words", "start"),
    [
        ("One two. Three four! Five.", 4, "One two. Three four!"),
        ("One two. Three four! Five.", 3, None),
        ("One two three. Four.", 3, "One two three."),
        ("First of all:\n1. Go home now. 2. Sleep.", 7, "First of all:\n1. Go home now."),
        ('He said "no way." Then he left us.', 5, 'He said "no way."'),
        ("Version 3.5 is out today. More follows.", 6, "Version 3.5 is out today."),
        ("no sentence at all", 4, "no sentence at all"),
    ],
)
def test_an_answer_is_cut_where_a_sentence_ends(text: str, words: int, start: str | None) -> None:
    assert script("pick_answers").start_of(text, words) == start


def test_levels_are_where_a_measure_lies_among_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["I hate it. " * (n + 1) if n % 2 else "A great and lovely day. " * (n + 1) for n in range(20)]
    rows = [row("Why?", text, label={"quality": 3.0}) for text in answers]
    write_conversations(tmp_path / "train.jsonl", rows)
    monkeypatch.setattr(sys, "argv", ["label", str(tmp_path / "train.jsonl"), "--output", str(tmp_path / "out")])
    script("label_texts").main()
    borders = json.loads((tmp_path / "out" / "borders.json").read_text())
    words = np.array([len(text.split()) for text in answers])
    low, high = np.quantile(words, (0.1, 0.8))
    np.testing.assert_allclose(borders["verbosity"], np.geomspace(low, high, 4))
    for text, found in zip(answers, read_conversations(tmp_path / "out" / "train.jsonl"), strict=True):
        label = found.turns[1].label
        assert label is not None and label["quality"] == 3
        assert label["verbosity"] == sum(border <= len(text.split()) for border in borders["verbosity"])
        assert (label["positivity"] == 0) == ("hate" in text) and (label["positivity"] >= 2) == ("great" in text)
        assert found.turns[1].label_human == label


def test_predictions_are_spread_over_all_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("Why?", f"Because of {n}.") for n in range(20)]
    for n, one in enumerate(rows):
        one.turns[1].label, one.turns[1].label_model = {"quality": 2.0, "humor": 1.0}, "a regressor"
        one.turns[1].label_predicted = {"quality": 2 + n / 100, "humor": 1 + n / 100}
    write_conversations(tmp_path / "train.jsonl", rows)
    words = [str(tmp_path / "train.jsonl"), "--spread", "quality", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["label", *words])
    script("label_texts").main()
    labels = [one.turns[1].label or {} for one in read_conversations(tmp_path / "out" / "train.jsonl")]
    assert [label["quality"] for label in labels] == [n // 4 for n in range(20)]
    assert {label["humor"] for label in labels} == {1.0}


def _run_folder(folder: Path, schema: AttributeSchema, seed: int) -> None:
    """What a policy of one seed leaves: it obeys in verbosity, its quality is noise."""
    random, rows = np.random.default_rng(seed), []
    for way in ("default", "all"):
        for request in plan_requests(schema, 4, way=way):
            asked = request.values.get("verbosity", 2)
            measured = {"verbosity": 10 * asked + random.normal(), "quality": random.normal(), "tokens": 1.0}
            extra = {"way": way, "attribute": request.attribute, "requested": request.values, "measured": measured}
            turns = [Turn("User", f"Question {request.prompt}?"), Turn("Assistant", f"<b>{asked:.0f}</b> words")]
            rows.append(Conversation(turns, mask="User", extra=extra))
    (folder / f"steering-policy-{seed}").mkdir()
    write_conversations(folder / f"steering-policy-{seed}" / "answers.jsonl", rows)
    gain = {"gain": 1.5, "interval": [1.0, 2.0], "n": 9}
    heard = {"listening": {"permuted": gain, "none": gain}}
    (folder / f"steering-policy-{seed}" / "report.json").write_text(json.dumps(heard))
    run = folder / f"policy-{seed}"
    run.mkdir()
    (run / "config.yaml").write_text("trainer: {global_batch_size: 4}\n")
    lines = ({"step": 30, "val/label_information": 0.25}, {"step": 31, "train/loss": 1.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_page_tells_what_was_reached_and_what_was_not(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "steered.yaml").write_text("verbosity: {low: 0, high: 4}\nquality: {low: 0, high: 4}\n")
    schema = AttributeSchema.load(str(tmp_path / "steered.yaml"))
    for seed in (1, 2):
        _run_folder(tmp_path, schema, seed)
    one: dict[str, Any] = {"pearson": 0.5, "interval": [0.4, 0.6], "words": 0.3, "length": 0.2}
    (tmp_path / "regressor.json").write_text(json.dumps(dict.fromkeys("abcde", one)))
    (tmp_path / "bootstrap").mkdir()
    change = {"gain": 0.25, "interval": [0.1, 0.4], "n": 9}
    (tmp_path / "bootstrap" / "report.json").write_text(
        json.dumps({"rounds": [{"kept": 7}], "attributes": {"quality": change}})
    )
    script("page").main(tmp_path)
    report = json.loads((tmp_path / "page" / "report.json").read_text())
    reached = {bar["measure"].partition(":")[0]: bar["reached"] for bar in report["bars"]}
    better = "attributes where the regressor is above words and length"
    assert reached == {"verbosity": True, "quality": False, better: True}
    assert report["default"]["prompts"] == 4 and report["default"]["answers"] == 2 * 2 * 5 * 4
    assert report["curve"] == [{"120": 0.25}] * 2  # steps of 4 answers
    html = (tmp_path / "page" / "report.html").read_text()
    assert "7 of its own answers" in html and "+0.250<small>+0.100 to +0.400</small>" in html
    assert "Question 3?" in html and "&lt;b&gt;2&lt;/b&gt; words" in html
    assert "transformers" not in html.partition("Step 4: bootstrap")[2]  # a part that did not run
    assert "not reached" in capsys.readouterr().out and (tmp_path / "page" / "steerability.png").is_file()
    assert (tmp_path / "page" / "learning.png").is_file()
