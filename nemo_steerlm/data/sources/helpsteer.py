"""HelpSteer (arXiv 2311.09528) and HelpSteer2 (arXiv 2406.08673): ``train.jsonl.gz``, ``validation.jsonl.gz``.

A row is ``{"prompt", "response", "helpfulness", "correctness", "coherence", "complexity", "verbosity"}``, each 0 to 4;
in HelpSteer2's ``disagreements.jsonl.gz`` each is a list with one rating an annotator. A prompt of several turns holds
them all, ``\\n<extra_id_1>Assistant\\n`` and ``\\n<extra_id_1>User\\n`` between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation, Turn
from nemo_steerlm.data.sources.labels import label_of
from nemo_steerlm.data.sources.rows import read_rows, refuse_languages, text_of
from nemo_steerlm.data.sources.tally import Tally

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_TURN = re.compile(r"\n<extra_id_1>(User|Assistant)\n")


def read(file: Path, schema: AttributeSchema, languages: Sequence[str] | None, tally: Tally) -> Iterator[Conversation]:
    """Stream one conversation a row.

    Raises:
        DataError: With file and line: no prompt or response, a rating outside 0 to 4.
        ConfigError: ``languages`` is set (the rows do not tell).
    """
    refuse_languages(languages, "helpsteer")
    for where, row in read_rows(file):
        tally.read["responses"] += 1
        label, annotators = label_of(row, 0, 4, schema, tally, where)
        response = text_of(row, "response", where)
        turns = prompt_turns(text_of(row, "prompt", where))
        turns.append(Turn("Assistant", response, label=label, label_human=label, label_count=annotators))
        yield Conversation(turns)


def prompt_turns(prompt: str) -> list[Turn]:
    """Take a prompt with turn markers apart."""
    first, *rest = _TURN.split(prompt)
    return [Turn("User", first), *(Turn(*pair) for pair in zip(rest[::2], rest[1::2], strict=True))]
