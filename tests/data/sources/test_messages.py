"""OpenAI's chat rows."""

from __future__ import annotations

import json

from tests.data.helpers import rows_of, run_sides


def test_messages_without_labels_are_kept_for_annotation(tmp_path):
    def dialogue(*texts, **more):
        return {
            "messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)],
            **more,
        }

    rows = [dialogue("a", "b", "c", "d", id="one"), dialogue("a", "b", "e", "f"), dialogue("a", "b"), dialogue("x")]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, [*rows, dialogue("q", "r", "s")])))
    report, sides = run_sides("messages", tmp_path / "m.jsonl", tmp_path / "out")
    kept = {row.id: [turn.shared for turn in row.turns] for row in rows_of(sides)}
    assert kept == {"one": [False] * 4, "1": [False, True, False, False], "3": [False, False]}
    assert report["dropped"] == {
        "conversation_without_response": 1,
        "duplicate_conversation": 1,
        "unanswered_prompt": 1,
    }
