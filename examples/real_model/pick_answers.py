"""Collect short question-and-answer rows out of conversations: the first question of each and the start of its answer.

    python examples/real_model/pick_answers.py trees/train.jsonl answers/train.jsonl --most-words 80 --output a.jsonl

An answer is cut where one of its sentences ends, at a length drawn evenly on a logarithmic scale; `--draws 2` draws
twice. So answers of all lengths begin alike, and only the label tells them apart.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
from pathlib import Path

from nemo_steerlm.conversation import Conversation, Turn, read_conversations, write_conversations

FEWEST_WORDS = 3
SYSTEM = "You are a helpful assistant."
#: After a sentence, but not after the number of a list's entry.
END = re.compile(r"(?:(?<!\d)\.|[!?])[\"')\]]*(?=\s|$)")


def start_of(text: str, words: int) -> str | None:
    """The sentences from the start that have at most so many words together; None where the first has more."""
    if len(text.split()) <= words:
        return text
    starts = [text[: end.end()] for end in END.finditer(text)]
    return next((start for start in reversed(starts) if FEWEST_WORDS <= len(start.split()) <= words), None)


def picked(paths: list[Path], most_words: int, draws: int) -> list[Conversation]:
    """The rows of these files without labels, each text once, in a random order that is always the same."""
    generator, rows = random.Random(0), {}
    conversations = [row for path in paths for row in read_conversations(path)]
    for row in conversations * draws:
        if len(row.turns) < 2 or 1 not in row.response_indices or len(row.turns[0].text.split()) > most_words:
            continue
        question, answer = row.turns[:2]
        words = round(math.exp(generator.uniform(math.log(FEWEST_WORDS), math.log(most_words))))
        text = start_of(answer.text, words)
        if text is not None and len(text.split()) >= FEWEST_WORDS:
            turns = [Turn(question.speaker, question.text), Turn(answer.speaker, text)]
            one = Conversation(turns, system=SYSTEM, id=row.id, mask=row.mask, type=row.type)
            rows.setdefault((question.text, text), one)
    return generator.sample([*rows.values()], len(rows))


def main() -> None:
    """Write the rows of all files into one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--most-words", type=int, required=True)
    parser.add_argument("--draws", type=int, default=1, help="of a length, for each answer")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = picked(arguments.files, arguments.most_words, arguments.draws)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_conversations(arguments.output, rows)
    sys.stdout.write(f"{arguments.output}: {len(rows):,} answers\n")


if __name__ == "__main__":
    main()
