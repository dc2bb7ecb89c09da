"""OASST trees, written by hand and real."""

from __future__ import annotations

import gzip
import json

import pytest

from nemo_steerlm.conversation import Turn
from nemo_steerlm.errors import DataError
from tests.data.helpers import refused, rows_of, run_sides
from tests.data.trees import answer, ask, tree, write_trees
from tests.tokenizers import real_data


def test_hand_written_trees(fixture_trees, tmp_path):
    report, sides = run_sides("oasst", fixture_trees, tmp_path / "out", attributes="helpsteer", val_fraction=0.3)
    rows = {row.id: row for row in rows_of(sides)}
    assert set(rows) == {"a2", "a3", "x2", "n3", "h2", "g2"}
    assert report["read"] == {"trees": 7, "messages": 24, "unlabelled_responses_kept_as_context": 1}
    assert report["dropped"] == {
        "below_deleted_message": 2,
        "deleted_message": 1,
        "duplicate_conversation": 1,
        "lone_prompt": 1,
        "unanswered_prompt": 1,
        "unlabelled_response": 1,
    }
    kept = {turn.text for row in rows.values() for turn in row.turns}
    # 24 messages are 16 kept texts, 2 of the duplicate tree and the 6 dropped ones
    assert len(kept) == 16 and report["shared_turns"] == 1
    first, second = rows["a2"], rows["a3"]
    label = {"quality": 4.0, "toxicity": 0.0, "humor": 2.0, "creativity": 0.0, "helpfulness": 4.0}  # half to even
    assert first.turns[1] == Turn("Assistant", "Shared answer", label=label, label_human=label, label_count=4)
    assert second.turns[1] == Turn("Assistant", "Shared answer", label_human=label, shared=True, label_count=4)
    assert rows["x2"].turns[1].label == {"quality": 2.0}
    assert [turn.label is None for turn in rows["n3"].turns] == [True, True, True, False]
    assert first.extra == {"tree_id": "u1", "lang": "en", "dataset": "oasst"} and first.type == "VALUE_TO_TEXT"
    assert report["labels"]["quality"] == {"2": 1, "4": 6} and report["labels"]["verbosity"] == {}
    assert report["attributes_without_labels"] == ["correctness", "coherence", "complexity", "verbosity"]
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())


def test_scaling_to_the_papers_range(fixture_trees, tmp_path):
    _, sides = run_sides("oasst", fixture_trees, tmp_path / "out")
    label = next(row for row in rows_of(sides) if row.id == "a2").turns[1].label
    assert label == {"quality": 8, "toxicity": 0, "humor": 3, "creativity": 1, "helpfulness": 9}
    own = {"helpfulness": {"low": 1, "high": 5}, "wit": None}
    _, sides = run_sides("oasst", fixture_trees, tmp_path / "own", attributes=own)
    assert next(row for row in rows_of(sides) if row.id == "a2").turns[1].label == {"helpfulness": 5}


def test_the_flat_export_is_recognised_in_parquet(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    flat = [{"message_id": "a", "parent_id": None, "text": "x"}]
    parquet.write_table(pyarrow.Table.from_pylist(flat), tmp_path / "a.parquet")
    refused("a.parquet: row 1: no message under 'prompt', expected", "oasst", tmp_path / "a.parquet", tmp_path)


def test_languages(fixture_trees, tmp_path):
    report, sides = run_sides("oasst", fixture_trees, tmp_path / "out", languages=["de"])
    assert [row.id for row in rows_of(sides)] == ["g2"] and report["dropped"]["other_language"] == 5
    report, _ = run_sides("oasst", fixture_trees, tmp_path / "o2", languages=["en"], attributes="helpsteer")
    assert report["dropped"]["other_language"] == report["dropped"]["lone_prompt"] == 1


@pytest.mark.real_data
def test_real_trees_train_each_labelled_message_once(tmp_path):
    source = real_data("oasst1_en_val.dev.trees.jsonl.gz")
    report, sides = run_sides("oasst", source, tmp_path / "out", attributes="helpsteer")
    names = ("quality", "toxicity", "humor", "creativity", "helpfulness")
    expected: dict[tuple[str, ...], dict[str, float]] = {}

    def walk(message, history):
        history = (*history, message["text"])
        if not message["deleted"]:
            scores = message.get("labels") or {}
            label = {name: round(scores[name]["value"] * 4) for name in names if name in scores}
            if message["role"] == "assistant" and label:
                expected.setdefault(history, label)  # two people once gave the same answer: the first counts
            for reply in message["replies"]:
                walk(reply, history)

    with gzip.open(source, "rt", encoding="utf-8") as file:
        for line in file:
            walk(json.loads(line)["prompt"], ())
    found = [
        (tuple(turn.text for turn in row.turns[: index + 1]), row.turns[index].label)
        for row in rows_of(sides)
        for index in row.response_indices
        if row.turns[index].label
    ]
    assert len(found) == len(expected) == 778 and dict(found) == expected
    assert report["dropped"]["deleted_message"] == 11 and report["shared_turns"] == 240


def test_a_label_without_a_value_is_missing(tmp_path):
    replies = answer("a", "Hi", scores={"quality": 0.5, "humor": None}), answer("b", "Ho", labels={"quality": None})
    path = write_trees(tmp_path / "t.jsonl", [tree(ask("t", "Hello", *replies))])
    report, sides = run_sides("oasst", path, tmp_path / "out", attributes="helpsteer")
    assert [row.turns[1].label for row in rows_of(sides)] == [{"quality": 2.0}]
    assert report["dropped"] == {"unlabelled_response": 1}


@pytest.mark.parametrize("above", ["kept", "deleted"])
def test_a_reply_that_is_no_message_is_named(above, tmp_path):
    root = ask("t", "Hello", answer("a", "Hi", "not a message", deleted=above == "deleted"))
    path = write_trees(tmp_path / "t.jsonl", [tree(root)])
    with pytest.raises(DataError, match="t.jsonl:1: a reply is 'not a message', expected an object"):
        run_sides("oasst", path, tmp_path / "out")
