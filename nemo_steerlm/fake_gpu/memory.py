"""Bytes of the CUDA storages that live, by the part of the training that made them."""

from __future__ import annotations

import collections
import contextlib
import threading
import weakref
from collections.abc import Iterable, Iterator

import torch
from torch.utils.weak import WeakIdKeyDictionary

GIB = 2**30
_BLOCK = 512  # torch's allocator rounds up to this many bytes


class Memory:
    """Counts storages from the first tensor seen until they are gone.

    Attributes:
        now: bytes by part.
        peak: the most bytes at any time since `restart`.
        at_peak: bytes by part at that time.
    """

    def __init__(self) -> None:
        self.now: collections.Counter[str] = collections.Counter()
        self._part, self._total = "other", 0
        self._seen = WeakIdKeyDictionary()  # storage -> [its part]
        self._lock = threading.RLock()  # storages end in autograd's threads too
        self.restart()

    def restart(self) -> None:
        """Look for the peak from now on."""
        self.peak, self.at_peak = self._total, dict(self.now)

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        """What is allocated inside belongs to `part`, unless to one within it."""
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = before

    def see(self, tensor: torch.Tensor) -> None:
        """Count the tensor's storage, if it is a new one."""
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen[storage] = part = [self._part]
            self._add(part, _size(storage))
            weakref.finalize(storage, self._add, part, -_size(storage)).atexit = False

    def move(self, tensors: Iterable[torch.Tensor], part: str) -> None:
        """Let the tensors' storages belong to `part`."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            entry = self._seen[storage]
            with self._lock:
                self.now[entry[0]] -= _size(storage)
                self.now[part] += _size(storage)
                entry[0] = part

    def gib(self, parts: dict[str, int] | None = None) -> dict[str, float]:
        """GiB by part, now or of `parts`, without what is nothing."""
        parts = self.now if parts is None else parts
        return {part: round(size / GIB, 3) for part, size in parts.items() if round(size / GIB, 3)}

    def _add(self, part: list[str], size: int) -> None:
        with self._lock:
            self.now[part[0]] += size
            self._total += size
            if self._total > self.peak:
                self.peak, self.at_peak = self._total, dict(self.now)


def _size(storage: torch.UntypedStorage) -> int:
    return -(-storage.nbytes() // _BLOCK) * _BLOCK
