"""A long row-by-row job over all data-parallel ranks: streamed, written in atomic parts, resumed after a kill."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_steerlm.conversation import Conversation
from nemo_steerlm.data.parts import PartStore, batched, finished
from nemo_steerlm.errors import DataError
from nemo_steerlm.megatron.parallel import barrier, broadcast_object, device, is_rank_zero
from nemo_steerlm.progress import Progress

logger = logging.getLogger(__name__)
Record = dict[str, Any]
# A part also ends after so much text, about a million tokens: it bounds memory and the loss of a kill.
_PART_CHARACTERS = 1 << 22


def count_rows(path: Path) -> int | None:
    """Number of lines of a plain file (for the time left), None for a compressed one."""
    if path.suffix == ".gz":
        return None
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def run_in_parts(
    rows: Iterable[Conversation],
    work: Callable[[int, list[Conversation], Progress], list[Record]],
    *,
    output: Path,
    job: dict[str, Any],
    part_size: int,
    total: int | None,
    unit: str,
    shard: tuple[int, int] = (0, 1),
) -> bool:
    """Turn rows into records, part by part; a data-parallel rank that is free takes the next part.

    A part is a function of its number and rows alone, so the merged file is the same for any number of ranks and after
    any interruption. An output that the same job has finished is left unchanged.

    Args:
        work: (part number, its rows, the progress) -> records; every rank of one model runs it together. It may
            advance the progress within the part.
        output: the final file; the parts lie beside it until all are complete.
        job: everything that determines the records (see `PartStore`).
        part_size: rows of a part; a part of very long rows has fewer.
        total: number of rows if known, for the time left.
        unit: name of the counted unit.
        shard: (i, n): do every n-th part only, from the i-th on; other runs do the others. The run that finds all
            parts complete merges them.

    Returns:
        Whether the output is complete: always, except for a shard that ends before others.
    """
    folder = output.with_name(output.name + ".parts")
    claims = _Claims()
    if broadcast_object(is_rank_zero() and finished(output, job)):
        return True
    earlier: set[int] = set()  # parts of a run that was killed; only rank 0 speaks of them
    if is_rank_zero():
        earlier = PartStore(folder, job).numbers()
    barrier()
    store = PartStore(folder, job)
    writes = parallel_state.get_model_parallel_group().rank() == 0
    count = seen = 0
    with Progress(output.name, total, unit, shown=is_rank_zero()) as progress:
        for index, part in enumerate(batched(rows, part_size, weight=_characters, most=_PART_CHARACTERS)):
            count = index + 1
            if index % shard[1] == shard[0] and claims.reached():
                if not store.done(index, [row.id for row in part]):
                    records = work(index, part, progress)
                    if writes:
                        store.write(index, records)
                claims.take()
            seen += len(part)
            if index in earlier:
                progress.begin(seen)
            else:
                progress.update(seen - progress.done)
    barrier()
    return bool(broadcast_object(is_rank_zero() and _join(store, output, job, count, shard)))


def _characters(row: Conversation) -> int:
    return sum(len(turn.text) for turn in row.turns)


class _Claims:
    """Assigns each part to the first free model, which balances the work.

    The models share a counter in the store of torch.distributed (`_get_default_store` is torch's private name for it).
    """

    _jobs = itertools.count()

    def __init__(self) -> None:
        self._key = f"steerlm/parts/{next(self._jobs)}"  # every process runs the same jobs in the same order
        self._passed = -1
        self.take()

    def reached(self) -> bool:
        """Whether the next part is the one this model took."""
        self._passed += 1
        return self._passed == self._mine

    def take(self) -> None:
        """Take the first part that is not taken yet."""
        group = parallel_state.get_model_parallel_group()
        taken = torch.zeros(1, dtype=torch.long, device=device())
        if group.rank() == 0:
            taken += dist.distributed_c10d._get_default_store().add(self._key, 1) - 1
        if group.size() > 1:
            dist.broadcast(taken, dist.get_global_rank(group, 0), group=group)
        self._mine = int(taken)


def _join(store: PartStore, output: Path, job: dict[str, Any], count: int, shard: tuple[int, int]) -> bool:
    """Merge the parts if all are complete; returns whether the output is."""
    missing = store.missing(count) if shard[1] > 1 else []
    if missing and not finished(output, job):
        logger.info(
            "shard %d/%d is done; %d of %d parts are still missing: the last shard to end joins them all",
            *shard, len(missing), count,
        )  # fmt: skip
        return False
    try:
        store.merge(output, count)
    except DataError:
        if not finished(output, job):  # another shard that ended just now was faster
            raise
    return True
