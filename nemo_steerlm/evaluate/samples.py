"""Labelled responses as columns: predictions, human labels, and the origin of each response."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_steerlm.agreement import Floats
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation, Turn, read_conversations
from nemo_steerlm.errors import DataError


@dataclass(frozen=True)
class Response:
    """One response with a human label, in its conversation."""

    conversation: Conversation
    turn: int
    label: dict[str, float]
    dataset: str


@dataclass(frozen=True, eq=False)
class Samples:
    """Columns over n responses.

    Attributes:
        predicted: `[n, K]` in schema order, NaN where there is no prediction.
        label: of annotators, `[n, K]`, NaN = missing.
        length: characters of each response `[n]`.
        dataset: name of the dataset of each `[n]`.
        language: the row's "lang" `[n]`, "" where it has none.
        annotators: number of annotators of each label `[n]`, NaN = unknown.
        group: `[n]` hash of the first turn: answers to one prompt, and the threads of one tree, share it.
    """

    predicted: Floats
    label: Floats
    length: Floats
    dataset: NDArray[np.str_]
    language: NDArray[np.str_]
    annotators: Floats
    group: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.length)

    def where(self, chosen: NDArray) -> Samples:
        """The rows of a mask or of indices."""
        return Samples(*(column[chosen] for column in self._columns()))

    @staticmethod
    def join(parts: Sequence[Samples]) -> Samples:
        """All rows of several."""
        return Samples(*(np.concatenate(columns) for columns in zip(*(part._columns() for part in parts))))

    def _columns(self) -> tuple[NDArray, ...]:
        return tuple(getattr(self, column.name) for column in fields(self))


def human_label(turn: Turn) -> dict[str, float] | None:
    """The annotators' label of a turn: `label_human`, else a `label` that no regressor wrote."""
    return turn.label_human or (turn.label if turn.label_model is None else None)


def labelled_responses(paths: Sequence[str | Path], schema: AttributeSchema) -> Iterator[Response]:
    """Stream every response that annotators labelled, each once: a turn `shared` with an earlier row is left out.

    The dataset is the row's own "dataset", else the file's name.

    Raises:
        DataError: With file and line; or a file without any such response.
    """
    for path in paths:
        stem, found = Path(path).name.split(".")[0], False
        for row in read_conversations(path, schema):
            for index in row.response_indices:
                label = None if row.turns[index].shared else human_label(row.turns[index])
                if label:
                    found = True
                    yield Response(row, index, label, str(row.extra.get("dataset") or stem))
        if not found:
            raise DataError(
                f"{path}: no response carries a human label (label_human, or a label without label_model); "
                "there is nothing to measure against"
            )


def collect(responses: Iterable[Response], predicted: Floats, schema: AttributeSchema) -> Samples:
    """Columns of responses with the predictions `predicted` `[n, K]`."""
    labels, lengths, datasets, languages, annotators, keys = [], [], [], [], [], []
    for one in responses:
        row = one.conversation
        labels.append(schema.vector(one.label))
        lengths.append(float(len(row.turns[one.turn].text)))
        datasets.append(one.dataset)
        languages.append(str(row.extra.get("lang") or ""))
        annotators.append(row.turns[one.turn].label_count or np.nan)
        keys.append(int.from_bytes(hashlib.blake2b(row.turns[0].text.encode(), digest_size=7).digest(), "big"))
    label = np.array(labels, np.float64).reshape(len(labels), len(schema))
    assert predicted.shape == label.shape, (predicted.shape, label.shape)
    columns = (np.array(lengths), np.array(datasets), np.array(languages), np.array(annotators, np.float64))
    return Samples(predicted, label, *columns, np.array(keys, np.int64))
