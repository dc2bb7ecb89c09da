"""Data of a policy: conversations as tokens with a loss mask.

Samples that are too long or have no target are counted in ``report``; they never become a silent zero loss.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import check_dropout
from nemo_steerlm.conversation import Conversation
from nemo_steerlm.data.cache import Arrays, TokenCache, Tokenised
from nemo_steerlm.data.parts import batched
from nemo_steerlm.data.ragged import RaggedArray, RaggedBuilder
from nemo_steerlm.data.sources.tally import Tally
from nemo_steerlm.data.tokenise import (
    BATCH,
    Counts,
    cache_settings,
    check_limit,
    require_items,
    too_long,
    without_oldest,
)
from nemo_steerlm.data.units import EMPTY
from nemo_steerlm.template import Label, PromptTemplate
from nemo_steerlm.tokenizer import Tokenizer

#: Ids and loss mask of each conversation, given the labels that it shows.
Encode = Callable[[Sequence[Conversation], Sequence[bool | list[Label]]], list[tuple[list[int], list[int]]]]


class PolicyDataset:
    """One item for each conversation with at least one trained response.

    Attributes:
        lengths: Tokens of each item with its full labels, int64 [items]; dropout only ever shortens an item.
        report: What became of the conversations.
    """

    def __init__(
        self,
        arrays: Arrays,
        report: Counts,
        encode: Encode,
        dropout: tuple[float, float],
        seed: int,
    ) -> None:
        self._tokens, self._masks = RaggedArray(arrays, "tokens"), RaggedArray(arrays, "masks")
        self._conversations = RaggedArray(arrays, "conversations")  # as JSON; none without dropout
        self._encode = encode
        self._attribute_dropout, self._label_dropout = dropout
        self._seed = seed
        self.lengths: np.ndarray = self._tokens.lengths
        self.report = report

    @classmethod
    def build(
        cls,
        conversations: Iterable[Conversation],
        schema: AttributeSchema,
        template: PromptTemplate,
        tokenizer: Tokenizer,
        max_length: int,
        overlong: str = "drop",
        attribute_dropout: float = 0.0,
        label_dropout: float = 0.0,
        seed: int = 0,
        cache: TokenCache | None = None,
    ) -> PolicyDataset:
        """Tokenise conversations.

        Args:
            conversations: Any iterable, read once.
            schema: Order, range and names of the labels.
            template: The prompt's strings.
            tokenizer: The model's.
            max_length: Most tokens an item may have, counted with the full attribute strings.
            overlong: As :meth:`RegressionDataset.build`; "truncate_history" loses the responses it cuts off.
            attribute_dropout: Share of samples that see a random subset of their attributes, drawn anew each epoch.
            label_dropout: Share of samples that see no attribute string, drawn anew each epoch.
            seed: Of both draws.
            cache: As :meth:`RegressionDataset.build`.

        Raises:
            DataError: No labelled response at all, nothing left, or too long under "error".
            ConfigError: A setting is not usable.
        """
        check_limit(max_length, overlong)
        check_dropout(attribute_dropout, label_dropout)

        def encode(
            rows: Sequence[Conversation], shown: Sequence[bool | list[Label]]
        ) -> list[tuple[list[int], list[int]]]:
            return [_trim(*pair) for pair in template.encode_policies(list(zip(rows, shown)), schema, tokenizer)]

        keep = attribute_dropout + label_dropout > 0
        settings = cache_settings("policy", schema, template, tokenizer, max_length, overlong)
        settings["conversations"] = keep

        def tokenise() -> Tokenised:
            return cls._tokenise(conversations, encode, max_length, overlong, keep)

        arrays, report = tokenise() if cache is None else cache.get(settings, tokenise)
        return cls(arrays, report, encode, (attribute_dropout, label_dropout), seed)

    @staticmethod
    def _tokenise(
        conversations: Iterable[Conversation], encode: Encode, max_length: int, overlong: str, keep_rows: bool
    ) -> Tokenised:
        tokens, masks, kept = RaggedBuilder("i"), RaggedBuilder("B"), RaggedBuilder("B")
        report = Counts(
            conversations=0, kept=0, dropped_overlong=0, truncated=0, unlabelled=0, turns_lost=0, labels_not_shown=0,
            loss_tokens=0,
        )  # fmt: skip
        tally = Tally()
        for batch in batched(conversations, BATCH):
            report["conversations"] += len(batch)
            for row in batch:
                tally.count_unused(row.turns)
                report["labels_not_shown"] += row.type is None and any(turn.label for turn in row.turns)
            for row, (ids, mask) in zip(batch, encode(batch, [True] * len(batch)), strict=True):
                if not ids:
                    report["unlabelled"] += 1
                    continue
                if len(ids) > max_length:
                    if overlong == "error":
                        raise too_long(row, None, len(ids), max_length)
                    lost, (row, ids, mask) = _shorten(row, encode, max_length, overlong)
                    report["turns_lost"] += lost
                    if ids:
                        report["truncated"] += 1
                    else:
                        report["dropped_overlong"] += 1
                if ids:
                    tokens.append(ids)
                    masks.append(mask)
                    report["loss_tokens"] += sum(mask)
                    if keep_rows:
                        kept.append(json.dumps(row.to_record()).encode())
        report["kept"] = len(tokens)
        require_items(len(tokens), report)
        arrays = tokens.arrays("tokens") | masks.arrays("masks") | kept.arrays("conversations")
        report["tokens"] = len(arrays["tokens"])
        report["unused_keys"] = dict(tally.unused)
        return arrays, report

    @property
    def units(self) -> np.ndarray:
        """As `RegressionDataset.units`: every item is one."""
        return np.stack((np.arange(len(self)), np.full(len(self), EMPTY)), axis=1)

    def __len__(self) -> int:
        return len(self.lengths)

    def item(self, index: int, epoch: int = 0) -> dict[str, np.ndarray]:
        """Return ``tokens`` int32 and ``loss_mask`` uint8, both [sequence].

        ``loss_mask[t]`` is 1 where token ``t`` is a target (to be predicted from the tokens before it). The item
        depends on (seed, epoch, index) and on nothing else.
        """
        drawn = self._draw(index, epoch)
        if drawn is None:
            return {"tokens": self._tokens[index], "loss_mask": self._masks[index]}
        row, shown = drawn
        ids, mask = self._encode([row], [shown])[0]
        return {"tokens": np.asarray(ids, np.int32), "loss_mask": np.asarray(mask, np.uint8)}

    def _draw(self, index: int, epoch: int) -> tuple[Conversation, bool | list[Label]] | None:
        """The conversation and the labels shown of it; None where all are shown."""
        if not len(self._conversations):
            return None
        random = np.random.default_rng([self._seed, epoch, index])
        draw = random.random()
        if draw >= self._label_dropout + self._attribute_dropout:
            return None
        row = Conversation.from_record(json.loads(self._conversations[index].tobytes()))
        if draw < self._label_dropout:
            return row, False
        labels = [turn.label or {} for turn in row.turns]
        names = sorted(set().union(*labels))
        if len(names) < 2:
            return None
        count = int(random.integers(1, len(names)))
        seen = {names[i] for i in random.choice(len(names), count, replace=False)}
        return row, [{name: value for name, value in label.items() if name in seen} for label in labels]


def _trim(ids: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
    """Cut off the tokens after the last target, which carry no loss. Empty when there is no target."""
    end = next((position + 1 for position in range(len(mask) - 1, -1, -1) if mask[position]), 0)
    return ids[:end], mask[:end]


def _shorten(
    row: Conversation, encode: Encode, limit: int, overlong: str
) -> tuple[int, tuple[Conversation, list[int], list[int]]]:
    before = len(trained_turns(row))
    while overlong == "truncate_history" and (shorter := without_oldest(row, max(trained_turns(row), default=0))):
        row = shorter
        ids, mask = encode([row], [True])[0]
        if ids and len(ids) <= limit:
            return before - len(trained_turns(row)), (row, ids, mask)
    return 0, (row, [], [])


def trained_turns(row: Conversation) -> list[int]:
    """Indices of the responses that carry loss (`PromptTemplate.spans`)."""
    return [
        index
        for index in row.response_indices
        if index and not row.turns[index].shared and (row.type is None or row.turns[index].label)
    ]


def with_other_labels(rows: Sequence[Conversation], seed: int, name: str | None = None) -> list[Conversation]:
    """The rows with labels of other responses: a random permutation of the labels of trained responses.

    Args:
        rows: labelled conversations, which stay as they are.
        seed: of the draw.
        name: permute this attribute's value alone, among the responses that have one.
    """
    rows = [dataclasses.replace(row, turns=[dataclasses.replace(turn) for turn in row.turns]) for row in rows]
    turns = [row.turns[index] for row in rows for index in trained_turns(row)]
    if name is not None:
        turns = [turn for turn in turns if name in (turn.label or {})]
    order = [turns[k] for k in np.random.default_rng(seed).permutation(len(turns))]
    labels = [turn.label or {} for turn in order]
    for turn, other in zip(order, [*labels[1:], *labels[:1]]):
        turn.label = dict(other) if name is None else {**(turn.label or {}), name: other[name]}
    return rows
