"""HelpSteer2-Preference in its hub layout."""

from __future__ import annotations

from nemo_steerlm.conversation import read_conversations
from tests.data.helpers import pairs_of, preference, refused, run, write


def test_helpsteer2_preference(tmp_path):
    rows = [
        preference("p", "left", "right", -2, people=(-2, -3, -100)),  # the last one found it impossible to compare
        preference("q", "left", "right", 3, split="validation", people=(3, 3, 2)),
        preference("r", "left", "right", 0),
        preference("r", "same", "same", 1),
        preference("p", "left", "right", -2),
    ]
    path = write(tmp_path / "hub" / "preference" / "preference.jsonl.gz", rows)
    report, train = run("helpsteer2_preference", tmp_path / "hub", tmp_path, val_fraction=None)
    [halves] = pairs_of(train)
    assert {role: row.turns[-1].text for role, row in halves.items()} == {"chosen": "left", "rejected": "right"}
    assert halves["chosen"].pair.strength == halves["rejected"].pair.strength == 2.0
    assert not any(turn.label for row in train for turn in row.turns)
    [halves] = pairs_of(read_conversations(tmp_path / "out" / "val.jsonl"))
    assert halves["chosen"].turns[-1].text == "right" and halves["chosen"].pair.strength == 3.0
    assert report["dropped"] == {"duplicate_pair_row": 2, "pair_of_equal_responses": 1, "tie": 1}
    assert report["pairs"]["train"] == {"chosen": 1, "rejected": 1, "complete": True}
    assert {**report["rater_agreement"]["preference"], "alpha": 0} == {"items": 2, "ratings": 5, "alpha": 0}
    assert 0.9 < report["rater_agreement"]["preference"]["alpha"] < 1
    assert report["pairs"]["strengths"] == {"2": 1, "3": 1} and path.is_file()
    bad = write(tmp_path / "bad.jsonl", [preference("p", "a", "b", 4)])
    (tmp_path / "new").mkdir()
    message = "bad.jsonl:1: 'preference_strength' is 4, expected -3 to 3"
    refused(message, "helpsteer2_preference", bad, tmp_path / "new")
