"""NeMo-Aligner's own files: conversation rows, and regression rows ``{"text", "label": [float, -100 = missing]}``.

ShareGPT's rows are read too. A language filter goes by the row's ``lang`` or ``language``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation, Turn, check_labels
from nemo_steerlm.data.sources.messages import keep
from nemo_steerlm.data.sources.rows import read_rows
from nemo_steerlm.data.sources.tally import Tally
from nemo_steerlm.errors import DataError
from nemo_steerlm.template import Clean, PromptTemplate

MISSING = -100.0


def read(file: Path, schema: AttributeSchema, languages: Sequence[str] | None, tally: Tally) -> Iterator[Conversation]:
    """Stream the conversations of either form.

    Raises:
        DataError: With file and line: neither form, a label outside the schema, a text that is not our template's, a
            system turn that is not the first, or ``languages`` is set and the row does not tell its own.
    """
    for where, row in read_rows(file):
        if "text" in row and "conversations" not in row:
            conversation = parse_regression_row(row, schema, where)
        elif "conversations" in row:
            conversation = Conversation.from_record(row, where)
        else:
            hint = "; use source=messages" if "messages" in row else ""
            raise DataError(f"{where}: neither 'conversations' nor 'text' in the row{hint}")
        check_labels(conversation, schema, where)
        yield from keep(conversation, languages, tally, where)


def regression_row(
    conversation: Conversation, index: int, schema: AttributeSchema, clean: Clean | None = None
) -> dict[str, Any]:
    """Return the regression row of one labelled turn, floats in schema order; `clean` as in `render_regression`."""
    label = conversation.turns[index].label or {}
    return {
        "text": PromptTemplate().render_regression(conversation, index, clean),
        "label": [float(label.get(name, MISSING)) for name in schema.names],
    }


def parse_regression_row(row: Mapping[str, Any], schema: AttributeSchema, where: str) -> Conversation:
    """Parse a regression row: its text into turns, its vector into the last turn's label.

    Raises:
        DataError: The text does not follow the default template, or the vector does not fit the schema.
    """
    template = PromptTemplate()
    text, vector = row["text"], row.get("label")
    opening = template.system_start + template.system_name + template.end_of_name
    closing = template.end_of_turn + template.label_start
    if not isinstance(text, str) or not text.startswith(opening) or not text.endswith(closing):
        raise DataError(f"{where}: text does not run from '{opening!r}' to '{closing!r}'; only that template is read")
    end = len(text) - len(template.label_start)
    system, *parts = text[len(opening) : end].split(template.turn_start)
    turns = []
    for part in parts:
        speaker, found, said = part.partition(template.end_of_name)
        if not found or not said.endswith(template.end_of_turn):
            raise DataError(f"{where}: text holds the turn {part!r:.60}, expected a speaker, a line end and a text")
        turns.append(Turn(speaker, said.removesuffix(template.end_of_turn)))
    if not turns:
        raise DataError(f"{where}: text holds no turn")
    numbers = isinstance(vector, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in vector)
    if not numbers or len(vector) != len(schema):  # type: ignore[arg-type]
        raise DataError(
            f"{where}: label is {vector!r:.60}, expected {len(schema)} numbers ({', '.join(schema.names)}); "
            "choose the schema with attributes="
        )
    pairs = zip(schema.names, vector, strict=True)  # type: ignore[arg-type]
    turns[-1].label = {name: float(value) for name, value in pairs if value != MISSING} or None
    extra = {key: value for key, value in row.items() if key not in ("text", "label", "id")}
    row_id = None if row.get("id") is None else str(row["id"])
    return Conversation(turns, system=system.removesuffix(template.end_of_turn), id=row_id, extra=extra)
