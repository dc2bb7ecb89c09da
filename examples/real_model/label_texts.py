"""Label answers with attributes that a library computes from any text: verbosity, complexity, positivity.

    python examples/real_model/label_texts.py data/train.jsonl data/val.jsonl --output labelled

A level is where the measure lies among the answers of the first file: five levels of equally many answers. Labels that
are there already stay. The borders go into borders.json; `--borders FILE` labels by borders that stand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from nemo_steerlm.conversation import Conversation, read_conversations, write_conversations
from nemo_steerlm.evaluate.scorers import text_measures

# Attribute: the measure, and what its levels mean.
ATTRIBUTES = {
    "verbosity": ("words", "how long the answer is, 0 = shortest fifth"),
    "complexity": ("reading_grade", "school grade that the answer asks for, 0 = easiest fifth"),
    "positivity": ("sentiment", "0 = most negative fifth, 4 = most positive"),
}
SHARES = (0.2, 0.4, 0.6, 0.8)


def measured(rows: list[Conversation]) -> list[dict[str, float]]:
    """The measures of every answer, row by row."""
    answers = [
        Conversation([row.turns[index]]) for row in rows for index in row.response_indices
    ]
    return text_measures(answers, len)


def borders_of(measures: list[dict[str, float]]) -> dict[str, list[float]]:
    """Between the levels of each attribute."""
    found = {}
    for name, (measure, _) in ATTRIBUTES.items():
        values = np.array([one[measure] for one in measures])
        found[name] = np.quantile(values[~np.isnan(values)], SHARES).tolist()
    return found


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
        measures = measured(rows)
        borders = borders or borders_of(measures)
        turns = [row.turns[index] for row in rows for index in row.response_indices]
        for turn, one in zip(turns, measures, strict=True):
            levels = {
                name: float(np.searchsorted(borders[name], one[measure], side="right"))
                for name, (measure, _) in ATTRIBUTES.items()
                if not np.isnan(one[measure])
            }
            turn.label = {**(turn.label or {}), **levels}
        write_conversations(arguments.output / path.name, rows)
    (arguments.output / "borders.json").write_text(json.dumps(borders, indent=2) + "\n")


if __name__ == "__main__":
    main()
