"""Empty answers, whatever the source."""

from __future__ import annotations

import pytest

from tests.data.helpers import run, said, steer, write

CHAT = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, ("a", "b", "c", " \n"))]
TURNS = ("User", "Assistant") * 2
#: Of each source: rows with an empty answer, one of them or what is left of it being a, b.
ANSWERS: dict[str, list[dict]] = {
    "messages": [{"messages": CHAT[2:]}, {"messages": CHAT}],
    "steerlm": [said(("User", "c"), ("Assistant", "\t")), said(*zip(TURNS, ("a", "b", "c", "", "d"), strict=False))],
    "helpsteer2": [steer("c", " ", 1), steer("a", "b", 1)],
    "table": [{"prompt": "c", "response": " "}, {"prompt": "a", "response": "b"}],
    "ultrafeedback": [
        {"instruction": "a", "completions": [{"response": text, "annotations": {"honesty": 3}} for text in (" ", "b")]}
    ],
    "helpsteer3": [{"context": CHAT[:1], "response1": "b", "response2": "", "feedback1": [], "feedback2": []}],
}


@pytest.mark.parametrize("source", ANSWERS)
def test_an_empty_answer_is_dropped_whatever_the_source(source, tmp_path):
    columns = {"prompt": "prompt", "response": "response"} if source == "table" else None
    report, rows = run(source, write(tmp_path / "a.jsonl", ANSWERS[source]), tmp_path, columns=columns)
    assert [[turn.text for turn in row.turns] for row in rows] == [["a", "b"]]
    several = {"empty_response": 2, "unanswered_prompt": 1}
    assert report["dropped"] == (several if source in ("messages", "steerlm") else {"empty_response": 1})


def test_an_answer_after_an_empty_one_and_keys_of_messages_are_counted(tmp_path):
    calls: dict = {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}], "name": "x"}
    rows = [{"messages": [*CHAT[:2], CHAT[0], calls, *CHAT[:2]]}, {"messages": [*CHAT[:1], {**CHAT[1], "name": "y"}]}]
    report, found = run("messages", write(tmp_path / "a.jsonl", rows), tmp_path, dedupe=False)
    assert [[turn.text for turn in row.turns] for row in found] == [["a", "b"], ["a", "b"]]
    assert report["dropped"] == {"below_empty_response": 2, "empty_response": 1, "unanswered_prompt": 1}
    assert report["unused_keys"] == {"name": 2, "tool_calls": 1} and found[1].turns[1].extra == {"name": "y"}
