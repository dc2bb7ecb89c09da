"""Conversations and their JSONL files.

A row is ``{"id", "system", "mask", "type", "conversations": [{"from", "value", "label", ...}]}``, a superset of
NeMo-Aligner's format; two rows that share a ``"pair": {"id", "role", "strength"}`` are a preference. OpenAI rows
(``{"messages": [{"role", "content"}]}``) and ShareGPT's speakers are read too. Files are streamed; every error names
the file and the line.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from nemo_steerlm.attributes import AttributeSchema, format_label, parse_label
from nemo_steerlm.errors import DataError
from nemo_steerlm.files import atomic_writer, encodable, read_jsonl
from nemo_steerlm.speakers import ASSISTANT, USER, masked, settle

DEFAULT_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VALUE_TO_TEXT = "VALUE_TO_TEXT"

_ROLES = {"user": USER, "assistant": ASSISTANT}
_SYSTEM_ROLES = ("system", "developer")
_encode = msgspec.json.Encoder().encode
_KNOWN_KEYS = ("id", "system", "mask", "type", "pair", "conversations", "messages")
_TURN_KEYS = frozenset(
    "label label_human label_predicted label_model label_distribution label_count shared".split()
)  # fmt: skip
PAIR_ROLES = ("chosen", "rejected")


@dataclass(slots=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        speaker: Usually "User" or "Assistant".
        text: The text of the turn.
        label: Attribute values that training uses, or None.
        label_human: Label of annotators; never overwritten.
        label_predicted: Prediction of a regressor, as floats.
        label_model: Name of that regressor.
        label_distribution: Its probabilities of the levels low, low + 1, ..., high of each attribute, if requested.
        shared: An earlier row of the same file has the same turn after the same history and trains on it. Here
            it is context only: no loss, and annotation leaves its ``label`` empty.
        label_count: Number of annotators of ``label_human``, the least of its attributes, where known.
        extra: Other keys of the turn, kept unchanged; prompts do not use them.
    """

    speaker: str
    text: str
    label: dict[str, float] | None = None
    label_human: dict[str, float] | None = None
    label_predicted: dict[str, float] | None = None
    label_model: str | None = None
    shared: bool = False
    label_count: int | None = None
    label_distribution: dict[str, list[float]] | None = None
    extra: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Marks a row as one half of a preference: the other half is the row with the same id and the other role.

    The two rows may be anywhere in a file, and both may carry labels.

    Attributes:
        id: Name of the pair, the same in both rows.
        role: "chosen" or "rejected"; the row's last response was compared.
        strength: How much better the chosen one is, at least 0: 1 slightly better, 2 better, 3 much better
            (HelpSteer2-Preference, arXiv 2410.01257).
    """

    id: str
    role: str
    strength: float = 1.0

    @classmethod
    def from_record(cls, record: Any, where: str) -> Pair:
        """Read ``{"id", "role", "strength"}``; ``strength`` may be absent (raises DataError)."""
        if not isinstance(record, Mapping) or not set(record) <= {"id", "role", "strength"}:
            raise DataError(f'{where}: pair is {record!r:.60}, expected {{"id", "role", "strength"}}')
        name, role, strength = record.get("id"), record.get("role"), record.get("strength", 1.0)
        if not isinstance(name, (str, int)) or isinstance(name, bool) or name == "":
            raise DataError(f"{where}: pair.id is {name!r:.60}, expected a string")
        if role not in PAIR_ROLES:
            raise DataError(f"{where}: pair.role is {role!r:.60}, expected chosen or rejected")
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength < math.inf:
            raise DataError(f"{where}: pair.strength is {strength!r:.60}, expected a number of at least 0")
        return cls(str(name), role, float(strength))


@dataclass(slots=True)
class Conversation:
    """A dialogue with its system prompt.

    Attributes:
        turns: In order.
        system: System prompt.
        id: Stable name of the row.
        mask: Speakers that never carry loss, separated by commas.
        type: "VALUE_TO_TEXT" (a response is trained given its label) or None (plain fine-tuning, no labels).
        pair: The preference that the row is one half of, or None.
        extra: Other top-level keys of the row, kept as they are.
    """

    turns: list[Turn]
    system: str = DEFAULT_SYSTEM
    id: str | None = None
    mask: str = USER
    type: str | None = VALUE_TO_TEXT
    pair: Pair | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def masked_speakers(self) -> frozenset[str]:
        """Names of the speakers that never carry loss."""
        return _masked(self.mask)

    @property
    def response_indices(self) -> list[int]:
        """Indices of the turns whose speaker is not masked (the assistant's)."""
        masked = self.masked_speakers
        return [index for index, turn in enumerate(self.turns) if turn.speaker not in masked]

    @classmethod
    def of(cls, value: Any, where: str = "conversation") -> Conversation:
        """Return a conversation as it is, or build it from a JSON row or from a list of OpenAI's messages.

        Raises:
            DataError: Something else, or as :meth:`from_record`.
        """
        if isinstance(value, Conversation):
            return value
        if isinstance(value, Mapping):
            return cls.from_record(value, where)
        if isinstance(value, (list, tuple)):
            return cls.from_record({"messages": value}, where)
        raise DataError(f"{where}: expected a Conversation, a row or a list of messages, found {value!r:.60}")

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str = "record") -> Conversation:
        """Build a conversation from a JSON row of either form.

        ShareGPT's speakers (``human``, ``gpt``) get our names, and its system turn becomes the system prompt. A row
        without ``type`` is VALUE_TO_TEXT where it has labels or is OpenAI's, plain fine-tuning otherwise.

        Args:
            record: The row.
            where: "file:line", begins every error message.

        Raises:
            DataError: A key is missing or has the wrong type, a label is malformed, or a speaker is neither masked
                nor the model (:func:`nemo_steerlm.speakers.settle`).
        """
        openai = "conversations" not in record and "messages" in record
        if openai:
            turns, system = _read_messages(record["messages"], where)
        else:
            turns, system = _read_turns(record.get("conversations"), where), None
        guessed = VALUE_TO_TEXT if openai or any(turn.label for turn in turns) else None
        row_type = record.get("type", guessed)
        if row_type not in (None, VALUE_TO_TEXT):
            raise DataError(f'{where}: type {row_type!r} is not supported, expected "{VALUE_TO_TEXT}" or null')
        if record.get("system") is not None:
            system = _text(record["system"], f"{where}: system")
        mask = USER if record.get("mask") is None else _text(record["mask"], f"{where}: mask")
        said, mask = settle(turns, mask, where)
        if said is not None:
            system = f"{system}\n{said}" if system else said
            del turns[0]
            if not turns:
                raise DataError(f"{where}: conversations holds no turn but the system's")
        row_id = record.get("id")
        if row_id is not None and not isinstance(row_id, (str, int)):
            raise DataError(f"{where}: id is {row_id!r:.60}, expected a string")
        return cls(
            turns=turns,
            system=DEFAULT_SYSTEM if system is None else system,
            id=None if row_id is None else str(row_id),
            mask=mask,
            type=row_type,
            pair=None if record.get("pair") is None else Pair.from_record(record["pair"], where),
            extra={key: value for key, value in record.items() if key not in _KNOWN_KEYS},
        )

    def to_record(self) -> dict[str, Any]:
        """Return the JSON row; keys that a turn does not use are left out, ``label`` is always there."""
        rows = []
        for turn in self.turns:
            label = _label_text(turn.label)
            row: dict[str, Any] = {"from": turn.speaker, "value": turn.text, "label": label}
            if turn.label_human is not None:
                row["label_human"] = label if turn.label_human is turn.label else _label_text(turn.label_human)
            if turn.label_predicted is not None:
                row["label_predicted"] = ",".join(f"{k}:{v:.4f}" for k, v in turn.label_predicted.items())
            if turn.label_model is not None:
                row["label_model"] = turn.label_model
            if turn.label_distribution is not None:
                row["label_distribution"] = turn.label_distribution
            if turn.label_count is not None:
                row["label_count"] = turn.label_count
            if turn.shared:
                row["shared"] = True
            if turn.extra is not None:
                row = {**turn.extra, **row}
            rows.append(row)
        head: dict[str, Any] = {} if self.id is None else {"id": self.id}
        head |= {"system": self.system, "mask": self.mask, "type": self.type}
        if self.pair is not None:
            head["pair"] = {"id": self.pair.id, "role": self.pair.role, "strength": self.pair.strength}
        return {**head, **self.extra, "conversations": rows}

    def to_line(self) -> str:
        """Return the row as a line of a JSONL file, with its line end; NaN, which JSON lacks, becomes null."""
        record = self.to_record()
        try:
            text = msgspec.json.format(_encode(record), indent=0).decode()
        except UnicodeEncodeError:  # a lone surrogate, which only json takes
            text = json.dumps(record, ensure_ascii=False)
        return text + "\n"


