"""Tables of several formats, by the names of their columns."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pytest

from tests.data.helpers import refused, run, write

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


def test_nothing_in_a_table_and_counts_of_people(tmp_path):
    rows: list[dict] = [
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
