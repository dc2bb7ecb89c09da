"""How long this process spends in the phases of an optimizer step; measured only where it is asked for."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

ON_HOST = "data"  # the phase of the CPU, also where CUDA is


class Phases:
    """Adds up the seconds of phases, by their names.

    On a GPU two events in the stream measure a phase: the host does not wait for them before `take`.

    Attributes:
        on: whether anything is measured.
    """

    def __init__(self) -> None:
        self.on = False
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure what is done inside, and count it to the phase `name`."""
        if not self.on:
            yield
        elif torch.cuda.is_available() and name != ON_HOST:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((name, first, last))
        else:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started

    def add(self, name: str, seconds: float) -> None:
        """Count a time that was measured elsewhere."""
        if self.on:
            self._seconds[name] += seconds

    def take(self) -> dict[str, float]:
        """The seconds since the last call; waits once for the device."""
        if self._events:
            self._events[-1][2].synchronize()
        for name, first, last in self._events:
            self._seconds[name] += first.elapsed_time(last) / 1000  # of milliseconds
        found = dict(self._seconds)
        self._events.clear()
        self._seconds.clear()
        return found
