"""OpenAssistant conversation trees (OASST1 and OASST2, ``*.trees.jsonl`` or ``.jsonl.gz``).

A row is ``{"message_tree_id", "tree_state", "prompt": {"message_id", "role", "text", "labels", "replies": [...]}}``.
Crowd labels are means in [0, 1]; they are scaled to the schema's range and rounded half to even, attribute by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation, Turn
from nemo_steerlm.data.sources.rows import other_language, read_rows
from nemo_steerlm.data.sources.tally import Tally
from nemo_steerlm.errors import DataError
from nemo_steerlm.files import encodable

SPEAKERS = {"prompter": "User", "assistant": "Assistant"}

#: OASST's rated attributes; a schema that names none of these finds no label.
ATTRIBUTES = (
    "quality toxicity humor creativity helpfulness violence not_appropriate hate_speech sexual_content "
    "fails_task lang_mismatch pii spam political_content moral_judgement"
).split()

Message = Mapping[str, Any]


def read(file: Path, schema: AttributeSchema, languages: Sequence[str] | None, tally: Tally) -> Iterator[Conversation]:
    """Stream one conversation for each thread that ends in a labelled response.

    A message is dropped together with everything below it when it is deleted, empty, or in another language than
    ``languages``: a reply to a missing text is useless for training. A response without a label stays as context
    where a labelled one follows; at the end of a thread it is dropped, as are prompts without an answer.

    Raises:
        DataError: With file and line: not a tree, an unknown role, a label outside [0, 1].
    """
    for where, row in read_rows(file):
        root = check_tree(row, where)
        tally.read["trees"] += 1
        check_message(root, where)
        if not root.get("replies"):
            tally.read["messages"] += 1
            tally.dropped["lone_prompt"] += 1
            continue
        try:
            threads = _labelled_threads(root, schema, languages, tally, where)
        except RecursionError:
            raise DataError(f"{where}: the tree is nested too deeply") from None
        if not threads:
            tally.dropped["tree_without_labelled_response"] += 1
        tree_id = row.get("message_tree_id") or root.get("message_id")
        for thread in threads:
            turns = [_turn(said) for said in thread]
            extra = {"tree_id": tree_id, "lang": root.get("lang")}
            yield Conversation(turns, id=thread[-1].id, extra=extra)


def check_tree(row: Mapping[str, Any], where: str) -> Message:
    """Return a tree's root message, or raise DataError when the row is not a tree."""
    root = row.get("prompt")
    if not isinstance(root, Mapping):
        hint = "; this looks like the flat messages export" if "parent_id" in row else ""
        raise DataError(f"{where}: no message under 'prompt', expected a row of an OASST *.trees.jsonl file{hint}")
    return root


def check_message(message: Message, where: str) -> None:
    """Raise DataError unless a message has a role that is known and a text."""
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: a reply is {message!r:.60}, expected an object")
    if message.get("role") not in SPEAKERS:
        raise DataError(f"{where}: role {message.get('role')!r:.40}, expected one of {', '.join(SPEAKERS)}")
    if not isinstance(message.get("text"), str):
        raise DataError(f"{where}: message {message.get('message_id')} has no text")


def scores(message: Message, names: Iterable[str], where: str) -> dict[str, float]:
    """Return a message's crowd labels for `names`, where present, each in [0, 1]."""
    found = {}
    labels = message.get("labels") or {}
    for name in names:
        entry = labels.get(name)
        value = entry.get("value") if isinstance(entry, dict) else entry
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise DataError(
                f"{where}: message {message.get('message_id')}: label '{name}' is {value!r:.40}, expected 0 to 1"
            )
        found[name] = float(value)
    return found


class _Said(NamedTuple):
    """A message's part of a thread, computed once for all threads through it."""

    speaker: str
    text: str
    label: dict[str, float] | None
    annotators: int | None
    id: str | None


def _label(message: Message, schema: AttributeSchema, where: str) -> dict[str, float] | None:
    if message["role"] != "assistant":
        return None
    label = {}
    for name, score in scores(message, schema.names, where).items():
        attribute = schema[name]
        label[name] = float(round(attribute.low + score * (attribute.high - attribute.low)))
    return label or None


def _annotators(message: Message, label: Mapping[str, float]) -> int | None:
    """The least number of annotators behind an attribute of the message's label."""
    entries = [message["labels"][name] for name in label]
    counts = [entry.get("count") if isinstance(entry, dict) else None for entry in entries]
    return min((count for count in counts if isinstance(count, int) and count > 0), default=None)


def _turn(said: _Said) -> Turn:
    return Turn(said.speaker, said.text, label=said.label, label_human=said.label, label_count=said.annotators)


def _count(message: Message, where: str) -> int:
    check_message(message, where)
    return 1 + sum(_count(reply, where) for reply in message.get("replies") or ())


def _labelled_threads(
    message: Message, schema: AttributeSchema, languages: Sequence[str] | None, tally: Tally, where: str
) -> list[list[_Said]]:
    check_message(message, where)
    tally.read["messages"] += 1
    text = message["text"]
    reason = None
    if message.get("deleted"):
        reason = "deleted_message"
    elif not text or text.isspace():
        reason = "empty_message"
    if reason:
        tally.dropped[reason] += 1
    elif other_language(message.get("lang"), languages, tally):
        reason = "other_language"
    if reason:
        below = _count(message, where) - 1
        tally.read["messages"] += below
        tally.dropped[f"below_{reason}"] += below
        return []
    label = _label(message, schema, where)
    annotators = _annotators(message, label) if label else None
    said = _Said(SPEAKERS[message["role"]], encodable(text), label, annotators, message.get("message_id"))
    threads = []
    for reply in message.get("replies") or ():
        threads += _labelled_threads(reply, schema, languages, tally, where)
    if threads:
        if message["role"] == "assistant" and not label:
            tally.read["unlabelled_responses_kept_as_context"] += 1
        return [[said, *thread] for thread in threads]
    if label:
        return [[said]]
    tally.dropped["unlabelled_response" if message["role"] == "assistant" else "unanswered_prompt"] += 1
    return []
