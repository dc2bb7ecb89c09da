"""Ratings of datasets as labels of a schema."""

from __future__ import annotations

from tests.data.helpers import run, steer, write


def test_ratings_are_stretched_onto_the_schemas_range(tmp_path):
    path = write(tmp_path / "a.jsonl", [steer("a", "b", 1, 4)])
    wide = {"helpfulness": {"low": 1, "high": 9}, "humor": None}
    _, [row] = run("helpsteer", path, tmp_path, attributes=wide)
    assert row.turns[1].label == {"helpfulness": 3.0}
