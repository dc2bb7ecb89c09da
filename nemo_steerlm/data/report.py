"""Figures of one pass over a dataset: counts, labels, lengths, leaks between train and val, suspicious rows."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation
from nemo_steerlm.data.near import PromptSample, leaks
from nemo_steerlm.data.scratch import Seen
from nemo_steerlm.data.sources.tally import Tally
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import Tokenizer

SIDES = ("train", "val")
#: Prompts of each side that are compared for near-duplicates.
SAMPLED = {"train": 5000, "val": 1000}
_EXAMPLES = 5  # rows named for each kind of suspicious row
_MARKER = "<extra_id_"  # the template's; in a text it would be read as the start of a turn or a label
_OVER_TOKENS = (1024, 2048, 4096, 8192)
_OVER_CHARACTERS = (4096, 8192, 16384, 32768)

logger = logging.getLogger(__name__)


class Report:
    """Figures of one pass, in constant memory. :meth:`content` describes each key.

    Args:
        schema: The attributes.
        folder: For scratch files, until :meth:`close`.
        tokenizer: Lengths are counted in its tokens; without one, in characters.
    """

    def __init__(self, schema: AttributeSchema, folder: Path, tokenizer: Tokenizer | None = None) -> None:
        self.tally = Tally()
        self.shared = 0
        self.rows: Counter[str] = Counter()
        self.turns: Counter[str] = Counter()
        self.trained: Counter[str] = Counter()
        self.own_sides: Counter[tuple[str | None, str]] = Counter()
        self._schema, self._tokenizer = schema, tokenizer
        self._labels = LabelFigures(schema.names)
        self._people: Counter[int] = Counter()
        self._groups: dict[str, Counter[str]] = {"datasets": Counter(), "languages": Counter()}
        self._pairs = {side: _PairFigures() for side in SIDES}
        self._strengths: Counter[float] = Counter()
        self._responses: Counter[int] = Counter()
        self._conversations: Counter[int] = Counter()
        self._suspicious: Counter[str] = Counter()
        self._examples: dict[str, list[str | None]] = {}
        self._seen = Seen(folder, "report")  # ids, and the prompts of each side
        self._prompts: Counter[str] = Counter()
        self._samples = {side: PromptSample(size) for side, size in SAMPLED.items()}

    def add(self, conversation: Conversation, side: str, prompt: str) -> None:
        """Count a row that is kept; `prompt` is its first turn's text, case and white space made equal."""
        self.rows[side] += 1
        self.turns[side] += len(conversation.turns)
        for index in conversation.response_indices:
            turn = conversation.turns[index]
            if not turn.shared:
                self._responses[_size(len(turn.text))] += 1
            if turn.label:
                self.trained[side] += 1
                self._labels.add(turn.label)
                if turn.label_count:
                    self._people[turn.label_count] += 1
        self._conversations[_size(self._length(conversation))] += 1
        self._groups["datasets"][str(conversation.extra.get("dataset"))] += 1
        language = conversation.extra.get("lang") or conversation.extra.get("language")
        if language:
            self._groups["languages"][str(language)] += 1
        if conversation.pair is not None:
            self._pairs[side].add(conversation.pair.id, conversation.pair.role)
            self._strengths[round(conversation.pair.strength, 1)] += conversation.pair.role == "chosen"
        doubts = _doubts(conversation)
        if not self._seen.add(("id", str(conversation.id))):
            doubts.append("id_of_an_earlier_row")
        for reason in doubts:
            self._suspicious[reason] += 1
            if self._suspicious[reason] <= _EXAMPLES:
                self._examples.setdefault(reason, []).append(conversation.id)
        if self._seen.add((side, prompt)):
            self._prompts[side] += 1
            self._prompts["in_both"] += ("val" if side == "train" else "train", prompt) in self._seen
        self._samples[side].add(prompt)

    def _length(self, conversation: Conversation) -> int:
        if self._tokenizer is None:
            return len(conversation.system) + sum([len(turn.text) for turn in conversation.turns])
        return len(PromptTemplate().encode_policy(conversation, self._schema, self._tokenizer)[0])

    def content(self) -> dict[str, Any]:
        """Return the figures as ``report.json`` has them.

        "labels" holds histograms of rounded values, "label_statistics" mean and standard deviation,
        "label_correlations" Pearson's r over the responses that have both, "rater_agreement" Krippendorff's alpha of
        single annotators' ratings, over all rows read. "unused_keys" counts the turns with a key that prompts do not
        use. Lengths are histograms by powers of two: "128" counts those above 64 and up to 128. "suspicious" counts
        rows, with the ids of a few.
        """
        bare = [name for name, figures in self._labels.statistics().items() if not figures["n"]]
        if bare and self.trained.total():
            logger.warning("no label for %s: a regressor learns nothing about them", ", ".join(bare))
        unit, over = ("characters", _OVER_CHARACTERS) if self._tokenizer is None else ("tokens", _OVER_TOKENS)
        report = {
            "read": dict(self.tally.read),
            "dropped": {reason: count for reason, count in sorted(self.tally.dropped.items()) if count},
            "unused_keys": dict(self.tally.unused.most_common()),
            "other_languages": dict(self.tally.other_languages.most_common()),
            "shared_turns": self.shared,
            **{
                side: {
                    "conversations": self.rows[side],
                    "turns": self.turns[side],
                    "labelled_responses": self.trained[side],
                }
                for side in SIDES
            },
            **{name: dict(counts.most_common()) for name, counts in self._groups.items() if counts},
            "prompts": self._leaks(),
            "attributes_without_labels": bare,
            "labels": self._labels.histograms(),
            "label_statistics": self._labels.statistics(),
            "label_correlations": self._labels.correlations(),
            "people_per_label": {str(count): rows for count, rows in sorted(self._people.items())},
            "rater_agreement": {
                name: {"items": found.items, "ratings": found.ratings, "alpha": _rounded(found.alpha())}
                for name, found in sorted(self.tally.raters.items())
                if found.items
            },
            "response_lengths": {"unit": "characters", "histogram": _histogram(self._responses)},
            "conversation_lengths": {
                "unit": unit,
                "histogram": _histogram(self._conversations),
                "share_over": {str(limit): _share_over(self._conversations, limit) for limit in over},
            },
            "suspicious": {
                reason: {"rows": rows, "examples": self._examples[reason]}
                for reason, rows in sorted(self._suspicious.items())
            },
        }
        if self._strengths:
            report["pairs"] = self._pair_content()
        report["held_out_rows_in_train"] = self._mixed()
        return report

    def _mixed(self) -> int:
        """How many rows of the dataset's own held-out side are in train, where it has both sides."""
        mixed = self.own_sides["val", "train"] if any(own == "train" for own, _ in self.own_sides) else 0
        if mixed:
            logger.warning(
                "%d rows that the dataset holds out itself (validation, test) are in train; "
                "val_fraction=null keeps its own split", mixed,
            )  # fmt: skip
        return mixed

    def _leaks(self) -> dict[str, Any]:
        prompts = {name: self._prompts[name] for name in (*SIDES, "in_both")}
        if both := prompts["in_both"]:
            logger.warning("%d prompts stand in train and in val: figures on val will look too good", both)
        near = leaks(self._samples["train"], self._samples["val"])
        return {**prompts, "near": near}

    def _pair_content(self) -> dict[str, Any]:
        content: dict[str, Any] = {"strengths": {f"{s:g}": n for s, n in sorted(self._strengths.items())}}
        for side, figures in self._pairs.items():
            content[side] = {**figures.counts, "complete": figures.complete}
            if not figures.complete:
                logger.warning("%s holds halves of preference pairs: %s", side, dict(figures.counts))
        return content

    def close(self) -> None:
        """Remove the scratch files."""
        self._seen.close()


