"""OpenAI chat rows: ``{"messages": [{"role", "content"}]}``; a message may carry a ``label`` of its own.

A language filter goes by the row's ``lang`` or ``language``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation, check_labels
from nemo_steerlm.data.sources.rows import other_language, read_rows, told_language
from nemo_steerlm.data.sources.tally import Tally
from nemo_steerlm.errors import DataError


def read(file: Path, schema: AttributeSchema, languages: Sequence[str] | None, tally: Tally) -> Iterator[Conversation]:
    """Stream the conversations; those without an assistant turn are dropped and counted.

    Raises:
        DataError: With file and line: not a messages row, an unknown role, a label outside the schema, or
            ``languages`` is set and the row does not tell its own.
    """
    for where, row in read_rows(file):
        if "messages" not in row:
            hint = "; use source=steerlm" if "conversations" in row or "text" in row else ""
            raise DataError(f"{where}: no 'messages' in the row{hint}")
        conversation = Conversation.from_record(row, where)
        check_labels(conversation, schema, where)
        yield from keep(conversation, languages, tally, where)


def keep(
    conversation: Conversation, languages: Sequence[str] | None, tally: Tally, where: str
) -> Iterator[Conversation]:
    """Yield the conversation unless it is in another language or has no response.

    Turns after the last response are cut off and counted.
    """
    tally.read["conversations"] += 1
    tally.read["turns"] += len(conversation.turns)
    if languages and other_language(told_language(conversation.extra, where), languages, tally):
        return
    responses = conversation.response_indices
    if not responses:
        tally.dropped["conversation_without_response"] += 1
        return
    tally.dropped["unanswered_prompt"] += len(conversation.turns) - 1 - responses[-1]
    del conversation.turns[responses[-1] + 1 :]
    for turn in conversation.turns:
        if turn.label_human is None and turn.label_predicted is None and turn.label:
            turn.label_human = dict(turn.label)
    yield conversation
