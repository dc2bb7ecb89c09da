"""From tokenised items to the micro-batches one data-parallel rank runs in one optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from nemo_steerlm.data.dataset import GlobalBatches

Item = dict[str, np.ndarray]
MicroBatch = dict[str, torch.Tensor]
EMPTY = -1  # index of a row that only fills a batch: no tokens, no labels, no loss


def collate_policy(items: Sequence[Item | None], width: int) -> MicroBatch:
    """Tokens and next-token targets, `[batch, width]`; `mask` is True where the *target* carries loss."""
    tokens = np.zeros((len(items), width + 1), dtype=np.int64)
    mask = np.zeros((len(items), width + 1), dtype=bool)
    for row, item in enumerate(items):
        if item is not None:
            tokens[row, : len(item["tokens"])] = item["tokens"]
            mask[row, : len(item["tokens"])] = item["loss_mask"]
    return {
        "tokens": torch.from_numpy(tokens[:, :-1].copy()),
        "targets": torch.from_numpy(tokens[:, 1:].copy()),
        "mask": torch.from_numpy(mask[:, 1:].copy()),
    }


def collate_regression(items: Sequence[Item | None], width: int, *, outputs: int) -> MicroBatch:
    """Tokens `[batch, width]`, the place of the last one `[batch]`, and labels `[batch, outputs]` (NaN = missing)."""
    tokens = np.zeros((len(items), width), dtype=np.int64)
    labels = np.full((len(items), outputs), np.nan, dtype=np.float32)
    last = np.zeros(len(items), dtype=np.int64)
    for row, item in enumerate(items):
        if item is not None:
            tokens[row, : len(item["tokens"])] = item["tokens"]
            labels[row] = item["labels"]
            last[row] = len(item["tokens"]) - 1
    return {"tokens": torch.from_numpy(tokens), "last": torch.from_numpy(last), "labels": torch.from_numpy(labels)}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a global batch is cut.

    Attributes:
        micro_batch_size: rows of one micro-batch.
        rank, ranks: this data-parallel rank and how many there are.
        multiple: sequence lengths are padded to a multiple of this (sequence parallelism cuts them).
        equal_lengths: pad all micro-batches of a step to one length, as pipeline stages expect.
    """

    micro_batch_size: int
    rank: int = 0
    ranks: int = 1
    multiple: int = 8
    equal_lengths: bool = False


class StepBatches(Dataset):
    """Step number -> the micro-batches of this rank.

    Args:
        plan: step -> (index, epoch) of each row of the global batch; `EMPTY` indices fill up a last batch.
        item: (index, epoch) -> tokenised item.
        lengths: number of tokens of each item.
        collate: `collate_policy`, or `collate_regression` with its `outputs`.
    """

    def __init__(
        self,
        plan: Callable[[int], list[tuple[int, int]]],
        item: Callable[[int, int], Item],
        lengths: np.ndarray,
        collate: Callable[[Sequence[Item | None], int], MicroBatch],
        layout: Layout,
        steps: int,
    ) -> None:
        self.plan, self.item, self.lengths, self.collate = plan, item, lengths, collate
        self.layout, self.steps = layout, steps

    def __len__(self) -> int:
        return self.steps

    def _width(self, rows: list[tuple[int, int]]) -> int:
        longest = max((int(self.lengths[i]) for i, _ in rows if i != EMPTY), default=1)
        return -(-longest // self.layout.multiple) * self.layout.multiple

    def __getitem__(self, step: int) -> list[MicroBatch]:
        rows = sorted(self.plan(step), key=lambda row: (0 if row[0] == EMPTY else -int(self.lengths[row[0]]), row))
        size = self.layout.micro_batch_size
        cuts = [rows[i : i + size] for i in range(0, len(rows), size)]
        common = self._width(rows) if self.layout.equal_lengths else None
        # neighbours in length go to different ranks, so that all ranks have about the same work
        return [
            self._micro_batch(cut, common or self._width(cut)) for cut in cuts[self.layout.rank :: self.layout.ranks]
        ]

    def _micro_batch(self, rows: list[tuple[int, int]], width: int) -> MicroBatch:
        items = [None if index == EMPTY else self.item(index, epoch) for index, epoch in rows]
        return {
            **self.collate(items, width),
            "indices": torch.tensor([index for index, _ in rows]),
            "real_tokens": torch.tensor(sum(len(item["tokens"]) for item in items if item is not None)),
        }


def shuffled(batches: GlobalBatches) -> Callable[[int], list[tuple[int, int]]]:
    """The plan of a training: endless epochs in a random order."""
    return lambda step: list(zip(batches[step], batches.epochs(step), strict=True))


def once_through(lengths: np.ndarray, global_batch_size: int) -> Callable[[int], list[tuple[int, int]]]:
    """A plan that visits every item exactly once, shortest first, the last batch filled with `EMPTY`."""
    order = np.argsort(lengths, kind="stable").tolist()

    def plan(step: int) -> list[tuple[int, int]]:
        indices = order[step * global_batch_size : (step + 1) * global_batch_size]
        return [(index, 0) for index in indices + [EMPTY] * (global_batch_size - len(indices))]

    return plan


class _From(Sampler[int]):
    """Steps `first..total-1`; its length is the total, which Lightning compares with its restored progress."""

    def __init__(self, first: int, total: int) -> None:
        self.first, self.total = first, total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.total))

    def __len__(self) -> int:
        return self.total


def loader(batches: StepBatches, first_step: int = 0) -> DataLoader[Any]:
    """A loader that yields one step's micro-batches at a time, from `first_step` on."""
    return DataLoader(batches, batch_size=None, sampler=_From(first_step, len(batches)))
