"""Comparisons as preference pairs."""

from __future__ import annotations

from nemo_steerlm.conversation import write_conversations
from tests.data.helpers import pairs_of, preference, run, write


def test_halves_of_a_pair_stay_together_when_a_response_stands_twice(tmp_path):
    told = [("best", "bad", -1), ("best", "worse", -2), ("bad", "best", 1)]
    rows = [preference("p", *one) for one in told]
    _, found = run("helpsteer2_preference", write(tmp_path / "a.jsonl", rows), tmp_path)
    assert len(pairs_of(found)) == 2  # the third says what the first does, in another order
    again = write_conversations(tmp_path / "b.jsonl", found)
    (tmp_path / "two").mkdir()
    _, same = run("steerlm", tmp_path / "b.jsonl", tmp_path / "two")
    assert again == len(same) == 2 * len(pairs_of(same))
