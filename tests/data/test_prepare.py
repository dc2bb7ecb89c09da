from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections import Counter

import pytest
from omegaconf import OmegaConf

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import DEFAULT_SYSTEM, Conversation, Turn, read_conversations, write_conversations
from nemo_steerlm.data.prepare import PrepareOptions, prepare
from nemo_steerlm.errors import ConfigError, DataError, SteerLMError
from nemo_steerlm.provenance import read_run_json
from tests.data.trees import answer, ask, tree, trees, write_trees
from tests.tokenizers import real_data

FILES = ["report.json", "run.json", "train.jsonl", "val.jsonl"]


@pytest.fixture
def fixture_trees(tmp_path):
    return write_trees(tmp_path / "some.trees.jsonl", trees())


def run(source, path, output, **settings):
    report = prepare({"source": source, "input": path, "output": output, **settings})
    sides = [list(read_conversations(output / f"{side}.jsonl")) for side in ("train", "val") if report[side]["turns"]]
    return report, sides


def rows_of(sides):
    return [conversation for side in sides for conversation in side]


# -- recipe=default ---------------------------------------------------------------------------------------------------


def test_hand_written_trees(fixture_trees, tmp_path):
    report, sides = run("oasst", fixture_trees, tmp_path / "out", attributes="helpsteer", val_fraction=0.3)
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
    _, sides = run("oasst", fixture_trees, tmp_path / "out")
    label = next(row for row in rows_of(sides) if row.id == "a2").turns[1].label
    assert label == {"quality": 8, "toxicity": 0, "humor": 3, "creativity": 1, "helpfulness": 9}
    own = {"helpfulness": {"low": 1, "high": 5}, "wit": None}
    _, sides = run("oasst", fixture_trees, tmp_path / "own", attributes=own)
    assert next(row for row in rows_of(sides) if row.id == "a2").turns[1].label == {"helpfulness": 5}


def test_languages(fixture_trees, tmp_path):
    report, sides = run("oasst", fixture_trees, tmp_path / "out", languages=["de"])
    assert [row.id for row in rows_of(sides)] == ["g2"] and report["dropped"]["other_language"] == 5
    config = OmegaConf.create({"source": "oasst", "input": str(fixture_trees), "output": str(tmp_path / "o2")})
    report = prepare(OmegaConf.merge(config, {"languages": ["en"], "other_key": 1, "attributes": "helpsteer"}))
    assert report["dropped"]["other_language"] == report["dropped"]["lone_prompt"] == 1


def test_without_dedupe_every_path_keeps_its_labels(fixture_trees, tmp_path):
    report, sides = run("oasst", fixture_trees, tmp_path / "out", dedupe=False)
    shared = [row.turns[1] for row in rows_of(sides) if row.turns[1].text == "Shared answer"]
    assert len(shared) == 3 and all(turn.label and not turn.shared for turn in shared)
    assert "duplicate_conversation" not in report["dropped"] and report["shared_turns"] == 0


def many_trees(count, prompts=None, seed=0, padding=""):
    generator = random.Random(seed)
    for index in range(count):
        text = f"Prompt {generator.randrange(prompts) if prompts else index}"
        replies = [answer(f"a{index}.{k}", f"Reply {generator.randrange(30)}{padding}") for k in range(3)]
        nested = answer(f"b{index}", "Then", ask(f"c{index}", "So", *replies[1:]))
        yield tree(ask(f"t{index}", text, replies[0], nested))


