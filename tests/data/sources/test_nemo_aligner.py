"""recipe=nemo_aligner writes the reference's bytes."""

from __future__ import annotations

import gzip
import json
import os
import random

import pytest

from nemo_steerlm.conversation import DEFAULT_SYSTEM
from nemo_steerlm.data.prepare import prepare
from tests.data.helpers import FILES, prepare_config
from tests.data.trees import trees
from tests.tokenizers import real_data


@pytest.mark.real_data
@pytest.mark.parametrize("packed", [True, False])
def test_the_bytes_are_nemo_aligners(packed, tmp_path):
    source = real_data("oasst1_en_val.dev.trees.jsonl.gz")
    if not packed:
        plain = tmp_path / "t.trees.jsonl"
        plain.write_bytes(gzip.decompress(source.read_bytes()))
        source = plain
    report = prepare(prepare_config(source="oasst", input=source, output=tmp_path / "out", recipe="nemo_aligner"))
    for name in ("train", "val", "train_reg", "val_reg"):
        golden = gzip.decompress(real_data(f"golden_nemo_aligner/{name}.jsonl.gz").read_bytes())
        assert (tmp_path / "out" / f"{name}.jsonl").read_bytes() == golden
    assert report["train"] == {"conversations": 581, "labelled_responses": 995}
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*FILES, "train_reg.jsonl", "val_reg.jsonl"])


def test_the_references_behaviour_on_hand_written_trees(fixture_trees, tmp_path):
    settings = {"source": "oasst", "input": fixture_trees, "recipe": "nemo_aligner", "val_fraction": 0.3}
    report = prepare(prepare_config(**settings, output=tmp_path / "out"))
    order = trees()
    random.Random(10).shuffle(order)
    lines = [
        (tmp_path / "out" / f"{side}.jsonl").read_text(encoding="utf-8").split("\n")[:-1] for side in ("train", "val")
    ]
    rows = [[json.loads(line) for line in side] for side in lines]
    assert report["dropped"] == {"thread_of_one_message": 1}
    for side, chosen in zip(rows, (order[:4], order[4:]), strict=True):  # int(7 * 0.7) trees train
        roots = [t["prompt"]["text"] for t in chosen if t["prompt"]["replies"]]
        assert list(dict.fromkeys(row["conversations"][0]["value"] for row in side)) == list(dict.fromkeys(roots))
    threads = {tuple(turn["value"] for turn in row["conversations"]): row for row in rows[0] + rows[1]}
    shared = threads["Hello", "Shared answer", "How?", "So."]["conversations"]
    assert list(shared[1]) == ["value", "from", "label"] and shared[0]["label"] is None
    assert shared[1]["label"] == "quality:4,toxicity:0,humor:2,creativity:0"
    assert ("A deleted reply", "Deleted answer", "Below it", "Below that") in threads
    unlabelled = threads["An unlabelled reply", "No label", "More", "Labelled below"]["conversations"]
    assert "label" not in unlabelled[1]
    assert threads["An unlabelled reply", "No scores of ours"]["conversations"][1]["label"] == ""
    regression = [json.loads(x) for side in ("train", "val") for x in open(tmp_path / "out" / f"{side}_reg.jsonl")]
    assert {"text": regression[0]["text"], "label": regression[0]["label"]} == regression[0]
    one = next(row for row in regression if "A good reply" in row["text"])
    assert one["label"] == [2.0] + [-100.0] * 8 and one["text"].endswith("Assistant\nA good reply\n<extra_id_2>")


def test_odd_trees_give_the_references_bytes(tmp_path):
    """What the reference's scripts write, worked out by hand: empty labels, markers in text, replies without text."""
    text = "<extra_id_1>User\n\u00e9 {value}"
    both = {"quality": {"value": 0.5}, "spam": {"value": 0}}
    replies = [
        {"role": "assistant", "text": text, "labels": both, "replies": []},
        {"role": "assistant", "text": "", "labels": {}, "replies": [{"message_id": "x", "deleted": True}]},
        {"role": "assistant", "text": "c", "labels": {"spam": {"value": 1}}, "replies": []},
        {"role": "assistant", "text": "d", "replies": []},
    ]
    root = {"role": "prompter", "text": "a", "replies": replies, "labels": {"quality": {"value": 1}}}
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"prompt": root}, root, {"prompt": replies[3]})))
    settings = {"source": "oasst", "input": path, "recipe": "nemo_aligner", "val_fraction": 0}
    report = prepare(prepare_config(**settings, output=tmp_path / "out"))
    tail = f'"system": "{DEFAULT_SYSTEM}", "mask": "User", "type": "VALUE_TO_TEXT"}}\n'
    said = ['"<extra_id_1>User\\n\u00e9 {value}"', '""', '"c"', '"d"']
    labels = [', "label": "quality:2"', ', "label": ""', ', "label": ""', ""]
    rows = [
        f'{{"conversations": [{{"value": "a", "from": "User", "label": null}}, '
        f'{{"value": {one}, "from": "Assistant"{label}}}], {tail}'
        for one, label in zip(said, labels, strict=True)
    ]
    assert (tmp_path / "out" / "train.jsonl").read_text(encoding="utf-8") == "".join(rows * 2)
    prompt = f"<extra_id_0>System\n{DEFAULT_SYSTEM}\n<extra_id_1>User\na\n<extra_id_1>Assistant\n{text}\n<extra_id_2>"
    line = json.dumps({"text": prompt, "label": [2.0] + [-100.0] * 8}, ensure_ascii=False) + "\n"
    assert (tmp_path / "out" / "train_reg.jsonl").read_text(encoding="utf-8") == line * 2
    assert report["dropped"] == {"thread_of_one_message": 1}
