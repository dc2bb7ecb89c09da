"""Label answers with attributes that a library computes from any text: verbosity, grade (reading grade), positivity.

    python examples/real_model/label_texts.py data/train.jsonl data/val.jsonl --output labelled

A level is where the measure lies among the answers of the first file. Labels that are there already stay. The borders
between the levels go into borders.json; `--borders FILE` labels by borders that stand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from nemo_steerlm.conversation import Conversation, read_conversations, write_conversations
from nemo_steerlm.evaluate.scorers import text_measures

MEASURES = {"verbosity": "words", "grade": "reading_grade", "positivity": "sentiment"}
LEVELS = 5


def measured(rows: list[Conversation]) -> list[dict[str, float]]:
    """The measures of every answer, row by row."""
    answers = [Conversation([row.turns[index]]) for row in rows for index in row.response_indices]
    return text_measures(answers, len)


def borders_of(measures: list[dict[str, float]]) -> dict[str, list[float]]:
    """Between the levels of each attribute: equally many answers a level, and equal ratios of length for verbosity."""
    found = {}
    for name, measure in MEASURES.items():
        values = np.array([one[measure] for one in measures])
        values = values[~np.isnan(values)]
        if name == "verbosity":
            found[name] = np.geomspace(*np.quantile(values, (0.1, 0.8)), LEVELS - 1).tolist()
        else:
            found[name] = np.quantile(values, np.arange(1, LEVELS) / LEVELS).tolist()
    return found


def label(rows: list[Conversation], borders: dict[str, list[float]]) -> None:
    """Write the level of every measure into the labels of the answers."""
    turns = [row.turns[index] for row in rows for index in row.response_indices]
    for turn, one in zip(turns, measured(rows), strict=True):
        levels = {
            name: float(np.searchsorted(borders[name], one[measure], side="right"))
            for name, measure in MEASURES.items()
            if not np.isnan(one[measure])
        }
        turn.label = {**(turn.label or {}), **levels}
        if turn.label_human is not None:  # the truth that `evaluate task=regressor` compares with
            turn.label_human |= levels


def main() -> None:
    """Label the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--borders", type=Path)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    borders = json.loads(arguments.borders.read_text()) if arguments.borders else None
    for path in arguments.files:
        rows = list(read_conversations(path))
        borders = borders or borders_of(measured(rows))
        label(rows, borders)
        write_conversations(arguments.output / path.name, rows)
    (arguments.output / "borders.json").write_text(json.dumps(borders, indent=2) + "\n")


if __name__ == "__main__":
    main()