def test_each_response_is_trained_once_and_no_prompt_is_on_both_sides(tmp_path):
    path = write_trees(tmp_path / "t.jsonl", list(many_trees(400, prompts=150)))
    report, (train, val) = run("oasst", path, tmp_path / "out", val_fraction=0.1)
    trained = Counter()
    for row in train + val:
        for index in row.response_indices:
            if row.turns[index].label:
                trained[tuple(turn.text for turn in row.turns[: index + 1])] += 1
        assert row.turns[-1].label  # a row always ends with something to learn
    assert set(trained.values()) == {1}
    expected = set()
    for row in many_trees(400, prompts=150):
        first, nested = row["prompt"]["replies"]
        head = (row["prompt"]["text"], "Then")
        expected |= {(head[0], first["text"]), head}
        expected |= {(*head, "So", reply["text"]) for reply in nested["replies"][0]["replies"]}
    assert set(trained) == expected and report["dropped"]["duplicate_conversation"] > 50
    sides = [{" ".join(row.turns[0].text.casefold().split()) for row in side} for side in (train, val)]
    assert not sides[0] & sides[1] and 0.04 < len(sides[1]) / 150 < 0.18


def test_the_split_follows_the_seed_and_not_the_order_of_the_file(tmp_path):
    rows = list(many_trees(200))
    forward = write_trees(tmp_path / "a.jsonl", rows)
    backward = write_trees(tmp_path / "b.jsonl", rows[::-1])

    def val(path, seed):
        return {row.id for row in run("oasst", path, tmp_path / f"{path.stem}{seed}", seed=seed)[1][1]}

    assert val(forward, 10) == val(backward, 10) != val(forward, 11)


@pytest.mark.parametrize(("count", "fraction"), [(2, 0.05), (3, 0.01), (5, 0.0), (1, 0.5), (2, 0.999), (4, 0.99)])
def test_few_prompts_leave_no_side_empty(count, fraction, tmp_path):
    for seed in range(4):
        path = write_trees(tmp_path / "a.jsonl", list(many_trees(count)))
        report, _ = run("oasst", path, tmp_path / f"out{seed}", val_fraction=fraction, seed=seed)
        assert report["train"]["conversations"] > 0
        assert (report["val"]["conversations"] > 0) == (fraction > 0 and count > 1)


@pytest.mark.real_data
def test_real_trees_train_each_labelled_message_once(tmp_path):
    source = real_data("oasst1_en_val.dev.trees.jsonl.gz")
    report, sides = run("oasst", source, tmp_path / "out", attributes="helpsteer")
    names, expected = ("quality", "toxicity", "humor", "creativity", "helpfulness"), {}

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
    report, sides = run("oasst", path, tmp_path / "out", attributes="helpsteer")
    assert [row.turns[1].label for row in rows_of(sides)] == [{"quality": 2.0}]
    assert report["dropped"] == {"unlabelled_response": 1}


@pytest.mark.parametrize("above", ["kept", "deleted"])
def test_a_reply_that_is_no_message_is_named(above, tmp_path):
    root = ask("t", "Hello", answer("a", "Hi", "not a message", deleted=above == "deleted"))
    path = write_trees(tmp_path / "t.jsonl", [tree(root)])
    with pytest.raises(DataError, match="t.jsonl:1: a reply is 'not a message', expected an object"):
        run("oasst", path, tmp_path / "out")


# -- recipe=nemo_aligner ----------------------------------------------------------------------------------------------


@pytest.mark.real_data
@pytest.mark.parametrize("packed", [True, False])
def test_the_bytes_are_nemo_aligners(packed, tmp_path):
    source = real_data("oasst1_en_val.dev.trees.jsonl.gz")
    if not packed:
        plain = tmp_path / "t.trees.jsonl"
        plain.write_bytes(gzip.decompress(source.read_bytes()))
        source = plain
    report = prepare({"source": "oasst", "input": source, "output": tmp_path / "out", "recipe": "nemo_aligner"})
    for name in ("train", "val", "train_reg", "val_reg"):
        golden = gzip.decompress(real_data(f"golden_nemo_aligner/{name}.jsonl.gz").read_bytes())
        assert (tmp_path / "out" / f"{name}.jsonl").read_bytes() == golden
    assert report["train"] == {"conversations": 581, "labelled_responses": 995}
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*FILES, "train_reg.jsonl", "val_reg.jsonl"])


