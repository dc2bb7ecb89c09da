"""Anthropic's HH-RLHF (arXiv 2204.05862): ``harmless-base/train.jsonl.gz`` and similar files.

A row is ``{"chosen", "rejected"}``: two dialogues ``"\\n\\nHuman: ... \\n\\nAssistant: ..."`` that differ in the last
response. It becomes a preference pair of two rows without labels (`annotate` gives them labels).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation, Turn
from nemo_steerlm.data.sources.pairs import pair_rows
from nemo_steerlm.data.sources.rows import read_rows, refuse_languages, text_of
from nemo_steerlm.data.sources.tally import Tally
from nemo_steerlm.errors import DataError

_SPEAKERS = {"Human": "User", "Assistant": "Assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")


def read(file: Path, schema: AttributeSchema, languages: Sequence[str] | None, tally: Tally) -> Iterator[Conversation]:
    """Stream two rows a comparison; dialogues that differ before the last response are dropped and counted.

    Raises:
        DataError: With file and line: a dialogue is missing or does not open with a speaker.
        ConfigError: ``languages`` is set (the rows do not tell).
    """
    refuse_languages(languages, "hh_rlhf")
    for where, row in read_rows(file):
        chosen, rejected = (dialogue(text_of(row, key, where), f"{where}: {key}") for key in ("chosen", "rejected"))
        if chosen[:-1] != rejected[:-1]:
            tally.read["comparisons"] += 1
            tally.dropped["pair_with_different_prompts"] += 1
        elif len(chosen) < 2 or chosen[-1].speaker != "Assistant" or rejected[-1].speaker != "Assistant":
            tally.read["comparisons"] += 1
            tally.dropped["pair_without_response"] += 1
        else:
            yield from pair_rows("hh_rlhf", chosen[:-1], chosen[-1], rejected[-1], 1.0, tally)


def dialogue(text: str, where: str = "text") -> list[Turn]:
    """Take a dialogue apart into turns, white space around each removed (raises DataError)."""
    turns = parse(text)
    if not turns:
        raise DataError(f"{where} is {text!r:.60}, expected a dialogue that opens with 'Human:'")
    return turns


def parse(text: str) -> list[Turn]:
    """The turns of a dialogue, white space around each removed; none where it does not open with a speaker."""
    before, *rest = _TURN.split("\n\n" + text.lstrip())
    if before.strip():
        return []
    return [Turn(_SPEAKERS[name], said.strip()) for name, said in zip(rest[::2], rest[1::2], strict=True)]
