"""Label answers with attributes that a library computes from any text: verbosity, grade (reading grade), positivity.

    python examples/real_model/label_texts.py data/train.jsonl data/val.jsonl --output labelled

A level is where the measure lies among the answers of the first file. Labels that are there already stay. The borders
between the levels go into borders.json; `--borders FILE` labels by borders that stand.

`--spread quality` does the same with what a regressor predicted: predictions keep near the mean of the labels, and
rounded they would be two or three levels of five.
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


def measured(rows: list[Conversation], spread: list[str]) -> list[dict[str, float]]:
    """The measures of every answer by attribute, row by row."""
    turns = [row.turns[index] for row in rows for index in row.response_indices]
    found = text_measures([Conversation([turn]) for turn in turns], len)
    return [
        {name: one[measure] for name, measure in MEASURES.items()}
        | {name: (turn.label_predicted or {}).get(name, np.nan) for name in spread}
        for turn, one in zip(turns, found, strict=True)
    ]


def borders_of(measures: list[dict[str, float]]) -> dict[str, list[float]]:
    """Between the levels of each attribute; a value at a border has the higher level.

    Equally many answers a level; equal ratios of length for verbosity; negative, neutral (VADER's 0, which many
    answers have) and three of the positive ones for positivity.
    """
    found = {}
    for name in measures[0]:
        values = np.array([one[name] for one in measures])
        values = values[~np.isnan(values)]
        if name == "verbosity":
            found[name] = np.geomspace(*np.quantile(values, (0.1, 0.8)), LEVELS - 1).tolist()
        elif name == "positivity":
            positive = values[values > 0] if (values > 0).any() else np.array([0.0, 1.0])
            found[name] = [0.0, 1e-6, *np.quantile(positive, (1 / 3, 2 / 3))]
        else:
            found[name] = np.quantile(values, np.arange(1, LEVELS) / LEVELS).tolist()
    return found


def label(rows: list[Conversation], measures: list[dict[str, float]], borders: dict[str, list[float]]) -> None:
    """Write the level of every measure into the labels of the answers."""
    turns = [row.turns[index] for row in rows for index in row.response_indices]
    for turn, one in zip(turns, measures, strict=True):
        levels = {
            name: float(np.searchsorted(borders[name], value, side="right"))
            for name, value in one.items()
            if not np.isnan(value)
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
    parser.add_argument("--spread", nargs="*", default=[])
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    borders = json.loads(arguments.borders.read_text()) if arguments.borders else None
    for path in arguments.files:
        rows = list(read_conversations(path))
        measures = measured(rows, arguments.spread)
        borders = borders_of(measures) | (borders or {})
        label(rows, measures, borders)
        write_conversations(arguments.output / path.name, rows)
    (arguments.output / "borders.json").write_text(json.dumps(borders, indent=2) + "\n")


if __name__ == "__main__":
    main()
