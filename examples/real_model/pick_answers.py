"""Collect short question-and-answer rows out of conversations: the first question of each and its answer.

    python examples/real_model/pick_answers.py --most-words 120 --output picked oasst answers

Reads train.jsonl and val.jsonl of each folder. Answers of one question stay together in one split, as they were.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from nemo_steerlm.conversation import Conversation, Turn, read_conversations, write_conversations

FEWEST_WORDS = 3
SYSTEM = "You are a helpful assistant."


def picked(paths: list[Path], most_words: int) -> list[Conversation]:
    """The rows of these files without labels, each text once, in a random order that is always the same."""
    rows: dict[tuple[str, str], Conversation] = {}
    for path in paths:
        for row in read_conversations(path):
            if len(row.turns) < 2 or 1 not in row.response_indices:
                continue
            question, answer = row.turns[:2]
            if FEWEST_WORDS <= len(answer.text.split()) <= most_words and len(question.text.split()) <= most_words:
                turns = [Turn(question.speaker, question.text), Turn(answer.speaker, answer.text)]
                one = Conversation(turns, system=SYSTEM, id=row.id, mask=row.mask, type=row.type)
                rows.setdefault((question.text, answer.text), one)
    return random.Random(0).sample([*rows.values()], len(rows))


def main() -> None:
    """Write the rows of both splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--most-words", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in ("train.jsonl", "val.jsonl"):
        rows = picked([folder / name for folder in arguments.folders], arguments.most_words)
        write_conversations(arguments.output / name, rows)
        sys.stdout.write(f"{arguments.output / name}: {len(rows):,} answers\n")


if __name__ == "__main__":
    main()