class LabelFigures:
    """Histograms, moments and correlations of labels with gaps, from sums that a block of labels adds to."""

    _BLOCK = 256

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._block: list[list[float]] = []
        self._histograms: list[Counter[int]] = [Counter() for _ in self._names]
        size = len(self._names)
        #: [K, K] each; entry i, j is over the labels that have both i and j: their number, and the sums of the
        #: values i, of their squares, and of the products of the values i and j.
        self._count, self._sum, self._squares, self._products = (np.zeros((size, size)) for _ in range(4))

    def add(self, label: dict[str, float]) -> None:
        """Take a label in; attributes it lacks are missing."""
        self._block.append([label.get(name, math.nan) for name in self._names])
        if len(self._block) == self._BLOCK:
            self._flush()

    def _flush(self) -> None:
        if not self._block:
            return
        values = np.array(self._block)
        self._block = []
        given = ~np.isnan(values)
        filled, there = np.where(given, values, 0.0), given.astype(float)
        self._count += there.T @ there
        self._sum += filled.T @ there
        self._squares += (filled**2).T @ there
        self._products += filled.T @ filled
        for column, histogram in enumerate(self._histograms):
            rounded, counts = np.unique(np.rint(values[given[:, column], column]), return_counts=True)
            for value, count in zip(rounded, counts):
                histogram[int(value)] += int(count)

    def histograms(self) -> dict[str, dict[str, int]]:
        """Counts of the rounded values of each attribute."""
        self._flush()
        pairs = zip(self._names, self._histograms)
        return {name: {str(value): count for value, count in sorted(one.items())} for name, one in pairs}

    def statistics(self) -> dict[str, dict[str, Any]]:
        """Number, mean and standard deviation (of the population) of each attribute's values."""
        self._flush()
        found = {}
        for index, name in enumerate(self._names):
            count, total = self._count[index, index], self._sum[index, index]
            mean = total / count if count else math.nan
            variance = self._squares[index, index] / count - mean**2 if count else math.nan
            found[name] = {"n": int(count), "mean": _rounded(mean), "std": _rounded(math.sqrt(max(variance, 0.0)))}
        return found

    def correlations(self) -> dict[str, dict[str, float | None]]:
        """Pearson's r of each two attributes over the labels that have both; None where it is not defined."""
        self._flush()
        count, one = self._count, self._sum
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = count * self._squares - one**2
            r = (count * self._products - one * one.T) / np.sqrt(np.maximum(spread, 0) * np.maximum(spread.T, 0))
        return {
            name: {other: _rounded(r[i, j]) for j, other in enumerate(self._names)}
            for i, name in enumerate(self._names)
        }


