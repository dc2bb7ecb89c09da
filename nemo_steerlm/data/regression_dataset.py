"""Data of a regressor: a labelled response with its history as tokens, and its label vector.

Samples that are too long or have no label are counted in ``report``; they never become a silent zero loss.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation
from nemo_steerlm.data.cache import Arrays, TokenCache, Tokenised
from nemo_steerlm.data.label_string import LabelString
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
from nemo_steerlm.data.units import EMPTY, PreferencePairs, no_pair, unit_lengths
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import Tokenizer


class RegressionDataset:
    """One item for each labelled response: the history without labels, and the response's label vector.

    Attributes:
        labels: Label vectors, float32 [items, attributes], NaN where missing.
        lengths: Tokens of each item, int64 [items].
        units: Items that stay together, int64 [units, 2]: an item and `EMPTY`, or the chosen and the rejected item of
            a preference pair.
        datasets: Names of the datasets that the items are from.
        report: What became of the conversations.
    """

    def __init__(self, arrays: Arrays, report: Counts, name: str) -> None:
        self._tokens = RaggedArray(arrays, "tokens")
        self._dataset, self._strength, self._counts = (
            arrays[key] for key in ("dataset", "strength", "label_count")
        )  # fmt: skip
        self.labels, self.units = arrays["labels"], arrays["units"]
        self.lengths: np.ndarray = self._tokens.lengths
        # cached without the file's name, which the same content may change
        report = {**report, "datasets": {own or name: count for own, count in report["datasets"].items()}}
        self.report, self.datasets = report, list(report["datasets"])

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
        *,
        name: str = "data",
        singles: bool = True,
        pairs: bool = False,
        strings: LabelString | None = None,
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
            name: Dataset of the rows that do not name theirs under "dataset".
            singles: Whether labelled responses outside of complete pairs are items too.
            pairs: Whether preference pairs stay together; their last responses need no label then.
            strings: Ends every item with its attribute string, within `max_length`.

        Raises:
            DataError: No labelled response at all, nothing left, too long under "error", or a pair with three halves.
            ConfigError: A setting is not usable.
        """
        check_limit(max_length, overlong)
        arguments = (schema, template, tokenizer, max_length, overlong)

        def tokenise() -> Tokenised:
            return cls._tokenise(conversations, *arguments, singles, pairs, strings)

        kinds = {"singles": singles, "pairs": pairs, "strings": strings is not None}
        settings = cache_settings("regression", *arguments) | kinds
        return cls(*(tokenise() if cache is None else cache.get(settings, tokenise)), name)

    @staticmethod
    def _tokenise(
        conversations: Iterable[Conversation],
        schema: AttributeSchema,
        template: PromptTemplate,
        tokenizer: Tokenizer,
        max_length: int,
        overlong: str,
        singles: bool,
        pairs: bool,
        strings: LabelString | None,
    ) -> Tokenised:
        tokens, labels, counts, dataset = RaggedBuilder("i"), array("f"), array("f"), array("i")
        names: dict[str, int] = {}
        halves, tally = PreferencePairs(), Tally()
        report = Counts(conversations=0, kept=0, dropped_overlong=0, truncated=0, unlabelled=0)
        for batch in batched(conversations, BATCH):
            report["conversations"] += len(batch)
            jobs = []
            for conversation in batch:
                tally.count_unused(conversation.turns)
                responses = conversation.response_indices
                compared = responses[-1] if pairs and conversation.pair and responses else None
                for index in responses:
                    label = conversation.turns[index].label
                    if index == compared or (label and singles):
                        jobs.append((conversation, index, schema.vector(label)))
                    report["unlabelled"] += not label
            rows = template.encode_regressions([(row, index) for row, index, _ in jobs], tokenizer)
            for (conversation, index, vector), ids in zip(jobs, rows, strict=True):
                answer = [] if strings is None else strings.encode(vector)[0]
                room = max_length - len(answer)
                if len(ids) > room:
                    if overlong == "error":
                        raise too_long(conversation, index, len(ids) + len(answer), max_length)
                    ids = _shorten(conversation, index, template, tokenizer, room, overlong)
                    if ids:
                        report["truncated"] += 1
                    else:
                        report["dropped_overlong"] += 1
                if ids:
                    ids = [*ids, *answer]
                    if pairs and conversation.pair and index == conversation.response_indices[-1]:
                        halves.add(conversation, len(tokens))
                    tokens.append(ids)
                    labels.extend(vector)
                    counts.append(conversation.turns[index].label_count or math.nan)
                    dataset.append(names.setdefault(str(conversation.extra.get("dataset") or ""), len(names)))
        table = np.asarray(labels).reshape(len(tokens), len(schema))
        units, strength, found = halves.units(table if singles else np.full_like(table, np.nan))
        used = units[units != EMPTY]
        report["kept"] = len(used)
        if not singles and not len(used) and report["conversations"]:
            raise no_pair(report["conversations"], found["incomplete_pairs"])
        require_items(len(used), report)
        arrays = tokens.arrays("tokens") | {
            "labels": table, "units": units, "strength": strength, "label_count": np.asarray(counts),
            "dataset": np.asarray(dataset),
        }  # fmt: skip
        report["tokens"] = int(unit_lengths(np.asarray(arrays["tokens_lengths"]), units).sum())
        shares = np.bincount(arrays["dataset"][used], minlength=len(names)).tolist()
        if pairs:
            report.update(found)
        report["datasets"] = dict(zip(names, shares, strict=True))
        report["unused_keys"] = dict(tally.unused)
        return arrays, report

    def __len__(self) -> int:
        return len(self.labels)

    def item(self, index: int, epoch: int = 0) -> dict[str, np.ndarray]:
        """Return ``tokens`` int32 [sequence] and ``labels`` float32 [attributes], NaN where missing, in any epoch.

        Also scalars: ``label_count`` (number of annotators of the label, NaN = unknown), ``dataset`` (index into
        `datasets`) and ``strength`` (of the preference of this item over the other of its unit, NaN = none).
        """
        return {
            "tokens": self._tokens[index], "labels": self.labels[index], "label_count": self._counts[index],
            "dataset": self._dataset[index], "strength": self._strength[index],
        }  # fmt: skip


def fit_history(
    places: Sequence[tuple[Conversation, int]],
    template: PromptTemplate,
    tokenizer: Tokenizer,
    max_length: int,
    overlong: str,
) -> list[list[int]]:
    """Tokenise the regressor's input for each (conversation, turn), shortened to `max_length` where needed.

    Returns:
        Token ids of each place, empty where the text is too long and `overlong` does not help.

    Raises:
        DataError: A text is too long under "error".
    """
    check_limit(max_length, overlong)
    rows = template.encode_regressions(places, tokenizer)
    for number, ((conversation, turn), ids) in enumerate(zip(places, rows, strict=True)):
        if len(ids) > max_length:
            if overlong == "error":
                raise too_long(conversation, turn, len(ids), max_length)
            rows[number] = _shorten(conversation, turn, template, tokenizer, max_length, overlong)
    return rows


def _shorten(
    conversation: Conversation, index: int, template: PromptTemplate, tokenizer: Tokenizer, limit: int, overlong: str
) -> list[int]:
    while overlong == "truncate_history" and (shorter := without_oldest(conversation, index)):
        index -= len(conversation.turns) - len(shorter.turns)
        conversation = shorter
        ids = template.encode_regression(conversation, index, tokenizer)
        if len(ids) <= limit:
            return ids
    return []
