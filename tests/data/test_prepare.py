"""Splits, duplicates, files and memory of `prepare`, and what it promises of bad input."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from omegaconf import MISSING

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import PREPARE_SOURCES
from nemo_steerlm.conversation import Conversation, Turn, write_conversations
from nemo_steerlm.data.prepare import prepare
from nemo_steerlm.data.sources.registry import SOURCES
from nemo_steerlm.errors import ConfigError, DataError, SteerLMError
from nemo_steerlm.provenance import read_run_json
from tests.data.helpers import FILES, prepare_config, refused, rows_of, run, run_sides, steer, write
from tests.data.trees import answer, ask, many_trees, tree, trees, write_trees


def test_the_command_line_knows_every_source():
    assert {*SOURCES, "synthetic"} == set(PREPARE_SOURCES)


# -- splits and duplicates --------------------------------------------------------------------------------------------


def test_without_dedupe_every_path_keeps_its_labels(fixture_trees, tmp_path):
    report, sides = run_sides("oasst", fixture_trees, tmp_path / "out", dedupe=False)
    shared = [row.turns[1] for row in rows_of(sides) if row.turns[1].text == "Shared answer"]
    assert len(shared) == 3 and all(turn.label and not turn.shared for turn in shared)
    assert "duplicate_conversation" not in report["dropped"] and report["shared_turns"] == 0


def test_each_response_is_trained_once_and_no_prompt_is_on_both_sides(tmp_path):
    path = write_trees(tmp_path / "t.jsonl", list(many_trees(400, prompts=150)))
    report, (train, val) = run_sides("oasst", path, tmp_path / "out", val_fraction=0.1)
    trained: Counter[tuple[str, ...]] = Counter()
    for row in train + val:
        for index in row.response_indices:
            if row.turns[index].label:
                trained[tuple(turn.text for turn in row.turns[: index + 1])] += 1
        assert row.turns[-1].label  # a row always ends with something to learn
    assert set(trained.values()) == {1}
    expected: set[tuple[str, ...]] = set()
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
        return {row.id for row in run_sides("oasst", path, tmp_path / f"{path.stem}{seed}", seed=seed)[1][1]}

    assert val(forward, 10) == val(backward, 10) != val(forward, 11)


@pytest.mark.parametrize(("count", "fraction"), [(2, 0.05), (3, 0.01), (5, 0.0), (1, 0.5), (2, 0.999), (4, 0.99)])
def test_few_prompts_leave_no_side_empty(count, fraction, tmp_path):
    for seed in range(4):
        path = write_trees(tmp_path / "a.jsonl", list(many_trees(count)))
        report, _ = run_sides("oasst", path, tmp_path / f"out{seed}", val_fraction=fraction, seed=seed)
        assert report["train"]["conversations"] > 0
        assert (report["val"]["conversations"] > 0) == (fraction > 0 and count > 1)


def test_a_split_of_its_own_must_be_told_by_someone(tmp_path):
    path = write(tmp_path / "all.jsonl", [steer("a", "b", 1)])
    refused("does not tell one", "helpsteer", path, tmp_path, val_fraction=None)
    with pytest.raises(ConfigError, match="not known here"):
        prepare(prepare_config(source="synthetic", output=tmp_path / "out", val_fraction=None))


# -- promises ---------------------------------------------------------------------------------------------------------


def test_synthetic_is_written_through_the_same_door(tmp_path, monkeypatch):
    from nemo_steerlm.data.sources import synthetic

    def write(config, schema):
        write_conversations(Path(config.output) / "train.jsonl", [Conversation([Turn("User", str(config.seed))])])
        return {"rows": len(schema)}

    monkeypatch.setattr(synthetic, "write", write)
    report = prepare(prepare_config(source="synthetic", output=tmp_path / "out", seed=3))
    assert report == {"source": "synthetic", "recipe": "default", "rows": 5}
    assert sorted(os.listdir(tmp_path / "out")) == ["report.json", "run.json", "train.jsonl"]


def test_run_json_and_repeatability(fixture_trees, tmp_path):
    for name in ("one", "two"):
        prepare(prepare_config(source="oasst", input=fixture_trees, output=tmp_path / name, attributes="helpsteer"))
    assert sorted(os.listdir(tmp_path / "one")) == FILES
    for file in ("train.jsonl", "val.jsonl", "report.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    content = read_run_json(tmp_path / "one")
    assert content["inputs"][0]["sha256"] == hashlib.sha256(fixture_trees.read_bytes()).hexdigest()
    assert AttributeSchema.load(content["attributes"]) == AttributeSchema.load("helpsteer")
    assert content["verb"] == "prepare" and content["config"]["seed"] == 10


def test_an_earlier_result_is_replaced_and_a_killed_one_is_swept_up(fixture_trees, tmp_path):
    out = tmp_path / "out"
    prepare(prepare_config(source="oasst", input=fixture_trees, output=out, recipe="nemo_aligner"))
    (out / ".prepare-killed").mkdir()
    (out / ".prepare-killed" / "train.jsonl").write_text("half")
    (out / "notes.txt").write_text("mine")
    prepare(prepare_config(source="oasst", input=fixture_trees, output=out))
    assert sorted(os.listdir(out)) == sorted([*FILES, "notes.txt"])


@pytest.mark.parametrize("way", ["train.jsonl", "link.jsonl"])
def test_the_input_is_never_replaced_by_the_output(way, tmp_path):
    path = write(tmp_path / "out" / "train.jsonl", [steer("a", "b", 1), steer("c", "d", 1)])
    (tmp_path / "link.jsonl").symlink_to(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="would replace the input"):
        run("helpsteer", tmp_path / "link.jsonl" if way == "link.jsonl" else path, tmp_path)
    assert path.read_bytes() == before
    report = prepare(prepare_config(source="helpsteer", input=path, output=tmp_path / "out", check=True))
    assert report["train"]["conversations"] + report["val"]["conversations"] == 2


@pytest.mark.parametrize("recipe", ["default", "nemo_aligner"])
def test_memory_does_not_grow_with_the_file(recipe, tmp_path):
    def peak(count):
        path = write_trees(tmp_path / f"{count}.jsonl", many_trees(count, padding=" word" * 1000))
        tracemalloc.start()
        prepare(prepare_config(source="oasst", input=path, output=tmp_path / str(count), recipe=recipe))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, path.stat().st_size

    peak(20)  # imports and caches
    (small, small_file), (large, large_file) = peak(50), peak(400)
    assert large_file - small_file > 5e6 and large - small < 0.3e6, (small, large)


def test_resident_memory_stays_flat_with_the_set_on_disk(tmp_path):
    """The set of histories is SQLite's memory, which Python does not trace: ask the system instead."""
    code = (
        "import re, sys\n"
        "from nemo_steerlm.config import PrepareConfig\nfrom nemo_steerlm.data.prepare import prepare\n"
        "prepare(PrepareConfig(source='oasst', input=sys.argv[1], output=sys.argv[2]))\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )

    def resident(count):
        path = write_trees(tmp_path / f"{count}.jsonl", many_trees(count, padding=" word" * 500))
        command = [sys.executable, "-c", code, str(path), str(tmp_path / str(count))]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return int(done.stdout) * 1024, path.stat().st_size

    (small, small_file), (large, large_file) = resident(50), resident(2000)
    assert large_file - small_file > 15e6 and large - small < 5e6, (small, large)


# -- bad input --------------------------------------------------------------------------------------------------------


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
            run("oasst", tmp_path / "a.jsonl.gz", tmp_path, recipe=recipe)


BAD_FOR_BOTH = [("nemo_aligner", *bad) for bad in BAD_INPUTS if bad[0] == "oasst" and "is left" not in bad[2]]


@pytest.mark.parametrize(
    ("recipe", "source", "content", "message"), [("default", *bad) for bad in BAD_INPUTS] + BAD_FOR_BOTH
)
def test_bad_input_is_one_line_and_leaves_nothing(recipe, source, content, message, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        prepare(
            prepare_config(
                source=source, input=path, output=tmp_path / "new" / "out", recipe=recipe, attributes="helpsteer"
            )
        )
    if recipe == "default" or "no row" not in message:
        assert message in str(error.value)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_no_label_for_the_schema_names_what_there_is(fixture_trees, tmp_path):
    with pytest.raises(DataError, match="no conversation is left"):
        run_sides("oasst", fixture_trees, tmp_path / "out", attributes={"verbosity": None})
    assert not (tmp_path / "out").exists()


BAD_SETTINGS = [
    ({"source": "oast"}, "did you mean 'oasst'?"),
    ({"source": MISSING}, "source is missing; give it on the command line, e.g. source="),
    ({"output": None}, "output is missing; give it on the command line, e.g. output="),
    ({"input": None}, "input= is missing"),
    ({"input": "/no/such/file"}, "no such file or folder"),
    ({"recipe": "nemo"}, "expected default or nemo_aligner"),
    ({"recipe": "nemo_aligner", "source": "steerlm"}, "is for source=oasst"),
    ({"recipe": "nemo_aligner", "attributes": "oasst_0_9"}, "writes attributes=helpsteer"),
    ({"val_fraction": 1.0}, "expected less than 1"),
    ({"attributes": "helpster"}, "did you mean 'helpsteer'?"),
    ({"source": "hh_rlhf", "languages": ["en"]}, "leave it null"),
]


@pytest.mark.parametrize(("change", "message"), BAD_SETTINGS)
def test_bad_settings(change, message, fixture_trees, tmp_path):
    with pytest.raises(SteerLMError) as error:
        prepare(prepare_config(**{"source": "oasst", "input": fixture_trees, "output": tmp_path / "out", **change}))
    assert message in str(error.value) and not (tmp_path / "out").exists()