class _PairFigures:
    """Whether every chosen row has its rejected one, in constant memory: the hashes of both halves cancel out."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._open = 0

    def add(self, name: str, role: str) -> None:
        self.counts[role] += 1
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big")
        self._open += digest if role == "chosen" else -digest

    @property
    def complete(self) -> bool:
        return self._open == 0


def _doubts(conversation: Conversation) -> list[str]:
    """Reasons why a row is suspicious, each once."""
    found = ["template_marker_in_text"] if _MARKER in conversation.system else []
    masked = conversation.masked_speakers
    speaker = before = None
    for turn in conversation.turns:
        text = turn.text
        if not text or text.isspace():
            found.append("empty_turn")
        if _MARKER in text:
            found.append("template_marker_in_text")
        if "\ufffd" in text:
            found.append("replacement_character")
        if turn.speaker == speaker:
            found.append("same_speaker_twice")
        if turn.speaker not in masked:
            if text == before:
                found.append("response_repeats_prompt")
            if "\nHuman:" in text or "\nUser:" in text:
                found.append("next_turn_in_response")
        speaker, before = turn.speaker, text
    return list(dict.fromkeys(found))


def _size(length: int) -> int:
    """The exponent of the power of two that a length fits into."""
    return max(length - 1, 0).bit_length()


def _histogram(sizes: Counter[int]) -> dict[str, int]:
    return {str(1 << size): sizes[size] for size in range(min(sizes, default=0), max(sizes, default=-1) + 1)}


def _share_over(sizes: Counter[int], limit: int) -> float:
    over = sum(count for size, count in sizes.items() if 1 << size > limit)
    return round(over / max(sizes.total(), 1), 4)


def _rounded(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None
