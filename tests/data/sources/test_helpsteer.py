"""HelpSteer and HelpSteer2 in their hub layouts."""

from __future__ import annotations

import pytest

from nemo_steerlm.conversation import read_conversations
from tests.data.helpers import refused, run, steer, write


def test_helpsteer_and_its_own_split(tmp_path):
    rows = [steer("Why?", "Because.", 3, 4, 4, 1, 0), steer("Why?", " ", 0, 0, 0, 0, 0)]
    write(tmp_path / "hub" / "train.jsonl.gz", rows)
    write(tmp_path / "hub" / "validation.jsonl.gz", [steer("How?", "So.", 2, 2, 4, 1, 1)])
    write(tmp_path / "hub" / "other" / "noise.jsonl", [{"x": 1}])
    report, rows = run("helpsteer", tmp_path / "hub", tmp_path, val_fraction=None, dataset="mine")
    assert [(turn.speaker, turn.text) for turn in rows[0].turns] == [("User", "Why?"), ("Assistant", "Because.")]
    expected = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 0}
    assert rows[0].turns[1].label == rows[0].turns[1].label_human == expected
    assert rows[0].extra == {"dataset": "mine"} and report["dropped"] == {"empty_response": 1}
    [val] = read_conversations(tmp_path / "out" / "val.jsonl")
    assert val.turns[0].text == "How?" and report["prompts"]["val"] == 1 and report["prompts"]["in_both"] == 0


def test_helpsteer2_prompts_of_several_turns_and_the_ratings_of_each_person(tmp_path):
    prompt = "c#\n<extra_id_1>Assistant\nA language.\n<extra_id_1>User\nAnd then?"
    rows = [steer(prompt, "More.", [3, 4, 4], [4, 4, 4], [4, 4], [2, 1, 2], [1, 1, 2])]
    path = write(tmp_path / "disagreements.jsonl.gz", rows)
    report, [row] = run("helpsteer2", path, tmp_path, attributes="helpsteer")
    texts = [("User", "c#"), ("Assistant", "A language."), ("User", "And then?"), ("Assistant", "More.")]
    assert [(turn.speaker, turn.text) for turn in row.turns] == texts
    assert row.turns[3].label == pytest.approx(
        {"helpfulness": 11 / 3, "correctness": 4, "coherence": 4, "complexity": 5 / 3, "verbosity": 4 / 3}, abs=1e-4
    )
    assert row.turns[3].label_count == 2 and row.turns[1].label is None  # the least there is of any attribute
    agreement = report["rater_agreement"]
    assert agreement["coherence"] == {"items": 1, "ratings": 2, "alpha": None}  # all the same: nothing to tell
    # pairs lie 1, 1, 0 apart (squared), of one item or of any: alpha = 1 - (2/3) / (2/3)
    assert agreement["helpfulness"] == {"items": 1, "ratings": 3, "alpha": 0.0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (steer("a", "b", 5), "a.jsonl:1: 'helpfulness' is 5, expected 0 to 4"),
        (steer("a", "b", "good"), "'helpfulness' is 'good', expected 0 to 4"),
        ({"prompt": "a"}, "a.jsonl:1: 'response' is missing; the row has prompt"),
        (steer(["a"], "b", 1), "'prompt' is ['a'], expected a string"),
        (steer("a", "b"), "all labels are missing for the attributes helpfulness"),
    ],
)
def test_malformed_helpsteer_rows(row, message, tmp_path):
    refused(message, "helpsteer2", write(tmp_path / "a.jsonl", [row]), tmp_path)
