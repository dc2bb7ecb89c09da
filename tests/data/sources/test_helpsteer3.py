"""HelpSteer3 in its hub layout."""

from __future__ import annotations

from tests.data.helpers import context, pairs_of, refused, run, write


def test_helpsteer3(tmp_path):
    people = [
        {"score": -2, "reasoning": "r", "feedback1": "The response is mostly helpful. Yes.", "feedback2": None},
        {"score": -1, "reasoning": "r", "feedback1": "The response is perfectly helpful.", "feedback2": "No grade."},
    ]
    system = {"role": "system", "content": "Be brief."}
    one = {"domain": "general", "language": "english", "context": [system, *context("a", "b", "c")],
           "response1": "left", "response2": "right", "overall_preference": -2,
           "individual_preference": people}  # fmt: skip
    two = {**one, "language": "french", "context": context("x"), "overall_preference": 1}
    two["individual_preference"] = []
    texts = ["The response is not helpful at all.", "The response is slightly helpful.", "Hm."]
    feedback = {"domain": "stem", "language": "english", "context": context("f"), "response1": "answer",
                "response2": "other", "feedback1": texts,
                "feedback2": ["The response is perfectly helpful."]}  # fmt: skip
    write(tmp_path / "hub" / "preference" / "train.jsonl.gz", [one, two])
    write(tmp_path / "hub" / "feedback" / "train.jsonl.gz", [feedback])
    write(tmp_path / "hub" / "edit" / "train.jsonl.gz", [{"other": 1}])
    report, rows = run("helpsteer3", tmp_path / "hub", tmp_path)
    assert report["languages"] == {"english": 4, "french": 2}
    lone, other = rows[:2]
    halves, french = pairs_of(rows[2:])
    assert lone.turns[-1].label == {"helpfulness": 0.5} and lone.turns[-1].label_count == 2 and lone.pair is None
    assert [turn.text for turn in other.turns] == ["f", "other"] and other.turns[-1].label == {"helpfulness": 4}
    assert report["read"] == {"rows_of_feedback": 1, "responses": 2, "comparisons": 2}
    assert report["rater_agreement"]["preference"]["ratings"] == 2
    assert {halves[role].system for role in halves} == {"Be brief."}
    chosen = halves["chosen"].turns
    assert [turn.text for turn in chosen] == ["a", "b", "c", "left"]
    assert chosen[-1].label_human == {"helpfulness": 3.5} and chosen[-1].label_count == 2
    assert halves["rejected"].turns[-1].label is None and halves["rejected"].pair.strength == 2.0
    assert halves["chosen"].extra["preference_count"] == 2 and french["chosen"].turns[-1].text == "right"
    (tmp_path / "fr").mkdir()
    report, rows = run("helpsteer3", tmp_path / "hub", tmp_path / "fr", languages=["French"])
    assert len(rows) == 2 and report["dropped"] == {"other_language": 2}
    assert report["other_languages"] == {"english": 2}
    (tmp_path / "bad").mkdir()
    message = "there are the languages english, french"
    refused(message, "helpsteer3", tmp_path / "hub", tmp_path / "bad", languages=["en"])
    bad = write(tmp_path / "bad.jsonl", [{"context": context("x"), "response": "y"}])
    refused("bad.jsonl:1: neither 'overall_preference' nor 'feedback1'", "helpsteer3", bad, tmp_path / "bad")
