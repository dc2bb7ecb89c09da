"""Ours beside a peer: two processes that take turns on the same machine, compared run by run.

A side is a generator function: it sets itself up, then yields one rate (units of work a second) for every run. Each
lives in a process of its own, because importing the engine gives "cuda" the meaning of the CPU and would change the
peer. While one runs the other waits, and who begins alternates, so that noise of the machine falls on both.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

Side = Callable[..., Iterator[Any]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the results.

    Attributes:
        ratio: median over the runs of ours / peer.
        target: the least ratio to reach; None for what is only recorded.
        ours, peer: median rates, `unit` a second (higher is better).
        spread: lowest and highest ratio of one run.
    """

    name: str
    ratio: float
    target: float | None
    ours: float
    peer: float
    unit: str
    runs: int
    spread: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON takes it."""
        return dataclasses.asdict(self)


def compare(
    name: str, ours: Side, peer: Side, *, target: float | None, unit: str, runs: int = 5, **settings: Any
) -> Row:
    """Run both sides `runs` times in turn after one warm-up each; `settings` go to both."""
    pairs = in_turn(ours, peer, runs, settings)
    ratios = [a / b for a, b in pairs]
    return Row(
        name=name,
        ratio=statistics.median(ratios),
        target=target,
        ours=statistics.median(a for a, _ in pairs),
        peer=statistics.median(b for _, b in pairs),
        unit=unit,
        runs=runs,
        spread=(min(ratios), max(ratios)),
    )


def in_turn(ours: Side, peer: Side, runs: int, settings: dict[str, Any]) -> list[tuple[Any, Any]]:
    """What both sides yield in `runs` runs after one that warms up; who begins alternates."""
    pairs = []
    with _Process(ours, settings) as one, _Process(peer, settings) as two:
        one.run(), two.run()
        for index in range(runs):
            if index % 2:
                second = two.run()
                pairs.append((one.run(), second))
            else:
                pairs.append((one.run(), two.run()))
    return pairs


class _Process:
    """One side in a fresh interpreter."""

    def __init__(self, side: Side, settings: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.name = f"{side.__module__}.{side.__qualname__}"
        self.process = context.Process(target=_serve, args=(side, settings, other))
        self.process.start()
        other.close()

    def run(self) -> Any:
        """One more run; its rate, or what else the side yields."""
        try:
            self.pipe.send(None)
            return self.pipe.recv()
        except (EOFError, BrokenPipeError):
            raise RuntimeError(f"{self.name} ended early; its error stands above") from None

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def _serve(side: Side, settings: dict[str, Any], pipe: Connection) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rates = side(**settings)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        pipe.send(next(rates))
