"""Every source on a few rows of our own in its hub layout."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from nemo_steerlm.config import PREPARE_SOURCES
from nemo_steerlm.conversation import Conversation, Pair, Turn, read_conversations, write_conversations
from nemo_steerlm.data.prepare import SOURCES, prepare
from nemo_steerlm.errors import ConfigError, DataError, SteerLMError
from tests.tokenizers import real_data


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def run(source, path, folder, **settings):
    report = prepare({"source": source, "input": path, "output": folder / "out", "val_fraction": 0, **settings})
    return report, list(read_conversations(folder / "out" / "train.jsonl"))


def refused(message, source, path, folder, **settings):
    with pytest.raises(SteerLMError) as error:
        run(source, path, folder, **settings)
    assert message in str(error.value) and not (folder / "out").exists()


def test_the_command_line_knows_every_source():
    assert {*SOURCES, "synthetic"} == set(PREPARE_SOURCES)


# -- HelpSteer --------------------------------------------------------------------------------------------------------


def steer(prompt, response, *ratings):
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"prompt": prompt, "response": response, **dict(zip(names, ratings))}


def test_helpsteer_and_its_own_split(tmp_path):
    rows = [steer("Why?", "Because.", 3, 4, 4, 1, 0), steer("Why?", " ", 0, 0, 0, 0, 0)]
    write(tmp_path / "hub" / "train.jsonl.gz", rows)
    write(tmp_path / "hub" / "validation.jsonl.gz", [steer("How?", "So.", 2, 2, 4, 1, 1)])
    write(tmp_path / "hub" / "other" / "noise.jsonl", [{"x": 1}])
    report, rows = run("helpsteer", tmp_path / "hub", tmp_path, val_fraction=None, dataset="mine")
    assert [(turn.speaker, turn.text) for turn in rows[0].turns] == [("User", "Why?"), ("Assistant", "Because.")]
    expected = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 0}
    assert rows[0].turns[1].label == rows[0].turns[1].label_human == expected
    assert rows[0].extra == {"dataset": "mine"} and report["dropped"] == {"empty_response": 1}
    [val] = read_conversations(tmp_path / "out" / "val.jsonl")
    assert val.turns[0].text == "How?" and report["prompts"]["val"] == 1 and report["prompts"]["in_both"] == 0


def test_helpsteer2_prompts_of_several_turns_and_the_ratings_of_each_person(tmp_path):
    prompt = "c#\n<extra_id_1>Assistant\nA language.\n<extra_id_1>User\nAnd then?"
    rows = [steer(prompt, "More.", [3, 4, 4], [4, 4, 4], [4, 4], [2, 1, 2], [1, 1, 2])]
    path = write(tmp_path / "disagreements.jsonl.gz", rows)
    report, [row] = run("helpsteer2", path, tmp_path, attributes="helpsteer")
    texts = [("User", "c#"), ("Assistant", "A language."), ("User", "And then?"), ("Assistant", "More.")]
    assert [(turn.speaker, turn.text) for turn in row.turns] == texts
    assert row.turns[3].label == pytest.approx(
        {"helpfulness": 11 / 3, "correctness": 4, "coherence": 4, "complexity": 5 / 3, "verbosity": 4 / 3}, abs=1e-4
    )
    assert row.turns[3].label_count == 2 and row.turns[1].label is None  # the least there is of any attribute
    agreement = report["rater_agreement"]
    assert agreement["coherence"] == {"items": 1, "ratings": 2, "alpha": None}  # all the same: nothing to tell
    # pairs lie 1, 1, 0 apart (squared), of one item or of any: alpha = 1 - (2/3) / (2/3)
    assert agreement["helpfulness"] == {"items": 1, "ratings": 3, "alpha": 0.0}


def test_ratings_are_stretched_onto_the_schemas_range(tmp_path):
    path = write(tmp_path / "a.jsonl", [steer("a", "b", 1, 4)])
    wide = {"helpfulness": {"low": 1, "high": 9}, "humor": None}
    _, [row] = run("helpsteer", path, tmp_path, attributes=wide)
    assert row.turns[1].label == {"helpfulness": 3.0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (steer("a", "b", 5), "a.jsonl:1: 'helpfulness' is 5, expected 0 to 4"),
        (steer("a", "b", "good"), "'helpfulness' is 'good', expected 0 to 4"),
        ({"prompt": "a"}, "a.jsonl:1: 'response' is missing; the row has prompt"),
        (steer(["a"], "b", 1), "'prompt' is ['a'], expected a string"),
        (steer("a", "b"), "all labels are missing for the attributes helpfulness"),
    ],
)
def test_malformed_helpsteer_rows(row, message, tmp_path):
    refused(message, "helpsteer2", write(tmp_path / "a.jsonl", [row]), tmp_path)


# -- preferences ------------------------------------------------------------------------------------------------------


def pairs_of(rows):
    """Pair id to {role: row}; every pair has both halves."""
    found: dict = {}
    for row in rows:
        assert row.pair.role not in found.setdefault(row.pair.id, {})
        found[row.pair.id][row.pair.role] = row
    assert all(set(halves) == {"chosen", "rejected"} for halves in found.values())
    return list(found.values())


def preference(prompt, one, two, strength, split="train", people=()):
    return {"split": split, "prompt": prompt, "response_1": one, "response_2": two, "preference_strength": strength,
            "preference_statement": "s", "preference_elaboration": "e",
            "all_preferences_unprocessed": [{"strength": one, "justification": "j"} for one in people]}  # fmt: skip


def test_helpsteer2_preference(tmp_path):
    rows = [
        preference("p", "left", "right", -2, people=(-2, -3, -100)),  # the last one found it impossible to compare
        preference("q", "left", "right", 3, split="validation", people=(3, 3, 2)),
        preference("r", "left", "right", 0),
        preference("r", "same", "same", 1),
        preference("p", "left", "right", -2),
    ]
    path = write(tmp_path / "hub" / "preference" / "preference.jsonl.gz", rows)
    report, train = run("helpsteer2_preference", tmp_path / "hub", tmp_path, val_fraction=None)
    [halves] = pairs_of(train)
    assert {role: row.turns[-1].text for role, row in halves.items()} == {"chosen": "left", "rejected": "right"}
    assert halves["chosen"].pair.strength == halves["rejected"].pair.strength == 2.0
    assert not any(turn.label for row in train for turn in row.turns)
    [halves] = pairs_of(read_conversations(tmp_path / "out" / "val.jsonl"))
    assert halves["chosen"].turns[-1].text == "right" and halves["chosen"].pair.strength == 3.0
    assert report["dropped"] == {"duplicate_pair_row": 2, "pair_of_equal_responses": 1, "tie": 1}
    assert report["pairs"]["train"] == {"chosen": 1, "rejected": 1, "complete": True}
    assert {**report["rater_agreement"]["preference"], "alpha": 0} == {"items": 2, "ratings": 5, "alpha": 0}
    assert 0.9 < report["rater_agreement"]["preference"]["alpha"] < 1
    assert report["pairs"]["strengths"] == {"2": 1, "3": 1} and path.is_file()
    bad = write(tmp_path / "bad.jsonl", [preference("p", "a", "b", 4)])
    (tmp_path / "new").mkdir()
    message = "bad.jsonl:1: 'preference_strength' is 4, expected -3 to 3"
    refused(message, "helpsteer2_preference", bad, tmp_path / "new")


def test_halves_of_a_pair_stay_together_when_a_response_stands_twice(tmp_path):
    told = [("best", "bad", -1), ("best", "worse", -2), ("bad", "best", 1)]
    rows = [preference("p", *one) for one in told]
    _, found = run("helpsteer2_preference", write(tmp_path / "a.jsonl", rows), tmp_path)
    assert len(pairs_of(found)) == 2  # the third says what the first does, in another order
    again = write_conversations(tmp_path / "b.jsonl", found)
    (tmp_path / "two").mkdir()
    _, same = run("steerlm", tmp_path / "b.jsonl", tmp_path / "two")
    assert again == len(same) == 2 * len(pairs_of(same))


def test_a_missing_half_is_told(tmp_path, caplog):
    halves = [
        Conversation([Turn("User", "q"), Turn("Assistant", f"{name} {role}")], pair=Pair(name, role))
        for name, role in (("a", "chosen"), ("b", "rejected"), ("c", "rejected"), ("c", "chosen"))
    ]
    write_conversations(tmp_path / "a.jsonl", halves)
    report, rows = run("steerlm", tmp_path / "a.jsonl", tmp_path)
    assert len(rows) == 4 and report["pairs"]["train"] == {"chosen": 2, "rejected": 2, "complete": False}
    assert "train holds halves of preference pairs" in caplog.text


def context(*texts):
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def test_helpsteer3(tmp_path):
    people = [
        {"score": -2, "reasoning": "r", "feedback1": "The response is mostly helpful. Yes.", "feedback2": None},
        {"score": -1, "reasoning": "r", "feedback1": "The response is perfectly helpful.", "feedback2": "No grade."},
    ]
    system = {"role": "system", "content": "Be brief."}
    one = {"domain": "general", "language": "english", "context": [system, *context("a", "b", "c")],
           "response1": "left", "response2": "right", "overall_preference": -2,
           "individual_preference": people}  # fmt: skip
    two = {**one, "language": "french", "context": context("x"), "overall_preference": 1}
    two["individual_preference"] = []
    texts = ["The response is not helpful at all.", "The response is slightly helpful.", "Hm."]
    feedback = {"domain": "stem", "language": "english", "context": context("f"), "response1": "answer",
                "response2": "other", "feedback1": texts,
                "feedback2": ["The response is perfectly helpful."]}  # fmt: skip
    write(tmp_path / "hub" / "preference" / "train.jsonl.gz", [one, two])
    write(tmp_path / "hub" / "feedback" / "train.jsonl.gz", [feedback])
    write(tmp_path / "hub" / "edit" / "train.jsonl.gz", [{"other": 1}])
    report, rows = run("helpsteer3", tmp_path / "hub", tmp_path)
    assert report["languages"] == {"english": 4, "french": 2}
    lone, other, halves, french = rows[0], rows[1], *pairs_of(rows[2:])
    assert lone.turns[-1].label == {"helpfulness": 0.5} and lone.turns[-1].label_count == 2 and lone.pair is None
    assert [turn.text for turn in other.turns] == ["f", "other"] and other.turns[-1].label == {"helpfulness": 4}
    assert report["read"] == {"rows_of_feedback": 1, "responses": 2, "comparisons": 2}
    assert report["rater_agreement"]["preference"]["ratings"] == 2
    assert {halves[role].system for role in halves} == {"Be brief."}
    chosen = halves["chosen"].turns
    assert [turn.text for turn in chosen] == ["a", "b", "c", "left"]
    assert chosen[-1].label_human == {"helpfulness": 3.5} and chosen[-1].label_count == 2
    assert halves["rejected"].turns[-1].label is None and halves["rejected"].pair.strength == 2.0
    assert halves["chosen"].extra["preference_count"] == 2 and french["chosen"].turns[-1].text == "right"
    (tmp_path / "fr").mkdir()
    report, rows = run("helpsteer3", tmp_path / "hub", tmp_path / "fr", languages=["French"])
    assert len(rows) == 2 and report["dropped"] == {"other_language": 2}
    assert report["other_languages"] == {"english": 2}
    (tmp_path / "bad").mkdir()
    message = "there are the languages english, french"
    refused(message, "helpsteer3", tmp_path / "hub", tmp_path / "bad", languages=["en"])
    bad = write(tmp_path / "bad.jsonl", [{"context": context("x"), "response": "y"}])
    refused("bad.jsonl:1: neither 'overall_preference' nor 'feedback1'", "helpsteer3", bad, tmp_path / "bad")


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


# -- the others -------------------------------------------------------------------------------------------------------


def test_ultrafeedback(tmp_path):
    def completion(text, **ratings):
        annotations = {name: {"Rating": value, "Rationale": "r"} for name, value in ratings.items()}
        return {"model": "m", "response": text, "annotations": annotations, "overall_score": 7}

    good = completion("good", helpfulness="5", honesty="N/A", truthfulness=4)
    row = {"source": "s", "instruction": "ask", "models": []}
    row["completions"] = [good, completion("bad", helpfulness="1")]
    report, rows = run("ultrafeedback", write(tmp_path / "a.jsonl", [row]), tmp_path)
    assert rows[0].turns[1].label == {"truthfulness": 4, "helpfulness": 5}
    assert rows[0].turns[1].label_human is None and rows[0].extra["model"] == "m"
    assert report["labels"]["helpfulness"] == {"1": 1, "5": 1} and report["read"] == {"prompts": 1, "responses": 2}
    (tmp_path / "four").mkdir()
    _, rows = run("ultrafeedback", tmp_path / "a.jsonl", tmp_path / "four", attributes="helpsteer")
    assert [row.turns[1].label for row in rows] == [{"helpfulness": 4}, {"helpfulness": 0}]
    (tmp_path / "bad").mkdir()
    bad = write(tmp_path / "bad.jsonl", [{"instruction": "ask", "completions": [completion("x", helpfulness=6)]}])
    message = "bad.jsonl:1: completions[0]: 'helpfulness' is 6, expected 1 to 5"
    refused(message, "ultrafeedback", bad, tmp_path / "bad")
    odd = {"response": "x", "annotations": [5]}
    bad = write(tmp_path / "bad.jsonl", [{"instruction": "ask", "completions": [odd]}])
    message = "bad.jsonl:1: completions[0]: 'annotations' is [5], expected an object"
    refused(message, "ultrafeedback", bad, tmp_path / "bad")


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


TABLE = [
    {"ask": "a,\nb", "answer": "c", "mark": "3", "lang": "en", "who": ""},
    {"ask": "d", "answer": "e", "mark": "", "lang": "de", "who": "7"},
    {"ask": "f", "answer": "", "mark": "1", "lang": "en", "who": "8"},
]
COLUMNS = {"prompt": "ask", "response": "answer", "quality": "mark", "language": "lang", "id": "who"}


def table_file(path: Path, rows: list[dict]) -> Path:
    if path.name.endswith(".parquet"):
        parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        typed = [{**row, "mark": float(row["mark"]) if row["mark"] else None} for row in rows]
        parquet.write_table(pyarrow.Table.from_pylist(typed), path)
    elif path.name.endswith(".jsonl"):
        write(path, rows)
    else:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "wt", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def test_nothing_in_a_table_and_counts_of_people(tmp_path):
    rows = [
        {"ask": None, "answer": "a", "mark": 1, "people": 2},
        {"ask": "b", "answer": None, "mark": 1, "people": 2},
        {"ask": "c", "answer": "c", "mark": None, "people": 0},
        {"ask": "d", "answer": "d", "mark": 1, "people": 2.0},
    ]
    columns = {"prompt": "ask", "response": "answer", "quality": "mark", "label_count": "people"}
    report, found = run("table", write(tmp_path / "a.jsonl", rows), tmp_path, columns=columns)
    assert [row.turns[1].label_count for row in found] == [None, 2]
    assert report["dropped"] == {"empty_prompt": 1, "empty_response": 1}
    (tmp_path / "bad").mkdir()
    for count in (0, 1.5, "inf"):
        bad = write(tmp_path / "b.jsonl", [{**rows[3], "people": count}])
        refused("b.jsonl:1: column 'people' is", "table", bad, tmp_path / "bad", columns=columns)


def test_a_cell_of_csv_may_hold_a_whole_book(tmp_path):
    (tmp_path / "t.csv").write_text(f"ask,answer,,\na,{'long ' * 40_000},,\n")
    _, [row] = run("table", tmp_path / "t.csv", tmp_path, columns={"prompt": "ask", "response": "answer"})
    assert len(row.turns[1].text) == 200_000


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet", "t.jsonl"])
def test_tables(name, tmp_path):
    path = table_file(tmp_path / name, TABLE)
    report, rows = run("table", path, tmp_path, columns=COLUMNS)
    assert [(row.id, row.turns[0].text, row.turns[1].label) for row in rows] == [
        ("0", "a,\nb", {"quality": 3.0}),
        ("7", "d", None),
    ]
    assert rows[1].extra == {"lang": "de", "dataset": "table"} and report["dropped"] == {"empty_response": 1}
    (tmp_path / "en").mkdir()
    _, rows = run("table", path, tmp_path / "en", columns=COLUMNS, languages=["de"])
    assert [row.id for row in rows] == ["7"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": {"prompt": "ask"}}, "columns has no 'response'"),
        ({"columns": None}, "columns has no 'prompt'"),
        ({"columns": {**COLUMNS, "qality": "mark"}}, "columns.qality: expected one of prompt"),
        ({"columns": {**COLUMNS, "humor": "marks"}}, "t.csv:3: no column 'marks' (for humor); did you mean 'mark'?"),
        ({"columns": {**COLUMNS, "quality": "lang"}}, "column 'lang' is 'en', expected a number"),
        ({"columns": {"prompt": "ask", "response": "answer"}, "languages": ["en"]}, "columns.language=NAME"),
        ({"source": "messages"}, "columns is for source=table, found source=messages"),
    ],
)
def test_mistakes_with_tables(change, message, tmp_path):
    settings = {"source": "table", "columns": COLUMNS, **change}
    refused(message, settings.pop("source"), table_file(tmp_path / "t.csv", TABLE), tmp_path, **settings)


def test_damaged_tables(tmp_path):
    (tmp_path / "t.csv").write_text("ask,answer\na,b,c\n")
    refused("t.csv:2: not as many cells as the header has names (ask, answer)", "table", tmp_path / "t.csv", tmp_path,
            columns={"prompt": "ask", "response": "answer"})  # fmt: skip
    (tmp_path / "t.csv").write_text("ask,answer,ask\na,b,c\n")
    refused("t.csv:1: the column 'ask' is there twice", "table", tmp_path / "t.csv", tmp_path,
            columns={"prompt": "ask", "response": "answer"})  # fmt: skip
    (tmp_path / "t.csv").write_bytes(b"ask,answer\n\xff,b\n")
    refused("not UTF-8", "table", tmp_path / "t.csv", tmp_path, columns={"prompt": "ask", "response": "answer"})
    pytest.importorskip("pyarrow")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 not really")
    refused("not a Parquet file", "table", tmp_path / "t.parquet", tmp_path, columns={"prompt": "a", "response": "b"})


def test_messages_from_parquet(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [{"id": 3, "messages": context("a", "b")}, {"id": 4, "messages": context("c", "d")}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "m.parquet")
    _, found = run("messages", tmp_path / "m.parquet", tmp_path)
    assert [(row.id, row.turns[1].text) for row in found] == [("3", "b"), ("4", "d")]


@pytest.mark.parametrize("source", ["messages", "steerlm"])
def test_rows_that_tell_their_language_are_filtered(source, tmp_path):
    def row(number, **more):
        if source == "messages":
            return {"messages": context(f"q{number}", "a"), **more}
        return {**said(("User", f"q{number}"), ("Assistant", "a")), **more}

    path = write(tmp_path / "a.jsonl", [row(1, lang="en"), row(2, language="DE"), row(3, lang="fr")])
    report, rows = run(source, path, tmp_path, languages=["EN", "de"])
    assert [row.turns[0].text for row in rows] == ["q1", "q2"] and report["languages"] == {"en": 1, "DE": 1}
    assert report["dropped"] == {"other_language": 1} and report["read"]["conversations"] == 3
    (tmp_path / "bad").mkdir()
    message = "b.jsonl:1: languages= is set, but the row tells none"
    refused(message, source, write(tmp_path / "b.jsonl", [row(1)]), tmp_path / "bad", languages=["en"])


def said(*turns):
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


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


def test_a_json_list_is_named_as_such(tmp_path):
    (tmp_path / "a.json").write_text("[\n " + json.dumps(said(("human", "a"), ("gpt", "b"))) + "\n]\n")
    refused("a.json:1: a JSON list, expected one object a line", "steerlm", tmp_path / "a.json", tmp_path)


# -- finding the files ------------------------------------------------------------------------------------------------


def test_the_hub_is_asked_for_the_files_of_the_source(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(name, **settings):
        asked.update(settings, name=name)
        write(tmp_path / "snapshot" / "train.jsonl.gz", [steer("a", "b", 1)])
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    _, [row] = run("helpsteer2", "owner/name", tmp_path, revision="0123abc")
    assert row.turns[1].label == {"helpfulness": 1.0}
    assert asked == {"name": "owner/name", "repo_type": "dataset", "revision": "0123abc",
                     "allow_patterns": ["train.jsonl*", "validation.jsonl*"]}  # fmt: skip


def test_the_hubs_folder_data_and_hidden_files(tmp_path):
    row = {"messages": context("a", "b")}
    write(tmp_path / "hub" / "data" / "train-00000-of-00001.jsonl", [row])
    write(tmp_path / "hub" / "data" / "test-00000-of-00001.jsonl", [{"messages": context("c", "d")}])
    (tmp_path / "hub" / "data" / "._train.jsonl").write_bytes(b"\0")
    (tmp_path / "hub" / ".cache").mkdir()
    (tmp_path / "hub" / ".cache" / "x.jsonl").write_bytes(b"\0")
    _, [found] = run("messages", tmp_path / "hub", tmp_path, val_fraction=None)
    assert found.turns[0].text == "a"
    write(tmp_path / "hub" / "top.jsonl", [{"messages": context("e", "f")}])
    _, [found] = run("messages", tmp_path / "hub", tmp_path)
    assert found.turns[0].text == "e"


@pytest.mark.parametrize("way", ["train.jsonl", "link.jsonl"])
def test_the_input_is_never_replaced_by_the_output(way, tmp_path):
    path = write(tmp_path / "out" / "train.jsonl", [steer("a", "b", 1), steer("c", "d", 1)])
    (tmp_path / "link.jsonl").symlink_to(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="would replace the input"):
        run("helpsteer", tmp_path / "link.jsonl" if way == "link.jsonl" else path, tmp_path)
    assert path.read_bytes() == before
    report = prepare({"source": "helpsteer", "input": path, "output": tmp_path / "out", "check": True})
    assert report["train"]["conversations"] + report["val"]["conversations"] == 2


def test_what_the_hub_refuses_is_said_in_its_own_words(tmp_path, monkeypatch):
    import huggingface_hub

    def full(name, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    message = "does not give owner/name at revision 01: [Errno 28] No space"
    refused(message, "messages", "owner/name", tmp_path, revision="01")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **settings: str(tmp_path / "nothing"))
    refused("holds no file of *.jsonl, ", "messages", "owner/name", tmp_path, revision="01")


def test_without_a_network_the_hub_says_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = "hf download owner/name --repo-type dataset --revision main --local-dir DIR"
    refused(message, "helpsteer2", "owner/name", tmp_path, revision="main")
    message = "no such file or folder; for a dataset on the Hugging Face hub add revision="
    refused(message, "oasst", "owner/name", tmp_path)
    refused("expected the name of a hub dataset, OWNER/NAME", "oasst", "a/b/c", tmp_path, revision="main")
    refused("is here; leave one out", "oasst", tmp_path, tmp_path, revision="main")


def test_a_split_of_its_own_must_be_told_by_someone(tmp_path):
    path = write(tmp_path / "all.jsonl", [steer("a", "b", 1)])
    refused("does not tell one", "helpsteer", path, tmp_path, val_fraction=None)
    with pytest.raises(ConfigError, match="not known here"):
        prepare({"source": "synthetic", "output": tmp_path / "out", "val_fraction": None})


# -- empty answers ----------------------------------------------------------------------------------------------------


CHAT = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, ("a", "b", "c", " \n"))]
TURNS = ("User", "Assistant") * 2
ANSWERS = {  # of each source: rows with an empty answer, one of them or what is left of it being a, b
    "messages": [{"messages": CHAT[2:]}, {"messages": CHAT}],
    "steerlm": [said(("User", "c"), ("Assistant", "\t")), said(*zip(TURNS, ("a", "b", "c", "", "d"), strict=False))],
    "helpsteer2": [steer("c", " ", 1), steer("a", "b", 1)],
    "table": [{"prompt": "c", "response": " "}, {"prompt": "a", "response": "b"}],
    "ultrafeedback": [
        {"instruction": "a", "completions": [{"response": text, "annotations": {"honesty": 3}} for text in (" ", "b")]}
    ],
    "helpsteer3": [{"context": CHAT[:1], "response1": "b", "response2": "", "feedback1": [], "feedback2": []}],
}


@pytest.mark.parametrize("source", ANSWERS)
def test_an_empty_answer_is_dropped_whatever_the_source(source, tmp_path):
    columns = {"prompt": "prompt", "response": "response"} if source == "table" else None
    report, rows = run(source, write(tmp_path / "a.jsonl", ANSWERS[source]), tmp_path, columns=columns)
    assert [[turn.text for turn in row.turns] for row in rows] == [["a", "b"]]
    several = {"empty_response": 2, "unanswered_prompt": 1}
    assert report["dropped"] == (several if source in ("messages", "steerlm") else {"empty_response": 1})


def test_an_answer_after_an_empty_one_and_keys_of_messages_are_counted(tmp_path):
    calls = {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}], "name": "x"}
    rows = [{"messages": [*CHAT[:2], CHAT[0], calls, *CHAT[:2]]}, {"messages": [*CHAT[:1], {**CHAT[1], "name": "y"}]}]
    report, found = run("messages", write(tmp_path / "a.jsonl", rows), tmp_path, dedupe=False)
    assert [[turn.text for turn in row.turns] for row in found] == [["a", "b"], ["a", "b"]]
    assert report["dropped"] == {"below_empty_response": 2, "empty_response": 1, "unanswered_prompt": 1}
    assert report["unused_keys"] == {"name": 2, "tool_calls": 1} and found[1].turns[1].extra == {"name": "y"}
