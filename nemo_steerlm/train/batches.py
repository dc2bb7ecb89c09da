"""From tokenised items to the micro-batches one data-parallel rank runs in one optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from nemo_steerlm.data.units import EMPTY
from nemo_steerlm.megatron.phases import ON_HOST, Phases
from nemo_steerlm.models.training import MicroBatch
from nemo_steerlm.train.global_batches import GlobalBatches
from nemo_steerlm.train.packing import pack

Item = dict[str, np.ndarray]


def collate_policy(items: Sequence[Item | None], starts: Sequence[int], shape: tuple[int, int]) -> MicroBatch:
    """Tokens `[batch, width]`, and the n positions whose next token carries loss, with these next tokens.

    `places` `[n]`, ascending, are positions in the flattened batch, `targets` `[n]` the next tokens. They are computed
    on the host, so that nothing waits for the device to learn n.

    Args:
        items: the samples, None for an empty row.
        starts: where each sample begins in the flattened batch.
        shape: (batch, width).
    """
    size = shape[0] * shape[1]
    tokens, follows = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=bool)
    for item, start in zip(items, starts, strict=True):
        if item is not None:
            end = start + len(item["tokens"])
            tokens[start:end] = item["tokens"]
            follows[start : end - 1] = item["loss_mask"][1:]
    places = np.flatnonzero(follows)
    return {
        "tokens": torch.from_numpy(tokens.reshape(shape)),
        "places": torch.from_numpy(places),
        "targets": torch.from_numpy(tokens[places + 1]),
    }


def collate_regression(
    items: Sequence[Item | None], starts: Sequence[int], shape: tuple[int, int], *, outputs: int
) -> MicroBatch:
    """Tokens `[batch, width]`, and the labels of each sample, `[samples, outputs]` (NaN = missing).

    `first` and `last` `[samples]` are the positions of each sample's first and last token in the flattened batch,
    equal for an empty sample. Also `[samples]`: `label_counts`, the number of annotators (NaN = unknown); `dataset`,
    the index of its dataset's name; `strength`, by how much it is preferred to the next sample (NaN = it is not).
    Arguments as `collate_policy`.
    """
    tokens = np.zeros(shape[0] * shape[1], dtype=np.int64)
    labels = np.full((len(items), outputs), np.nan, dtype=np.float32)
    counts, strength = np.full((2, len(items)), np.nan, dtype=np.float32)
    dataset = np.zeros(len(items), dtype=np.int64)
    last = np.array(starts, dtype=np.int64)
    for number, (item, start) in enumerate(zip(items, starts, strict=True)):
        if item is not None:
            end = start + len(item["tokens"])
            tokens[start:end] = item["tokens"]
            labels[number] = item["labels"]
            counts[number] = item.get("label_count", np.nan)
            strength[number] = item.get("strength", np.nan)
            dataset[number] = item.get("dataset", 0)
            last[number] = end - 1
    return {
        "tokens": torch.from_numpy(tokens.reshape(shape)),
        "first": torch.tensor(starts, dtype=torch.long),
        "last": torch.from_numpy(last),
        "labels": torch.from_numpy(labels),
        "label_counts": torch.from_numpy(counts),
        "dataset": torch.from_numpy(dataset),
        "strength": torch.from_numpy(strength),
    }


@dataclass(frozen=True, kw_only=True)
class MicroBatching:
    """How a global batch is cut into micro-batches.

    Attributes:
        micro_batch_size: samples of one micro-batch, a preference pair being one sample of two rows; with packing a
            micro-batch is one row.
        rank, ranks: this data-parallel rank and how many there are.
        multiple: sequence lengths are padded to a multiple of this (sequence parallelism cuts them).
        equal_lengths: pad all micro-batches of a step to one length, as pipeline stages expect.
        pack_length: None for one sample a row; else samples share rows of at most this many tokens, and the data
            determine the number of rows.
        count_multiple: with packing every rank gets a multiple of this many micro-batches (interleaved pipeline
            schedules).
    """

    micro_batch_size: int
    rank: int = 0
    ranks: int = 1
    multiple: int = 8
    equal_lengths: bool = False
    pack_length: int | None = None
    count_multiple: int = 1


class StepBatches(Dataset):
    """Step number -> the micro-batches of this rank.

    Args:
        plan: step -> (unit, epoch) of each sample of the global batch; `EMPTY` units fill up a last batch.
        item: (index, epoch) -> tokenised item.
        lengths: number of tokens of each item.
        collate: `collate_policy`, or `collate_regression` with its `outputs`.
        units: the one or two items of each unit, `[units, 2]` (`RegressionDataset.units`), which stay neighbours in
            one micro-batch; None = every item is one.
    """

    def __init__(
        self,
        plan: Callable[[int], list[tuple[int, int]]],
        item: Callable[[int, int], Item],
        lengths: np.ndarray,
        collate: Callable[[Sequence[Item | None], Sequence[int], tuple[int, int]], MicroBatch],
        cutting: MicroBatching,
        steps: int,
        units: np.ndarray | None = None,
    ) -> None:
        self.units = units
        self.plan, self.item, self.lengths, self.collate = plan, item, lengths, collate
        self.cutting, self.steps = cutting, steps
        self.phases = Phases()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[MicroBatch]:
        with self.phases(ON_HOST):
            return self._of_step(step)

    def _of_step(self, step: int) -> list[MicroBatch]:
        cuts = self._cuts(self.plan(step))
        common = None
        if self.cutting.equal_lengths:
            common, most = max(map(self._width, cuts)), max(map(len, cuts))
            if self.cutting.pack_length is None:  # micro-batches with pairs have more rows
                cuts = [cut + [(EMPTY, 0)] * (most - len(cut)) for cut in cuts]
        # neighbours in length go to different ranks, so that all ranks have about the same work
        return [
            self._micro_batch(cut, common or self._width(cut)) for cut in cuts[self.cutting.rank :: self.cutting.ranks]
        ]

    def loader(self, first_step: int = 0) -> DataLoader[Any]:
        """A loader that yields one step's micro-batches at a time, from `first_step` on; pinned where CUDA is."""
        steps, pinned = _From(first_step, len(self)), torch.cuda.is_available()
        return DataLoader(self, batch_size=None, sampler=steps, pin_memory=pinned)

    def _cuts(self, rows: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """The items of each micro-batch of all ranks, the longest units first."""
        cutting, size = self.cutting, self.cutting.micro_batch_size
        if cutting.pack_length is not None:
            units = [self._members(row) for row in rows if row[0] != EMPTY]
            lengths = [sum(int(self.lengths[index]) for index, _ in unit) for unit in units]
            bins = pack(lengths, cutting.pack_length, cutting.ranks * cutting.count_multiple)
            return [[row for i in members for row in units[i]] for members in bins]
        units = sorted(map(self._members, rows), key=lambda unit: (-max(map(self._length, unit)), unit))
        return [[row for unit in units[i : i + size] for row in unit] for i in range(0, len(units), size)]

    def _members(self, row: tuple[int, int]) -> list[tuple[int, int]]:
        unit, epoch = row
        if unit == EMPTY or self.units is None:
            return [row]
        return [(index, epoch) for index in self.units[unit].tolist() if index != EMPTY]

    def _length(self, row: tuple[int, int]) -> int:
        return 0 if row[0] == EMPTY else int(self.lengths[row[0]])

    def _width(self, rows: list[tuple[int, int]]) -> int:
        lengths = [self._length(row) for row in rows] or [0]
        tokens = max(1, max(lengths) if self.cutting.pack_length is None else sum(lengths))
        return -(-tokens // self.cutting.multiple) * self.cutting.multiple

    def _micro_batch(self, rows: list[tuple[int, int]], width: int) -> MicroBatch:
        items = [None if index == EMPTY else self.item(index, epoch) for index, epoch in rows]
        sizes = [0 if item is None else len(item["tokens"]) for item in items]
        if self.cutting.pack_length is None:
            batch = self.collate(items, range(0, len(rows) * width, width), (len(rows), width))
        else:
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            batch = self.collate(items, starts, (1, width))
            batch["segments"] = [size for size in (*sizes, width - sum(sizes)) if size]  # the rest sees only itself
        return {
            **batch,
            "indices": torch.tensor([index for index, _ in rows], dtype=torch.long),
            "real_tokens": sum(sizes),
        }


def shuffled(batches: GlobalBatches) -> Callable[[int], list[tuple[int, int]]]:
    """The plan of a training: endless epochs in a random order."""
    return lambda step: list(zip(batches[step], batches.epochs(step), strict=True))


def once_through(lengths: np.ndarray, global_batch_size: int) -> Callable[[int], list[tuple[int, int]]]:
    """A plan that visits every unit exactly once, shortest first, the last batch filled with `EMPTY`."""
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
