"""HelpSteer3: preferences (arXiv 2505.11475, ``preference/``) and written feedback (arXiv 2503.04378, ``feedback/``).

Both have ``{"domain", "language", "context": [{"role", "content"}], "response1", "response2"}``. A preference adds
``"overall_preference": -3 to 3`` and ``"individual_preference": [{"score", "reasoning", "feedback1", "feedback2"}]``,
a row of feedback ``"feedback1": [text, ...], "feedback2": [...]``, one text an annotator. The opening words of a
feedback text grade its response, which gives the label ``helpfulness``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation, Turn
from nemo_steerlm.data.sources.helpsteer2_preference import signed_strength, strengths_of_each
from nemo_steerlm.data.sources.labels import label_of
from nemo_steerlm.data.sources.pairs import pair_rows
from nemo_steerlm.data.sources.rows import other_language, read_rows, text_of
from nemo_steerlm.data.sources.tally import Tally
from nemo_steerlm.errors import DataError

_GRADES = ("not", "slightly", "partially", "mostly", "perfectly")
_OPENING = re.compile(rf"\W*the response is ({'|'.join(_GRADES)}) helpful", re.IGNORECASE)


def read(file: Path, schema: AttributeSchema, languages: Sequence[str] | None, tally: Tally) -> Iterator[Conversation]:
    """Stream two rows a comparison, one row a response with feedback; ``languages`` are those of the data's field.

    Raises:
        DataError: With file and line: neither form, a text is missing, a preference outside -3 to 3.
    """
    for where, row in read_rows(file):
        compared = "overall_preference" in row
        if not compared and "feedback1" not in row:
            raise DataError(f"{where}: neither 'overall_preference' nor 'feedback1' in the row")
        if other_language(row.get("language"), languages, tally):
            tally.read["comparisons" if compared else "rows_of_feedback"] += 1
            continue
        history = Conversation.from_record({"messages": row.get("context")}, f"{where}: context")
        extra = {"lang": row.get("language"), "domain": row.get("domain")}
        if compared:
            yield from _comparison(row, history, extra, schema, tally, where)
        else:
            yield from _responses(row, history, extra, schema, tally, where)


def _comparison(
    row: Mapping[str, Any],
    history: Conversation,
    extra: dict[str, Any],
    schema: AttributeSchema,
    tally: Tally,
    where: str,
) -> Iterator[Conversation]:
    strength = signed_strength(row, "overall_preference", where)
    annotators = row.get("individual_preference")
    scores = strengths_of_each(annotators, "score")
    tally.raters["preference"].add(scores)
    said = [one for one in annotators if isinstance(one, Mapping)] if isinstance(annotators, list) else []
    turns = [_response(row, n, [one.get(f"feedback{n}") for one in said], schema, tally, where) for n in (1, 2)]
    chosen, rejected = turns if strength < 0 else turns[::-1]
    if scores:
        extra = {**extra, "preference_count": len(scores)}
    yield from pair_rows("helpsteer3", history.turns, chosen, rejected, strength, tally, extra, history.system)


def _responses(
    row: Mapping[str, Any],
    history: Conversation,
    extra: dict[str, Any],
    schema: AttributeSchema,
    tally: Tally,
    where: str,
) -> Iterator[Conversation]:
    tally.read["rows_of_feedback"] += 1
    for n in (1, 2):
        tally.read["responses"] += 1
        turn = _response(row, n, row.get(f"feedback{n}"), schema, tally, where)
        context = [Turn(before.speaker, before.text) for before in history.turns]
        yield Conversation([*context, turn], system=history.system, extra=dict(extra))


def _response(
    row: Mapping[str, Any], n: int, feedback: Any, schema: AttributeSchema, tally: Tally, where: str
) -> Turn:
    label, annotators = label_of({"helpfulness": _grades(feedback)}, 0, 4, schema, tally, where)
    text = text_of(row, f"response{n}", where)
    return Turn("Assistant", text, label=label, label_human=label, label_count=annotators)


def _grades(feedback: Any) -> list[int]:
    """The grades, 0 to 4, of those texts that open with one."""
    texts = feedback if isinstance(feedback, list) else [feedback]
    found = [_OPENING.match(text) for text in texts if isinstance(text, str)]
    return [_GRADES.index(match[1].lower()) for match in found if match]
