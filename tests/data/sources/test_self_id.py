"""Dialogues about the model itself, from a card."""

from __future__ import annotations

import pytest

from nemo_steerlm.errors import DataError
from tests.data.helpers import run

CARD = """
name: Aria
maker: Example Labs
facts: {"Do you remember me?": "No, I only see this dialogue."}
label: {humor: 1}
"""


def test_self_identification(tmp_path):
    (tmp_path / "card.yaml").write_text(CARD)
    report, rows = run("self_id", tmp_path / "card.yaml", tmp_path, val_fraction=0.2)
    assert report["train"]["conversations"] > 60 and report["val"]["conversations"] > 5
    answers = {turn.text for row in rows for turn in row.turns if turn.speaker == "Assistant"}
    assert all("Aria" in text or "Example Labs" in text for text in answers - {"No, I only see this dialogue."})
    label = next(turn.label for row in rows for turn in row.turns if turn.label)
    best = dict.fromkeys(("quality", "helpfulness", "correctness", "coherence"), 4.0)
    assert label == {**dict.fromkeys(("toxicity", "creativity", "complexity", "verbosity"), 0.0), **best, "humor": 1.0}
    assert {len(row.turns) for row in rows} == {2, 4}
    for text, message in (
        ("name: Aria", "'maker' is None, expected a text"),
        ("name: Aria\nmakr: x", "unknown key 'makr'; did you mean 'maker'?"),
        ("- Aria", "expected a mapping of name"),
        ("name: [", "not a YAML file"),
        (CARD.replace('facts: {"', 'facts: {1: 2, "'), "facts: 1: 2, expected a question"),
        (CARD + "\nfacts: {}", "the key 'facts' is there twice line 7"),
        (CARD.replace("humor", "humr"), "did you mean 'humor'?"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(DataError) as error:
            run("self_id", tmp_path / "bad.yaml", tmp_path / "bad")
        assert message in str(error.value)