def test_the_references_behaviour_on_hand_written_trees(fixture_trees, tmp_path):
    settings = {"source": "oasst", "input": fixture_trees, "recipe": "nemo_aligner", "val_fraction": 0.3}
    report = prepare({**settings, "output": tmp_path / "out"})
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
    report = prepare({**settings, "output": tmp_path / "out"})
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


# -- other sources ----------------------------------------------------------------------------------------------------


def test_the_references_files_come_back_as_deduplicated_conversations(fixture_trees, tmp_path):
    prepare(
        {
            "source": "oasst",
            "input": fixture_trees,
            "output": tmp_path / "ref",
            "recipe": "nemo_aligner",
            "val_fraction": 0,
        }
    )
    (tmp_path / "in").mkdir()
    for form in ("train", "train_reg"):
        folder = tmp_path / f"in_{form}"
        folder.mkdir()
        os.link(tmp_path / "ref" / f"{form}.jsonl", folder / "a.jsonl")
        report, sides = run("steerlm", folder, tmp_path / f"out_{form}", val_fraction=0.3)
        trained = Counter(
            (tuple(t.text for t in row.turns[: i + 1]), tuple(row.turns[i].label.items()))
            for row in rows_of(sides)
            for i in row.response_indices
            if row.turns[i].label
        )
        assert set(trained.values()) == {1} and len(trained) == 9, form
        assert all(t.label_human == t.label for row in rows_of(sides) for t in row.turns if t.label)
        assert report["dropped"]["duplicate_conversation"] >= 1


def test_messages_without_labels_are_kept_for_annotation(tmp_path):
    def dialogue(*texts, **more):
        return {
            "messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)],
            **more,
        }

    rows = [dialogue("a", "b", "c", "d", id="one"), dialogue("a", "b", "e", "f"), dialogue("a", "b"), dialogue("x")]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, [*rows, dialogue("q", "r", "s")])))
    report, sides = run("messages", tmp_path / "m.jsonl", tmp_path / "out")
    kept = {row.id: [turn.shared for turn in row.turns] for row in rows_of(sides)}
    assert kept == {"one": [False] * 4, "1": [False, True, False, False], "3": [False, False]}
    assert report["dropped"] == {
        "conversation_without_response": 1,
        "duplicate_conversation": 1,
        "unanswered_prompt": 1,
    }


def test_synthetic_is_written_through_the_same_door(tmp_path, monkeypatch):
    from nemo_steerlm.data.sources import synthetic

    def write(config, schema):
        write_conversations(config.output / "train.jsonl", [Conversation([Turn("User", str(config.seed))])])
        return {"rows": len(schema)}

    monkeypatch.setattr(synthetic, "write", write)
    report = prepare({"source": "synthetic", "output": tmp_path / "out", "seed": 3})
    assert report == {"source": "synthetic", "recipe": "default", "rows": 5}
    assert sorted(os.listdir(tmp_path / "out")) == ["report.json", "run.json", "train.jsonl"]


# -- promises ---------------------------------------------------------------------------------------------------------


