"""Conversations to tokens, and the order in which training sees them. NumPy only.

What does not fit, or has nothing to learn from, is counted in ``report``; it never turns into a silent zero loss.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation
from nemo_steerlm.data.cache import Arrays, TokenCache, Tokenised
from nemo_steerlm.errors import ConfigError, DataError
from nemo_steerlm.template import Label, PromptTemplate
from nemo_steerlm.tokenizer import Tokenizer

OVERLONG = ("drop", "truncate_history", "error")
_CHUNK = 256  # conversations tokenised in one call


class _Rows:
    """Collects rows of different length flat, without a Python object a row or a number."""

    def __init__(self, typecode: str) -> None:
        self._flat, self._lengths = array(typecode), array("q")

    def __len__(self) -> int:
        return len(self._lengths)

    def append(self, row: Sequence[int] | bytes) -> None:
        self._flat.extend(row)
        self._lengths.append(len(row))

    def arrays(self, name: str) -> Arrays:
        return {name: np.asarray(self._flat), f"{name}_lengths": np.asarray(self._lengths)}


class _Ragged:
    """Rows of different length in one flat array, in memory or in a file."""

    def __init__(self, arrays: Arrays, name: str) -> None:
        self._flat = arrays[name]
        self.lengths: np.ndarray = np.array(arrays[f"{name}_lengths"], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._flat[self._starts[index] : self._starts[index + 1]]


def _settings(
    kind: str, schema: AttributeSchema, template: PromptTemplate, tokenizer: Tokenizer, max_length: int, overlong: str
) -> dict[str, Any]:
    """All but the text that decides the tokens; attributes as a list, because their order does too."""
    return {
        "kind": kind, "attributes": [[*pair] for pair in schema.to_dict().items()], "template": template.to_dict(),
        "tokenizer": tokenizer.fingerprint, "max_length": max_length, "overlong": overlong,
    }  # fmt: skip


def _check_settings(max_length: int, overlong: str) -> None:
    if overlong not in OVERLONG:
        raise ConfigError(f"overlong={overlong!r}: expected one of {', '.join(OVERLONG)}")
    if max_length < 1:
        raise ConfigError(f"max_length={max_length}: expected a positive number of tokens")


def _chunked(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    rows = iter(conversations)
    while chunk := list(itertools.islice(rows, _CHUNK)):
        yield chunk


def without_oldest(conversation: Conversation, end: int) -> Conversation | None:
    """Drop the oldest turns up to the next one of a masked speaker before ``end``; None when nothing may go.

    The system prompt and the last exchange (the last masked turn before ``end`` and what follows it) stay.
    """
    masked = conversation.masked_speakers
    for start in range(1, end):
        if conversation.turns[start].speaker in masked:
            return dataclasses.replace(conversation, turns=conversation.turns[start:])
    return None


def _too_long(conversation: Conversation, turn: int | None, length: int, max_length: int) -> DataError:
    where = f"row '{conversation.id}'" + ("" if turn is None else f", turn {turn}")
    return DataError(
        f"{where} has {length} tokens, more than max_length={max_length}; "
        "raise max_length or choose overlong=drop or overlong=truncate_history"
    )


def _require_items(count: int, report: Mapping[str, int]) -> None:
    if count:
        return
    if not report["conversations"]:
        raise DataError("the data holds no conversation")
    if report["dropped_overlong"]:
        raise DataError(f"no sample is left: {report['dropped_overlong']} are over-long; raise max_length")
    raise DataError(
        f"all labels are missing: none of the {report['conversations']} conversations has a labelled response; "
        "run annotate first or check that the file is the labelled one"
    )


def fit_history(
    places: Sequence[tuple[Conversation, int]],
    template: PromptTemplate,
    tokenizer: Tokenizer,
    max_length: int,
    overlong: str,
) -> list[list[int]]:
    """Tokenise what a regressor reads for each (conversation, turn), shortened to `max_length` where needed.

    Returns:
        Token ids of each place, empty where the text is too long and `overlong` does not help.

    Raises:
        DataError: A text is too long under "error".
    """
    _check_settings(max_length, overlong)
    rows = tokenizer.encode_batch([template.render_regression(row, turn) for row, turn in places])
    for number, ((conversation, turn), ids) in enumerate(zip(places, rows, strict=True)):
        if len(ids) > max_length:
            if overlong == "error":
                raise _too_long(conversation, turn, len(ids), max_length)
            rows[number] = _shorten_regression(conversation, turn, template, tokenizer, max_length, overlong)
    return rows


def _shorten_regression(
    conversation: Conversation, index: int, template: PromptTemplate, tokenizer: Tokenizer, limit: int, overlong: str
) -> list[int]:
    while overlong == "truncate_history" and (shorter := without_oldest(conversation, index)):
        index -= len(conversation.turns) - len(shorter.turns)
        conversation = shorter
        ids = template.encode_regression(conversation, index, tokenizer)
        if len(ids) <= limit:
            return ids
    return []


class RegressionDataset:
    """One item for each labelled response: the history without labels, and the response's label vector.

    Attributes:
        labels: Label vectors, float32 [items, attributes], NaN where missing.
        lengths: Tokens of each item, int64 [items].
        report: Counts: conversations, kept, dropped_overlong, truncated, unlabelled (responses), tokens.
    """

    def __init__(self, arrays: Arrays, report: dict[str, int]) -> None:
        self._tokens = _Ragged(arrays, "tokens")
        self.labels = arrays["labels"]
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
        cache: TokenCache | None = None,
    ) -> RegressionDataset:
        """Tokenise conversations.

        Args:
            conversations: Any iterable, read once.
            schema: Order of the label vector; a label outside it is an error.
            template: The prompt's strings.
            tokenizer: The model's.
            max_length: Most tokens an item may have.
            overlong: "drop" (counted), "truncate_history" (oldest turns go; dropped when still too long) or "error".
            cache: Of the file that `conversations` come from; these are read only when it holds no entry.

        Raises:
            DataError: No labelled response at all, nothing left, or too long under "error".
            ConfigError: A setting is not usable.
        """
        _check_settings(max_length, overlong)
        arguments = (schema, template, tokenizer, max_length, overlong)

        def tokenise() -> Tokenised:
            return cls._tokenise(conversations, *arguments)

        return cls(*(tokenise() if cache is None else cache.get(_settings("regression", *arguments), tokenise)))

    @staticmethod
    def _tokenise(
        conversations: Iterable[Conversation],
        schema: AttributeSchema,
        template: PromptTemplate,
        tokenizer: Tokenizer,
        max_length: int,
        overlong: str,
    ) -> Tokenised:
        tokens, labels = _Rows("i"), array("f")
        report = Counter(dict.fromkeys(("conversations", "kept", "dropped_overlong", "truncated", "unlabelled"), 0))
        for chunk in _chunked(conversations):
            report["conversations"] += len(chunk)
            jobs = []
            for conversation in chunk:
                for index in conversation.response_indices:
                    label = conversation.turns[index].label
                    if label:
                        jobs.append((conversation, index, schema.vector(label)))
                    else:
                        report["unlabelled"] += 1
            rows = tokenizer.encode_batch([template.render_regression(c, i) for c, i, _ in jobs])
            for (conversation, index, vector), ids in zip(jobs, rows, strict=True):
                if len(ids) > max_length:
                    if overlong == "error":
                        raise _too_long(conversation, index, len(ids), max_length)
                    ids = _shorten_regression(conversation, index, template, tokenizer, max_length, overlong)
                    report["truncated" if ids else "dropped_overlong"] += 1
                if ids:
                    tokens.append(ids)
                    labels.extend(vector)
        report["kept"] = len(tokens)
        _require_items(len(tokens), report)
        arrays = tokens.arrays("tokens") | {"labels": np.asarray(labels).reshape(len(tokens), len(schema))}
        report["tokens"] = len(arrays["tokens"])
        return arrays, dict(report)

    def __len__(self) -> int:
        return len(self.labels)

    def item(self, index: int, epoch: int = 0) -> dict[str, np.ndarray]:
        """Return ``tokens`` int32 [sequence] and ``labels`` float32 [attributes], NaN where missing, in any epoch."""
        return {"tokens": self._tokens[index], "labels": self.labels[index]}


class PolicyDataset:
    """One item for each conversation with at least one trained response.

    Attributes:
        lengths: Tokens of each item with its full labels, int64 [items]; dropout only ever shortens an item.
        report: Counts: conversations, kept, dropped_overlong, truncated, unlabelled (conversations), turns_lost
            (trained responses cut off with the history), tokens, loss_tokens.
    """

    def __init__(
        self,
        arrays: Arrays,
        report: dict[str, int],
        encode: Any,
        dropout: tuple[float, float],
        seed: int,
    ) -> None:
        self._tokens, self._masks = _Ragged(arrays, "tokens"), _Ragged(arrays, "masks")
        self._conversations = _Ragged(arrays, "conversations")  # as JSON; none without dropout
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
            max_length: Most tokens an item may have, counted with the full label lines.
            overlong: As :meth:`RegressionDataset.build`; "truncate_history" loses the responses it cuts off.
            attribute_dropout: Share of samples that see a random subset of their attributes, drawn anew each epoch.
            label_dropout: Share of samples that see no label line, drawn anew each epoch.
            seed: Of both draws.
            cache: As :meth:`RegressionDataset.build`.

        Raises:
            DataError: No labelled response at all, nothing left, or too long under "error".
            ConfigError: A setting is not usable.
        """
        _check_settings(max_length, overlong)
        for name, share in (("attribute_dropout", attribute_dropout), ("label_dropout", label_dropout)):
            if not 0 <= share <= 1:
                raise ConfigError(f"{name}={share}: expected a share between 0 and 1")
        if attribute_dropout + label_dropout > 1:
            raise ConfigError(f"attribute_dropout + label_dropout is {attribute_dropout + label_dropout:g}, above 1")

        def encode(rows: Sequence[Conversation], shown: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
            prompts = [template.segments(row, schema, labels) for row, labels in zip(rows, shown, strict=True)]
            return [_trim(*pair) for pair in template.encode_segments(prompts, tokenizer)]

        keep = attribute_dropout + label_dropout > 0
        settings = _settings("policy", schema, template, tokenizer, max_length, overlong) | {"conversations": keep}

        def tokenise() -> Tokenised:
            return cls._tokenise(conversations, encode, max_length, overlong, keep)

        arrays, report = tokenise() if cache is None else cache.get(settings, tokenise)
        return cls(arrays, report, encode, (attribute_dropout, label_dropout), seed)

    @staticmethod
    def _tokenise(
        conversations: Iterable[Conversation], encode: Any, max_length: int, overlong: str, keep_rows: bool
    ) -> Tokenised:
        tokens, masks, kept = _Rows("i"), _Rows("B"), _Rows("B")
        names = ("conversations", "kept", "dropped_overlong", "truncated", "unlabelled", "turns_lost")
        report = Counter(dict.fromkeys(names, 0))
        for chunk in _chunked(conversations):
            report["conversations"] += len(chunk)
            for row, (ids, mask) in zip(chunk, encode(chunk, [True] * len(chunk)), strict=True):
                if not ids:
                    report["unlabelled"] += 1
                    continue
                if len(ids) > max_length:
                    if overlong == "error":
                        raise _too_long(row, None, len(ids), max_length)
                    lost, (row, ids, mask) = _shorten_policy(row, encode, max_length, overlong)
                    report["turns_lost"] += lost
                    report["truncated" if ids else "dropped_overlong"] += 1
                if ids:
                    tokens.append(ids)
                    masks.append(mask)
                    report["loss_tokens"] += sum(mask)
                    if keep_rows:
                        kept.append(json.dumps(row.to_record()).encode())
        report["kept"] = len(tokens)
        _require_items(len(tokens), report)
        arrays = tokens.arrays("tokens") | masks.arrays("masks") | kept.arrays("conversations")
        report["tokens"] = len(arrays["tokens"])
        return arrays, dict(report)

    def __len__(self) -> int:
        return len(self.lengths)

    def item(self, index: int, epoch: int = 0) -> dict[str, np.ndarray]:
        """Return ``tokens`` int32 and ``loss_mask`` uint8, both [sequence].

        ``loss_mask[t]`` is 1 where token ``t`` is a target (to be predicted from the tokens before it). The item
        depends on (seed, epoch, index) and on nothing else.
        """
        shown = self._draw(index, epoch)
        if shown is None:
            return {"tokens": self._tokens[index], "loss_mask": self._masks[index]}
        ids, mask = self._encode([self._conversation(index)], [shown])[0]
        return {"tokens": np.asarray(ids, np.int32), "loss_mask": np.asarray(mask, np.uint8)}

    def _conversation(self, index: int) -> Conversation:
        return Conversation.from_record(json.loads(self._conversations[index].tobytes()))

    def _draw(self, index: int, epoch: int) -> bool | list[Label] | None:
        if not len(self._conversations):
            return None
        random = np.random.default_rng([self._seed, epoch, index])
        draw = random.random()
        if draw < self._label_dropout:
            return False
        if draw >= self._label_dropout + self._attribute_dropout:
            return None
        labels = [turn.label or {} for turn in self._conversation(index).turns]
        names = sorted(set().union(*labels))
        if len(names) < 2:
            return None
        count = int(random.integers(1, len(names)))
        seen = {names[i] for i in random.choice(len(names), count, replace=False)}
        return [{name: value for name, value in label.items() if name in seen} for label in labels]


def _trim(ids: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
    """Cut off what follows the last target: nothing is learnt there. Empty when there is no target."""
    end = next((position + 1 for position in range(len(mask) - 1, -1, -1) if mask[position]), 0)
    return ids[:end], mask[:end]


def _shorten_policy(
    row: Conversation, encode: Any, limit: int, overlong: str
) -> tuple[int, tuple[Conversation, list[int], list[int]]]:
    def trained(conversation: Conversation) -> list[int]:
        plain = conversation.type is None
        return [
            index
            for index in conversation.response_indices
            if index and not conversation.turns[index].shared and (plain or conversation.turns[index].label)
        ]

    before = len(trained(row))
    while overlong == "truncate_history" and (shorter := without_oldest(row, max(trained(row), default=0))):
        row = shorter
        ids, mask = encode([row], [True])[0]
        if ids and len(ids) <= limit:
            return before - len(trained(row)), (row, ids, mask)
    return 0, (row, [], [])


class GlobalBatches:
    """The endless, deterministic order of global batches; ``batches[step]`` is a list of item indices.

    Each epoch is a permutation of the items, cut into pools of ``pool`` global batches; a pool is sorted by length
    and cut into batches, and the batches are shuffled. So lengths within a batch are alike (little padding) while the
    order of batches stays random. Batches run across the border of two epochs: none is short, every item comes once
    an epoch, and data sets smaller than a batch work.

    Args:
        lengths: Tokens of each item, [items].
        global_batch_size: Items a step.
        seed: Of the order.
        pool: Global batches sorted together; 1 keeps the plain random order.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, global_batch_size: int, seed: int, pool: int = 16) -> None:
        if len(lengths) == 0:
            raise DataError("no item to make batches of")
        if global_batch_size < 1 or pool < 1:
            raise ConfigError(f"global_batch_size={global_batch_size} and pool={pool} must be positive")
        self._lengths = np.asarray(lengths)
        self._size = global_batch_size
        self._seed = seed
        self._pool = pool
        self._orders: dict[int, np.ndarray] = {}

    def __getitem__(self, step: int) -> list[int]:
        count = len(self._lengths)
        start = step * self._size
        batch: list[int] = []
        while len(batch) < self._size:
            epoch, offset = divmod(start + len(batch), count)
            batch += self._order(epoch)[offset : offset + self._size - len(batch)].tolist()
        return batch

    def epochs(self, step: int) -> list[int]:
        """Return the epoch of each index of ``self[step]``."""
        count = len(self._lengths)
        return [(step * self._size + position) // count for position in range(self._size)]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if abs(key - epoch) == 1}
            self._orders[epoch] = self._make_order(epoch)
        return self._orders[epoch]

    def _make_order(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._lengths))
        # What completes the batch begun in the epoch before; from there on chunks and batches coincide.
        lead = min(-epoch * len(order) % self._size, len(order))
        body = order[lead:]
        span = self._size * self._pool
        pools = [body[start : start + span] for start in range(0, len(body), span)]
        body = np.concatenate([p[np.argsort(self._lengths[p], kind="stable")] for p in pools]) if pools else body
        whole = len(body) // self._size * self._size
        chunks = random.permutation(body[:whole].reshape(-1, self._size)).reshape(-1)
        return np.concatenate([order[:lead], chunks, body[whole:]])
