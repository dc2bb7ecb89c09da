"""HH-RLHF in its hub layout, and real pairs of it."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest

from nemo_steerlm.conversation import Turn
from tests.data.helpers import pairs_of, refused, run, write
from tests.tokenizers import real_data


def human(*texts):
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[index % 2]}: {text}" for index, text in enumerate(texts))


def test_hh_rlhf(tmp_path):
    rows = [
        {"chosen": human("hi", "hello", "a\n\nb?", "yes "), "rejected": human("hi", "hello", "a\n\nb?", "no")},
        {"chosen": human("hi", "hello"), "rejected": human("hi", "")},
        {"chosen": human("hi", "a"), "rejected": human("ho", "b")},
        {"chosen": human("hi"), "rejected": human("hi")},
    ]
    write(tmp_path / "hub" / "harmless-base" / "train.jsonl.gz", rows)
    write(tmp_path / "hub" / "red-team-attempts" / "red_team_attempts.jsonl.gz", [{"transcript": "x"}])
    report, found = run("hh_rlhf", tmp_path / "hub", tmp_path)
    [halves] = pairs_of(found)
    assert [turn.text for turn in halves["chosen"].turns] == ["hi", "hello", "a\n\nb?", "yes"]
    assert halves["rejected"].turns[-1] == Turn("Assistant", "no") and halves["rejected"].pair.strength == 1.0
    reasons = ("pair_with_empty_response", "pair_with_different_prompts", "pair_without_response")
    assert report["dropped"] == dict.fromkeys(reasons, 1) and report["read"]["comparisons"] == 4
    (tmp_path / "bad").mkdir()
    bad = write(tmp_path / "bad.jsonl", [{"chosen": "once upon a time", "rejected": human("x", "y")}])
    refused("bad.jsonl:1: chosen is 'once upon", "hh_rlhf", bad, tmp_path / "bad")


@pytest.mark.real_data
def test_real_hh_pairs(tmp_path):
    source = real_data("hh_harmless_base_test.dev.jsonl.gz")
    report, rows = run("hh_rlhf", source, tmp_path)
    read, dropped = report["read"]["comparisons"], report["dropped"]
    halves = pairs_of(rows)
    assert read == 1167 == len(halves) + sum(dropped.values()) - dropped.get("duplicate_pair_row", 0) // 2
    assert dropped["pair_with_empty_response"] <= 4 and dropped["pair_with_different_prompts"] <= 5
    with gzip.open(source, "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    ends = Counter((row["chosen"].rstrip()[-30:], row["rejected"].rstrip()[-30:]) for row in lines)
    for pair in halves:
        texts = (pair["chosen"].turns[-1].text, pair["rejected"].turns[-1].text)
        assert any(one.endswith(texts[0][-30:]) and two.endswith(texts[1][-30:]) for one, two in ends), texts