def test_run_json_and_repeatability(fixture_trees, tmp_path):
    for name in ("one", "two"):
        prepare({"source": "oasst", "input": fixture_trees, "output": tmp_path / name, "attributes": "helpsteer"})
    assert sorted(os.listdir(tmp_path / "one")) == FILES
    for file in ("train.jsonl", "val.jsonl", "report.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    content = read_run_json(tmp_path / "one")
    assert content["inputs"][0]["sha256"] == hashlib.sha256(fixture_trees.read_bytes()).hexdigest()
    assert AttributeSchema.load(content["attributes"]) == AttributeSchema.load("helpsteer")
    assert content["verb"] == "prepare" and content["config"]["seed"] == 10


def test_an_earlier_result_is_replaced_and_a_killed_one_is_swept_up(fixture_trees, tmp_path):
    out = tmp_path / "out"
    prepare({"source": "oasst", "input": fixture_trees, "output": out, "recipe": "nemo_aligner"})
    (out / ".prepare-killed").mkdir()
    (out / ".prepare-killed" / "train.jsonl").write_text("half")
    (out / "notes.txt").write_text("mine")
    prepare({"source": "oasst", "input": fixture_trees, "output": out})
    assert sorted(os.listdir(out)) == sorted([*FILES, "notes.txt"])


def bad(rows, tail=b""):
    return "".join(json.dumps(row) + "\n" for row in rows).encode() + tail


GOOD_MESSAGES = {
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "label": "quality:4"}]
}
REGRESSION = "<extra_id_0>System\ns\n<extra_id_1>User\nx\n<extra_id_2>"
BAD_INPUTS = [
    ("oasst", bad(trees(), b'{"x": \n'), ":8: malformed JSON"),
    ("oasst", bad(trees(), b'{"x": "\xff"}\n'), ":8: not UTF-8"),
    ("oasst", b"", ": the file holds no row"),
    ("oasst", bad([{"message_id": "a", "parent_id": None, "text": "x"}]), ":1: no message under 'prompt'"),
    ("oasst", bad([tree(ask("a", "x", answer("b", "y") | {"role": "bot"}))]), ":1: role 'bot'"),
    ("oasst", bad([tree(ask("a", "x", answer("b", "y", scores={"quality": 1.5})))]), "'quality' is 1.5, expected 0"),
    ("oasst", bad([tree(ask("a", "x"))]), "no conversation is left; dropped: {'lone_prompt': 1}"),
    ("oasst", bad([tree(ask("a", "x", answer("b", "y", scores={"spam": 1})))]), "no conversation is left"),
    ("messages", bad([GOOD_MESSAGES, {"conversations": []}]), ":2: no 'messages' in the row; use source=steerlm"),
    ("messages", bad([{"messages": [{**GOOD_MESSAGES["messages"][1], "label": "qality:1"}]}]), "mean 'quality'?"),
    ("steerlm", bad([GOOD_MESSAGES]), ":1: neither 'conversations' nor 'text' in the row; use source=messages"),
    ("steerlm", bad([{"text": "hello", "label": [1.0] * 9}]), ":1: text does not run from"),
    ("steerlm", bad([{"text": REGRESSION, "label": [1.0]}]), "expected 9 numbers"),
    ("steerlm", bad([{"conversations": [{"from": "User", "value": "x", "label": "quality:7"}]}]), "outside its range"),
]  # fmt: skip


@pytest.mark.parametrize("recipe", ["default", "nemo_aligner"])
def test_a_damaged_gzip_file_is_named(recipe, tmp_path):
    packed = bytearray(gzip.compress(bad(many_trees(200))))
    for content in (packed[:-200], packed[:500] + b"\xff" * 200 + packed[700:]):  # cut off, changed
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match="a.jsonl.gz.*damaged"):
            prepare({"source": "oasst", "input": tmp_path / "a.jsonl.gz", "output": tmp_path / "o", "recipe": recipe})


BAD_FOR_BOTH = [("nemo_aligner", *bad) for bad in BAD_INPUTS if bad[0] == "oasst" and "is left" not in bad[2]]