_masked = functools.lru_cache(maxsize=64)(masked)


def _label_text(label: Mapping[str, float] | None) -> str | None:
    return format_label(label) if label else None


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is {value!r:.60}, expected a string")
    return encodable(value)


def _read_label(row: Mapping[str, Any], key: str, where: str) -> dict[str, float] | None:
    text = row.get(key)
    return None if text is None or text == "" else parse_label(text, f"{where}: {key}")


def _read_turn(row: Mapping[str, Any], own: tuple[str, str], speaker: str, text: str, where: str) -> Turn:
    """A turn from its speaker and text, which the row has under the keys ``own``, and the row's other keys."""
    others = [key for key in row if key not in _TURN_KEYS and key not in own]
    return Turn(
        speaker=speaker,
        text=text,
        label=_read_label(row, "label", where),
        label_human=_read_label(row, "label_human", where),
        label_predicted=_read_label(row, "label_predicted", where),
        label_model=row.get("label_model"),
        label_distribution=row.get("label_distribution"),
        shared=bool(row.get("shared", False)),
        label_count=_read_count(row, where),
        extra={key: row[key] for key in others} or None,
    )


def _read_count(row: Mapping[str, Any], where: str) -> int | None:
    count = row.get("label_count")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise DataError(f"{where}: label_count is {count!r:.60}, expected a number of annotators or null")
    return count


