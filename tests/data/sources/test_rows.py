"""Rows of a file, whatever its format."""

from __future__ import annotations

import json

import pytest

from tests.data.helpers import context, refused, run, said, write


def test_a_cell_of_csv_may_hold_a_whole_book(tmp_path):
    (tmp_path / "t.csv").write_text(f"ask,answer,,\na,{'long ' * 40_000},,\n")
    _, [row] = run("table", tmp_path / "t.csv", tmp_path, columns={"prompt": "ask", "response": "answer"})
    assert len(row.turns[1].text) == 200_000


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


def test_a_json_list_is_named_as_such(tmp_path):
    (tmp_path / "a.json").write_text("[\n " + json.dumps(said(("human", "a"), ("gpt", "b"))) + "\n]\n")
    refused("a.json:1: a JSON list, expected one object a line", "steerlm", tmp_path / "a.json", tmp_path)


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
