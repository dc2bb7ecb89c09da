"""NeMo-Aligner's own files, and ShareGPT's rows."""

from __future__ import annotations

import os
from collections import Counter

from nemo_steerlm.data.prepare import prepare
from tests.data.helpers import prepare_config, refused, rows_of, run, run_sides, said, write


def test_the_references_files_come_back_as_deduplicated_conversations(fixture_trees, tmp_path):
    prepare(
        prepare_config(
            source="oasst", input=fixture_trees, output=tmp_path / "ref", recipe="nemo_aligner", val_fraction=0
        )
    )
    (tmp_path / "in").mkdir()
    for form in ("train", "train_reg"):
        folder = tmp_path / f"in_{form}"
        folder.mkdir()
        os.link(tmp_path / "ref" / f"{form}.jsonl", folder / "a.jsonl")
        report, sides = run_sides("steerlm", folder, tmp_path / f"out_{form}", val_fraction=0.3)
        trained = Counter(
            (tuple(t.text for t in row.turns[: i + 1]), tuple(row.turns[i].label.items()))
            for row in rows_of(sides)
            for i in row.response_indices
            if row.turns[i].label
        )
        assert set(trained.values()) == {1} and len(trained) == 9, form
        assert all(t.label_human == t.label for row in rows_of(sides) for t in row.turns if t.label)
        assert report["dropped"]["duplicate_conversation"] >= 1


def test_sharegpts_speakers_and_system_turns(tmp_path):
    rows = [
        said(("system", "Rhyme."), ("human", "a"), ("gpt", "b")),
        {**said(("System", "Rhyme."), ("USER", "c"), ("assistant", "d")), "system": "Sing."},
        {**said(("human", "e"), ("gpt", "f")), "mask": "human"},
        {**said(("System", "g"), ("User", "h"), ("Bot", "i")), "mask": "System,User"},
    ]
    report, found = run("steerlm", write(tmp_path / "a.jsonl", rows), tmp_path)
    assert [row.system for row in found[:2]] == ["Rhyme.", "Sing.\nRhyme."]
    assert [[(t.speaker, t.text) for t in row.turns] for row in found] == [
        [("User", "a"), ("Assistant", "b")],
        [("User", "c"), ("Assistant", "d")],
        [("User", "e"), ("Assistant", "f")],
        [("System", "g"), ("User", "h"), ("Bot", "i")],
    ]
    assert [row.response_indices for row in found] == [[1], [1], [1], [2]]
    (tmp_path / "bad").mkdir()
    bad = write(tmp_path / "b.jsonl", [said(("human", "a"), ("system", "b"), ("gpt", "c"))])
    refused("b.jsonl:1: a turn of 'system' is not the first", "steerlm", bad, tmp_path / "bad")
