"""HelpSteer3: preferences (arXiv 2505.11475, ``preference/``) and written feedback (arXiv 2503.04378, ``feedback/``).

A preference is ``{"domain", "language", "context": [{"role", "content"}], "response1", "response2",
"overall_preference": -3 to 3, "individual_preference": [{"score", "reasoning", "feedback1", "feedback2"}]}``.
A row of feedback is ``{"domain", "language", "context", "response", "feedback": [text, ...]}``, one text a person;
each opens with how helpful the response is, from which its ``helpfulness`` comes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation, Turn
from nemo_steerlm.data.sources.helpsteer2_preference import signed_strength
from nemo_steerlm.data.sources.labels import label_of
from nemo_steerlm.data.sources.pairs import pair_rows
from nemo_steerlm.data.sources.rows import read_rows, text_of
from nemo_steerlm.data.sources.tally import Tally
from nemo_steerlm.errors import DataError

ATTRIBUTES = ("helpfulness",)
_GRADES = ("not", "slightly", "partially", "mostly", "perfectly")
_OPENING = re.compile(rf"\W*the response is ({'|'.join(_GRADES)}) helpful", re.IGNORECASE)


def read(file: Path, schema: AttributeSchema, languages: Sequence[str] | None, tally: Tally) -> Iterator[Conversation]:
    """Stream two rows a comparison, one row a response with feedback; ``languages`` are those of the data's field.

    Raises:
        DataError: With file and line: neither form, a text is missing, a preference outside -3 to 3.
    """
    wanted = {language.casefold() for language in languages or ()}
    for where, row in read_rows(file):
        if wanted and str(row.get("language")).casefold() not in wanted:
            tally.dropped["other_language"] += 1
            continue
        history = Conversation.from_record({"messages": row.get("context")}, where)
        extra = {"lang": row.get("language"), "domain": row.get("domain")}
        if "overall_preference" in row:
            yield from _comparison(row, history.turns, extra, schema, tally, where)
        elif "feedback" in row:
            tally.read["responses"] += 1
            turn = _response(text_of(row, "response", where), row["feedback"], schema, where)
            if turn.text.strip():
                yield Conversation([*history.turns, turn], extra=extra)
            else:
                tally.dropped["empty_response"] += 1
        else:
            raise DataError(f"{where}: neither 'overall_preference' nor 'feedback' in the row")


def _comparison(
    row: Mapping[str, Any],
    context: list[Turn],
    extra: dict[str, Any],
    schema: AttributeSchema,
    tally: Tally,
    where: str,
) -> Iterator[Conversation]:
    strength = signed_strength(row, "overall_preference", where)
    people = [one for one in row.get("individual_preference") or () if isinstance(one, Mapping)]
    turns = [
        _response(text_of(row, f"response{n}", where), [one.get(f"feedback{n}") for one in people], schema, where)
        for n in (1, 2)
    ]
    chosen, rejected = turns if strength < 0 else turns[::-1]
    extra = {**extra, "preference_count": len(people) or None}
    yield from pair_rows("helpsteer3", context, chosen, rejected, strength, tally, extra)


def _response(text: str, feedback: Any, schema: AttributeSchema, where: str) -> Turn:
    label, people = label_of({"helpfulness": _grades(feedback)}, 0, 4, schema, where)
    return Turn("Assistant", text, label=label, label_human=label, label_count=people)


def _grades(feedback: Any) -> list[int]:
    """The grades, 0 to 4, of those texts that open with one."""
    texts = feedback if isinstance(feedback, list) else [feedback]
    found = [_OPENING.match(text) for text in texts if isinstance(text, str)]
    return [_GRADES.index(match[1].lower()) for match in found if match]
