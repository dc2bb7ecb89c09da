"""The order in which training sees the data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nemo_steerlm.errors import ConfigError, DataError


class GlobalBatches:
    """The endless, deterministic order of global batches; ``batches[step]`` is a list of item indices.

    Each epoch is a permutation of the items, cut into pools of ``pool`` global batches; a pool is sorted by length
    and cut into batches, and the batches are shuffled. So lengths within a batch are alike (little padding) while the
    order of batches stays random. Batches run across the border of two epochs: none is short, every item comes once
    an epoch, and data sets smaller than a batch work.

    With `shares` an epoch draws the items of a file a given number of times: at 2.5 every item twice and half of them
    a third time. The halves alternate, so that the counts of two items of a file never differ by more than one.

    Args:
        lengths: Tokens of each item, [items].
        global_batch_size: Items a step.
        seed: Of the order.
        pool: Global batches sorted together; 1 keeps the plain random order.
        shares: Of each file, in order, the number of its items and how often an epoch draws them; None = once.

    Raises:
        DataError: There is no item, or an epoch draws none.
        ConfigError: A setting is not usable.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        global_batch_size: int,
        seed: int,
        pool: int = 16,
        shares: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        self._shares = [(count, round(count * weight)) for count, weight in shares or [(len(lengths), 1.0)]]
        self._count = sum(draws for _, draws in self._shares)
        if self._count == 0:
            raise DataError("no item to make batches of")
        if global_batch_size < 1 or pool < 1:
            raise ConfigError(f"global_batch_size={global_batch_size} and pool={pool} must be positive")
        self._lengths = np.asarray(lengths)
        self._size = global_batch_size
        self._seed = seed
        self._pool = pool
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Items of one epoch, repeated ones counted each time."""
        return self._count

    def __getitem__(self, step: int) -> list[int]:
        count = self._count
        start = step * self._size
        batch: list[int] = []
        while len(batch) < self._size:
            epoch, offset = divmod(start + len(batch), count)
            batch += self._order(epoch)[offset : offset + self._size - len(batch)].tolist()
        return batch

    def epochs(self, step: int) -> list[int]:
        """Return the epoch of each index of ``self[step]``."""
        return [(step * self._size + position) // self._count for position in range(self._size)]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if abs(key - epoch) == 1}
            self._orders[epoch] = self._make_order(epoch)
        return self._orders[epoch]

    def _drawn(self, epoch: int) -> np.ndarray:
        """The items of an epoch: of each file, the next ones in an endless sequence of its permutations."""
        parts, start = [], 0
        for file, (count, draws) in enumerate(self._shares):
            places = np.arange(epoch * draws, (epoch + 1) * draws)
            for turn in np.unique(places // max(count, 1)).tolist():
                order = np.random.default_rng([self._seed, file, turn]).permutation(count)
                parts.append(start + np.sort(order[places[places // count == turn] % count]))
            start += count
        return np.concatenate(parts)

    def _make_order(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(self._drawn(epoch))
        # The first items complete the batch begun in the previous epoch; after them chunks and batches coincide.
        lead = min(-epoch * len(order) % self._size, len(order))
        body = order[lead:]
        span = self._size * self._pool
        pools = [body[start : start + span] for start in range(0, len(body), span)]
        body = np.concatenate([p[np.argsort(self._lengths[p], kind="stable")] for p in pools]) if pools else body
        whole = len(body) // self._size * self._size
        chunks = random.permutation(body[:whole].reshape(-1, self._size)).reshape(-1)
        return np.concatenate([order[:lead], chunks, body[whole:]])