@pytest.mark.parametrize(
    ("recipe", "source", "content", "message"), [("default", *bad) for bad in BAD_INPUTS] + BAD_FOR_BOTH
)
def test_bad_input_is_one_line_and_leaves_nothing(recipe, source, content, message, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        prepare(
            {
                "source": source,
                "input": path,
                "output": tmp_path / "new" / "out",
                "recipe": recipe,
                "attributes": "helpsteer",
            }
        )
    if recipe == "default" or "no row" not in message:
        assert message in str(error.value)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_no_label_for_the_schema_names_what_there_is(fixture_trees, tmp_path):
    with pytest.raises(DataError, match="no conversation is left"):
        run("oasst", fixture_trees, tmp_path / "out", attributes={"verbosity": None})
    assert not (tmp_path / "out").exists()


BAD_SETTINGS = [
    ({"source": "oast"}, "did you mean 'oasst'?"),
    ({"source": None}, "source= is missing"),
    ({"output": None}, "output is missing; give it on the command line, e.g. output="),
    ({"input": None}, "input= is missing"),
    ({"input": "/no/such/file"}, "no such file or folder"),
    ({"recipe": "nemo"}, "expected one of default, nemo_aligner"),
    ({"recipe": "nemo_aligner", "source": "steerlm"}, "is for source=oasst"),
    ({"recipe": "nemo_aligner", "attributes": "oasst_0_9"}, "writes attributes=helpsteer"),
    ({"val_fraction": 1.0}, "below 1"),
    ({"attributes": "helpster"}, "did you mean 'helpsteer'?"),
    ({"source": "hh_rlhf", "languages": ["en"]}, "leave it null"),
]


@pytest.mark.parametrize(("change", "message"), BAD_SETTINGS)
def test_bad_settings(change, message, fixture_trees, tmp_path):
    with pytest.raises(SteerLMError) as error:
        prepare({"source": "oasst", "input": fixture_trees, "output": tmp_path / "out", **change})
    assert message in str(error.value) and not (tmp_path / "out").exists()


def test_folders_of_files(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match=r"holds no file of \*_ready.trees.jsonl\*, .jsonl"):
        run("oasst", tmp_path / "in", tmp_path / "out")
    rows = list(many_trees(20))
    write_trees(tmp_path / "in" / "b.jsonl", rows[10:])
    (tmp_path / "in" / "a.jsonl.gz").write_bytes(gzip.compress(bad(rows[:10])))
    (tmp_path / "in" / "readme.txt").write_text("not data")
    report, _ = run("oasst", tmp_path / "in", tmp_path / "out")
    assert report["read"]["trees"] == 20
    with pytest.raises(ConfigError, match="is the input folder"):
        run("oasst", tmp_path / "in", tmp_path / "in")


@pytest.mark.parametrize("recipe", ["default", "nemo_aligner"])
def test_memory_does_not_grow_with_the_file(recipe, tmp_path):
    def peak(count):
        path = write_trees(tmp_path / f"{count}.jsonl", many_trees(count, padding=" word" * 1000))
        tracemalloc.start()
        prepare({"source": "oasst", "input": path, "output": tmp_path / str(count), "recipe": recipe})
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, path.stat().st_size

    peak(20)  # imports and caches
    (small, small_file), (large, large_file) = peak(50), peak(400)
    assert large_file - small_file > 5e6 and large - small < 0.3e6, (small, large)


def test_resident_memory_stays_flat_with_the_set_on_disk(tmp_path):
    """The set of histories is SQLite's memory, which Python does not trace: ask the system instead."""
    code = (
        "import re, sys\nfrom nemo_steerlm.data.prepare import prepare\n"
        "prepare({'source': 'oasst', 'input': sys.argv[1], 'output': sys.argv[2]})\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )

    def resident(count):
        path = write_trees(tmp_path / f"{count}.jsonl", many_trees(count, padding=" word" * 500))
        command = [sys.executable, "-c", code, str(path), str(tmp_path / str(count))]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return int(done.stdout) * 1024, path.stat().st_size

    (small, small_file), (large, large_file) = resident(50), resident(2000)
    assert large_file - small_file > 15e6 and large - small < 5e6, (small, large)


def test_options_are_read_from_mappings_and_objects():
    class Config:
        source, output, languages = "oasst", "x", "en"

    options = PrepareOptions.from_config(Config())
    assert options.languages == ["en"] and options.seed == 10 and options.val_fraction == 0.05
