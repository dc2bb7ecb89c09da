"""From tokenised items to the micro-batches one data-parallel rank runs in one optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from nemo_steerlm.data.dataset import GlobalBatches
from nemo_steerlm.data.packing import pack

Item = dict[str, np.ndarray]
MicroBatch = dict[str, Any]  # tensors, and of a packed row the lengths of its segments as a list
EMPTY = -1  # index of a row that only fills a batch: no tokens, no labels, no loss


def collate_policy(items: Sequence[Item | None], starts: Sequence[int], shape: tuple[int, int]) -> MicroBatch:
    """Tokens and next-token targets, `[batch, width]`; `mask` is True where the *target* carries loss.

    Args:
        items: the samples, None for an empty row.
        starts: where each sample begins in the flattened batch.
        shape: (batch, width).
    """
    size = shape[0] * shape[1]
    tokens, targets = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    mask = np.zeros(size, dtype=bool)
    for item, start in zip(items, starts, strict=True):
        if item is not None:
            end = start + len(item["tokens"])
            tokens[start:end] = item["tokens"]
            targets[start : end - 1] = item["tokens"][1:]
            mask[start : end - 1] = item["loss_mask"][1:]
    return {
        "tokens": torch.from_numpy(tokens.reshape(shape)),
        "targets": torch.from_numpy(targets.reshape(shape)),
        "mask": torch.from_numpy(mask.reshape(shape)),
    }


def collate_regression(
    items: Sequence[Item | None], starts: Sequence[int], shape: tuple[int, int], *, outputs: int
) -> MicroBatch:
    """Tokens `[batch, width]`, and of each sample its labels `[samples, outputs]` (NaN = missing).

    `last` `[samples]` is the place of each sample's last token in the flattened batch; arguments as `collate_policy`.
    """
    tokens = np.zeros(shape[0] * shape[1], dtype=np.int64)
    labels = np.full((len(items), outputs), np.nan, dtype=np.float32)
    last = np.array(starts, dtype=np.int64)
    for number, (item, start) in enumerate(zip(items, starts, strict=True)):
        if item is not None:
            end = start + len(item["tokens"])
            tokens[start:end] = item["tokens"]
            labels[number] = item["labels"]
            last[number] = end - 1
    return {
        "tokens": torch.from_numpy(tokens.reshape(shape)),
        "last": torch.from_numpy(last),
        "labels": torch.from_numpy(labels),
    }


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a global batch is cut.

    Attributes:
        micro_batch_size: rows of one micro-batch; one with packing.
        rank, ranks: this data-parallel rank and how many there are.
        multiple: sequence lengths are padded to a multiple of this (sequence parallelism cuts them).
        equal_lengths: pad all micro-batches of a step to one length, as pipeline stages expect.
        pack_length: None for one sample a row; else samples share rows of at most this many tokens, and how many
            rows there are follows from the data.
        unit: with packing every rank gets a multiple of this many micro-batches (interleaved pipeline schedules).
    """

    micro_batch_size: int
    rank: int = 0
    ranks: int = 1
    multiple: int = 8
    equal_lengths: bool = False
    pack_length: int | None = None
    unit: int = 1


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
        collate: Callable[[Sequence[Item | None], Sequence[int], tuple[int, int]], MicroBatch],
        layout: Layout,
        steps: int,
    ) -> None:
        self.plan, self.item, self.lengths, self.collate = plan, item, lengths, collate
        self.layout, self.steps = layout, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[MicroBatch]:
        cuts = self._cuts(self.plan(step))
        common = max(map(self._width, cuts)) if self.layout.equal_lengths else None
        # neighbours in length go to different ranks, so that all ranks have about the same work
        return [
            self._micro_batch(cut, common or self._width(cut)) for cut in cuts[self.layout.rank :: self.layout.ranks]
        ]

    def _cuts(self, rows: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """The samples of each micro-batch of all ranks, the longest first."""
        layout = self.layout
        if layout.pack_length is not None:
            rows = [row for row in rows if row[0] != EMPTY]
            lengths = self.lengths[[index for index, _ in rows]]
            bins = pack(lengths, layout.pack_length, layout.ranks * layout.unit)
            return [[rows[i] for i in members] for members in bins]
        rows = sorted(rows, key=lambda row: (0 if row[0] == EMPTY else -int(self.lengths[row[0]]), row))
        return [rows[i : i + layout.micro_batch_size] for i in range(0, len(rows), layout.micro_batch_size)]

    def _width(self, rows: list[tuple[int, int]]) -> int:
        lengths = [int(self.lengths[index]) for index, _ in rows if index != EMPTY] or [1]
        tokens = max(lengths) if self.layout.pack_length is None else sum(lengths)
        return -(-tokens // self.layout.multiple) * self.layout.multiple

    def _micro_batch(self, rows: list[tuple[int, int]], width: int) -> MicroBatch:
        items = [None if index == EMPTY else self.item(index, epoch) for index, epoch in rows]
        sizes = [0 if item is None else len(item["tokens"]) for item in items]
        if self.layout.pack_length is None:
            batch = self.collate(items, range(0, len(rows) * width, width), (len(rows), width))
        else:
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            batch = self.collate(items, starts, (1, width))
            batch["segments"] = [size for size in (*sizes, width - sum(sizes)) if size]  # the rest sees only itself
        return {
            **batch,
            "indices": torch.tensor([index for index, _ in rows], dtype=torch.long),
            "real_tokens": torch.tensor(sum(sizes)),
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
