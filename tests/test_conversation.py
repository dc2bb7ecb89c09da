from __future__ import annotations

import json
import math
from typing import Any

import pytest

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import (
    DEFAULT_SYSTEM,
    Conversation,
    Pair,
    Turn,
    check_labels,
    read_conversations,
    write_conversations,
)
from nemo_steerlm.errors import DataError

SCHEMA = AttributeSchema.load("helpsteer")


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_conversation_survives_its_file(tmp_path):
    turns = [
        Turn("User", "Line one\nline two \u2028 \U0001f600"),
        Turn("Assistant", "", label={"quality": 3.0}, label_human={"quality": 2.5}, label_model="abc"),
        Turn("User", "again"),
        Turn("Assistant", "shared", label_predicted={"quality": 3.71234, "humor": -0.2}, shared=True),
    ]
    conversation = Conversation(turns, system="", id="x1", mask="User,Tool", type=None, extra={"lang": "de", "n": [1]})
    assert write_conversations(tmp_path / "a.jsonl", [conversation]) == 1
    record = json.loads((tmp_path / "a.jsonl").read_text())
    assert record["conversations"][3]["label_predicted"] == "quality:3.7123,humor:-0.2000"
    assert record["conversations"][1] == {
        "from": "Assistant", "value": "", "label": "quality:3", "label_human": "quality:2.5", "label_model": "abc",
    }  # fmt: skip
    [again] = read_conversations(tmp_path / "a.jsonl", SCHEMA)
    turns[3].label_predicted = {"quality": 3.7123, "humor": -0.2}
    assert again == conversation


def test_openai_rows_are_read(tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": "Hello", "label": "quality:4"},
    ]
    first, second = read_conversations(write(tmp_path / "a.jsonl", {"messages": messages}, {"messages": messages[1:]}))
    assert first.system == "Be brief." and second.system == DEFAULT_SYSTEM
    assert first.turns == [Turn("User", "Hi there"), Turn("Assistant", "Hello", label={"quality": 4.0})]
    assert (first.id, second.id, first.type) == ("0", "1", "VALUE_TO_TEXT")


def test_a_row_without_type_is_plain_fine_tuning(tmp_path):
    row = {"conversations": [{"from": "User", "value": "a"}, {"from": "Assistant", "value": "b"}], "system": None}
    [conversation] = read_conversations(write(tmp_path / "a.jsonl", row))
    assert conversation.type is None and conversation.system == DEFAULT_SYSTEM and conversation.response_indices == [1]


def test_labels_without_a_type_are_shown_and_a_null_type_is_believed(tmp_path):
    labelled = turn(label="quality:4")
    rows = read_conversations(write(tmp_path / "a.jsonl", labelled, {**labelled, "type": None}))
    assert [row.type for row in rows] == ["VALUE_TO_TEXT", None]


def said(*names, **more):
    return {"conversations": [{"from": name, "value": f"{n}"} for n, name in enumerate(names)], **more}


def test_the_words_of_people_are_never_taken_for_the_models(tmp_path):
    rows = [
        said("system", "human", "gpt", "human", "gpt"),
        said("USER", "assistant"),
        said("human", "gpt", mask="human", system="Be brief."),
        said("User", "Bot"),
        said("Alice", "Bob", mask="Alice"),
        said("System", "User", "Assistant", mask="System, User"),
    ]
    found = list(read_conversations(write(tmp_path / "a.jsonl", *rows)))
    assert [[row.turns[i].text for i in row.response_indices] for row in found] == [
        ["2", "4"], ["1"], ["1"], ["1"], ["1"], ["2"],
    ]  # fmt: skip
    assert {found[n].turns[-1].speaker for n in (0, 1, 2)} == {"Assistant"}
    assert [found[0].system, found[2].system] == ["0", "Be brief."] and found[2].mask == "User"
    again = tmp_path / "b.jsonl"
    write_conversations(again, found)
    assert list(read_conversations(again)) == found


STRANGERS = [
    (said("prompter", "bot"), "the speaker 'prompter' is neither masked (mask is 'User') nor called Assistant"),
    (said("User", "Tool", "Assistant"), "the speaker 'Tool' is neither masked"),
    (said("Bot"), "the speaker 'Bot' is neither masked"),
    (said("User", "Assistant", mask=""), "the speaker 'User' is neither masked (mask is '')"),
    (said("human", "system", "gpt"), "a turn of 'system' is not the first"),
    (said("system"), "no turn but the system's"),
]


@pytest.mark.parametrize(("row", "message"), STRANGERS)
def test_a_speaker_nobody_knows_is_refused(row, message, tmp_path):
    with pytest.raises(DataError) as error:
        list(read_conversations(write(tmp_path / "a.jsonl", row)))
    assert str(error.value).startswith(f"{tmp_path}/a.jsonl:1: ") and message in str(error.value)


def test_other_keys_of_a_turn_stay_with_it(tmp_path):
    calls = [{"id": "1", "function": {"name": "f"}}]
    rows = [
        turn(weight=0, label="quality:4"),
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": calls}]},
    ]
    found = list(read_conversations(write(tmp_path / "a.jsonl", *rows)))
    assert [row.turns[1].extra for row in found] == [{"weight": 0}, {"tool_calls": calls}]
    write_conversations(tmp_path / "b.jsonl", found)
    assert list(read_conversations(tmp_path / "b.jsonl")) == found


def turn(**keys):
    return {"conversations": [{"from": "User", "value": "x"}, {"from": "Assistant", "value": "y", **keys}]}


