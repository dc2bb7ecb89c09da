"""Tokenisation shared by the datasets of regressor and policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypedDict, TypeVar

import numpy as np

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import DataConfig
from nemo_steerlm.conversation import Conversation
from nemo_steerlm.errors import DataError
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import Tokenizer

T = TypeVar("T")

BATCH = 256  # conversations tokenised in one call


class Counts(TypedDict, total=False):
    """What became of the conversations of a file.

    Attributes:
        conversations: those read.
        kept: items.
        dropped_overlong: samples that are too long.
        truncated: samples that lost the beginning of their history.
        unlabelled: without a label: conversations of a policy's data, responses of a regressor's.
        turns_lost: trained responses that were cut off with the history (policy).
        labels_not_shown: labelled conversations whose type is null: plain fine-tuning (policy).
        loss_tokens: tokens under the loss mask (policy).
        tokens: tokens of all items.
        pairs: complete preference pairs, where pairs are asked for (regressor).
        incomplete_pairs: those of which one half is missing.
        datasets: items of each dataset (regressor).
        unused_keys: keys of turns that nothing reads, by name.
    """

    conversations: int
    kept: int
    dropped_overlong: int
    truncated: int
    unlabelled: int
    turns_lost: int
    labels_not_shown: int
    loss_tokens: int
    tokens: int
    pairs: int
    incomplete_pairs: int
    datasets: dict[str, int]
    unused_keys: dict[str, int]


def cache_settings(
    kind: str, schema: AttributeSchema, template: PromptTemplate, tokenizer: Tokenizer, max_length: int, overlong: str
) -> dict[str, Any]:
    """Everything but the text that determines the tokens; attributes as a list, because their order matters."""
    return {
        "kind": kind, "attributes": [[*pair] for pair in schema.to_dict().items()], "template": template.to_dict(),
        "tokenizer": tokenizer.fingerprint, "max_length": max_length, "overlong": overlong,
    }  # fmt: skip


def check_limit(max_length: int, overlong: str) -> None:
    """Raise ConfigError for an invalid `max_length` or `overlong`."""
    DataConfig.check_values(max_length=max_length, overlong=overlong)


def draw(items: Iterable[T], count: int, seed: int) -> list[T]:
    """At most `count` of many items at random, each with the same chance, in their order (a reservoir)."""
    random = np.random.default_rng(seed)
    kept: dict[int, tuple[int, T]] = {}
    for number, item in enumerate(items):
        place = number if number < count else int(random.integers(number + 1))
        if place < count:
            kept[place] = (number, item)
    return [item for _, item in sorted(kept.values(), key=lambda pair: pair[0])]


def without_oldest(conversation: Conversation, end: int) -> Conversation | None:
    """Drop the oldest turns up to the next one of a masked speaker before ``end``; None when none may be dropped.

    The system prompt and the last exchange (the last masked turn before ``end`` and what follows it) stay.
    """
    masked = conversation.masked_speakers
    for start in range(1, end):
        if conversation.turns[start].speaker in masked:
            return dataclasses.replace(conversation, turns=conversation.turns[start:])
    return None


def too_long(conversation: Conversation, turn: int | None, length: int, max_length: int) -> DataError:
    """The error for a sample (of one turn, or of the whole conversation) over the limit."""
    where = f"row '{conversation.id}'" + ("" if turn is None else f", turn {turn}")
    return DataError(
        f"{where} has {length} tokens, more than max_length={max_length}; "
        "raise max_length or choose overlong=drop or overlong=truncate_history"
    )


def require_items(count: int, report: Counts) -> None:
    """Raise DataError, with the reason, where none of the counted conversations became an item."""
    if count:
        return
    if not report["conversations"]:
        raise DataError("the data holds no conversation")
    if report["dropped_overlong"]:
        raise DataError(f"no sample is left: {report['dropped_overlong']} are too long; raise max_length")
    raise DataError(
        f"all labels are missing: none of the {report['conversations']} conversations has a labelled response; "
        "run annotate first or check that the file is the labelled one"
    )
