"""Collect short question-and-answer rows out of conversations: the first question of each and its answer.

    python examples/real_model/pick_answers.py trees/train.jsonl answers/train.jsonl --most-words 80 --output a.jsonl
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
    """Write the rows of all files into one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--most-words", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = picked(arguments.files, arguments.most_words)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_conversations(arguments.output, rows)
    sys.stdout.write(f"{arguments.output}: {len(rows):,} answers\n")


if __name__ == "__main__":
    main()