BAD_ROWS = [
    ({}, "expected a non-empty list under 'conversations', found nothing"),
    ({"conversations": []}, "non-empty list"),
    ({"conversations": ["x"]}, "conversations[0] is 'x', expected an object"),
    ({"conversations": [{"from": "User"}]}, "conversations[0] has no 'value'"),
    ({"conversations": [{"from": 3, "value": "x"}]}, "conversations[0].from is 3, expected a string"),
    (turn(label=4), "conversations[1]: label: label is 4, expected a string"),
    (turn(label="quality:5"), "conversations[1]: attribute 'quality' is 5, outside its range 0 to 4"),
    (turn(label_human="quality:-1"), "conversations[1]: attribute 'quality' is -1, outside its range 0 to 4"),
    (turn() | {"type": "TEXT_TO_VALUE"}, "is not supported"),
    (turn() | {"mask": 3}, "mask is 3"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0] has the role 'tool'"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is None"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "system", "content": "x"}]}, "no user or assistant turn"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_bad_rows_name_line_and_key(row, message, tmp_path):
    path = write(tmp_path / "rows.jsonl", turn(), row)
    with pytest.raises(DataError) as error:
        list(read_conversations(path, SCHEMA))
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)


@pytest.mark.parametrize("key", ["label", "label_human", "label_predicted"])
def test_labels_are_cut_to_the_schema_on_reading_and_refused_where_data_is_made(key, tmp_path):
    row = turn(**{key: "qality:1,quality:2"})
    [conversation] = read_conversations(write(tmp_path / "a.jsonl", row), SCHEMA)
    assert getattr(conversation.turns[1], key) == {"quality": 2.0}
    [conversation] = read_conversations(write(tmp_path / "a.jsonl", turn(**{key: "qality:1"})), SCHEMA)
    assert getattr(conversation.turns[1], key) is None
    with pytest.raises(DataError, match="a: conversations.1.: unknown attribute 'qality'; did you mean 'quality'"):
        check_labels(Conversation.from_record(row), SCHEMA, "a")


def test_predicted_floats_may_overshoot_the_range(tmp_path):
    [conversation] = read_conversations(write(tmp_path / "a.jsonl", turn(label_predicted="quality:4.3")), SCHEMA)
    assert conversation.turns[1].label_predicted == {"quality": 4.3}


def test_lone_surrogates_do_not_stop_a_run(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"note": "\ud800", "conversations": [{"from": "User", "value": "a\udc00b"}]}')
    [conversation] = read_conversations(tmp_path / "a.jsonl")
    assert conversation.turns[0].text == "a\ufffdb"
    write_conversations(tmp_path / "b.jsonl", [conversation])
    assert json.loads((tmp_path / "b.jsonl").read_text(encoding="utf-8"))["note"] == "\ud800"


def test_a_line_is_written_as_json_writes_it():
    texts = "".join(chr(code) for code in range(0x11000) if not 0xD800 <= code < 0xE000)
    extra: dict[str, Any] = {"n": [1, -2.5, 2**70, True, None, {}, []], "half a pair": "\ud800"}
    kinds: tuple[dict[str, Any], ...] = ({}, {"n": extra["n"]}, extra)
    for more in kinds:
        conversation = Conversation([Turn("User", texts), Turn("Assistant", "b")], id="x", extra=more)
        assert conversation.to_line() == json.dumps(conversation.to_record(), ensure_ascii=False) + "\n"
    conversation.extra = {"n": [math.nan, math.inf]}
    assert json.loads(conversation.to_line())["n"] == [None, None]


def test_both_halves_of_a_pair_survive_their_file(tmp_path):
    halves = [
        Conversation([Turn("User", "q"), Turn("Assistant", role, label_count=3)], id=role, pair=Pair("p", role, 2.5))
        for role in ("chosen", "rejected")
    ]
    write_conversations(tmp_path / "a.jsonl", halves)
    assert list(read_conversations(tmp_path / "a.jsonl")) == halves
    row = json.loads((tmp_path / "a.jsonl").read_text().split("\n")[0])
    assert row["pair"] == {"id": "p", "role": "chosen", "strength": 2.5}
    bare = {**row, "pair": {"id": 7, "role": "rejected"}}
    assert Conversation.from_record(bare).pair == Pair("7", "rejected", 1.0)
    assert Conversation.from_record({**row, "pair": None}).pair is None


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("p", "pair is 'p'"),
        ({"id": "p", "role": "chosen", "margin": 1}, 'expected {"id"'),
        ({"role": "chosen"}, "pair.id is None"),
        ({"id": True, "role": "chosen"}, "pair.id is True"),
        ({"id": "p", "role": "better"}, "pair.role is 'better', expected chosen or rejected"),
        ({"id": "p", "role": "chosen", "strength": -1}, "pair.strength is -1, expected a number of at least 0"),
        ({"id": "p", "role": "chosen", "strength": float("nan")}, "pair.strength is nan"),
        ({"id": "p", "role": "chosen", "strength": "2"}, "pair.strength is '2'"),
    ],
)
def test_a_malformed_pair_is_named(pair, message, tmp_path):
    path = write(tmp_path / "a.jsonl", {"pair": pair, "conversations": [{"from": "User", "value": "x"}]})
    with pytest.raises(DataError) as error:
        list(read_conversations(path))
    assert str(error.value).startswith(f"{path}:1: ") and message in str(error.value)


@pytest.mark.parametrize("count", [0, -1, True, 1.5, "3"])
def test_a_malformed_count_of_people_is_named(count, tmp_path):
    path = write(tmp_path / "a.jsonl", turn(label_count=count))
    with pytest.raises(DataError, match=r"a.jsonl:1: conversations\[1\]: label_count is"):
        list(read_conversations(path))