def _rows(rows: Any, key: str, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(rows, list) or not rows:
        found = "nothing" if rows is None else repr(rows)[:60]
        raise DataError(f"{where}: expected a non-empty list under '{key}', found {found}")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: {key}[{index}] is {row!r:.60}, expected an object")
    return rows


def _read_turns(rows: Any, where: str) -> list[Turn]:
    turns = []
    for index, row in enumerate(_rows(rows, "conversations", where)):
        here = f"{where}: conversations[{index}]"
        for key in ("from", "value"):
            if key not in row:
                raise DataError(f'{here} has no \'{key}\', expected {{"from", "value", "label"}}')
        speaker, text = _text(row["from"], f"{here}.from"), _text(row["value"], f"{here}.value")
        turns.append(_read_turn(row, ("from", "value"), speaker, text, here))
    return turns


def _read_messages(rows: Any, where: str) -> tuple[list[Turn], str | None]:
    turns: list[Turn] = []
    system: list[str] = []
    for index, row in enumerate(_rows(rows, "messages", where)):
        here = f"{where}: messages[{index}]"
        role, content = row.get("role"), row.get("content")
        if isinstance(content, list):  # the API's list of parts; only text parts have a place in a prompt
            parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
            content = None if None in parts else "".join(parts)  # type: ignore[arg-type]
        text = _text(content, f"{here}.content")
        if role in _SYSTEM_ROLES and not turns:
            system.append(text)
        elif isinstance(role, str) and role in _ROLES:
            turns.append(_read_turn(row, ("role", "content"), _ROLES[role], text, here))
        else:
            raise DataError(f"{here} has the role {role!r:.40}, expected system (only first), user or assistant")
    if not turns:
        raise DataError(f"{where}: messages holds no user or assistant turn")
    return turns, "\n".join(system) if system else None


def read_conversations(path: str | Path, schema: AttributeSchema | None = None) -> Iterator[Conversation]:
    """Stream the conversations of a file.

    Args:
        path: .jsonl or .jsonl.gz.
        schema: When given, labels keep the attributes that it names, and ``label`` and ``label_human`` must be in
            their ranges. (`data.labels` reports other attributes of a file before anything is read here.)

    Raises:
        DataError: With file and line, as :func:`read_jsonl` and :meth:`Conversation.from_record`.
    """
    for index, (number, row) in enumerate(read_jsonl(path)):
        where = f"{path}:{number}"
        conversation = Conversation.from_record(row, where)
        if conversation.id is None:
            conversation.id = str(index)
        if schema is not None:
            for turn in conversation.turns:
                turn.label = schema.select(turn.label)
                turn.label_human = schema.select(turn.label_human)
                turn.label_predicted = schema.select(turn.label_predicted)
            check_labels(conversation, schema, where)
        yield conversation


def check_labels(conversation: Conversation, schema: AttributeSchema, where: str) -> None:
    """Raise DataError unless every label of the conversation fits the schema."""
    for index, turn in enumerate(conversation.turns):
        here = f"{where}: conversations[{index}]"
        for label in (turn.label, turn.label_human):
            if label:
                schema.check(label, here)
        if turn.label_predicted:  # a regressor may overshoot the range; its floats are kept unchanged
            schema.clamp(turn.label_predicted, here)


def write_conversations(path: str | Path, conversations: Iterable[Conversation]) -> int:
    """Write conversations as JSONL, atomically, and return how many."""
    count = 0
    with atomic_writer(path) as file:
        for conversation in conversations:
            file.write(conversation.to_line())
            count += 1
    return count
