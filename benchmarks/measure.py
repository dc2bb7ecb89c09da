"""Ours beside its peers: processes that take turns on the same machine, compared run by run.

A side is a generator function: it sets itself up, then yields one rate (units of work a second) for every run. Each
lives in a process of its own, because importing the engine gives "cuda" the meaning of the CPU and would change the
peers. While one runs the others wait, and who begins alternates, so that noise of the machine falls on all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
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
    ours: Side, peers: dict[str, tuple[Side, float]], *, unit: str, runs: int, **settings: Any
) -> Iterator[Row]:
    """Run ours and its peers `runs` times in turn after one warm-up each; a row for each peer.

    Args:
        peers: by the name of the row, the peer and the least ratio to reach.
        settings: go to every side.
    """
    found = in_turn([ours, *(peer for peer, _ in peers.values())], runs, settings)
    for place, (name, (_, target)) in enumerate(peers.items(), start=1):
        ratios = [rates[0] / rates[place] for rates in found]
        yield Row(
            name=name,
            ratio=statistics.median(ratios),
            target=target,
            ours=statistics.median(rates[0] for rates in found),
            peer=statistics.median(rates[place] for rates in found),
            unit=unit,
            runs=runs,
            spread=(min(ratios), max(ratios)),
        )


def in_turn(sides: Sequence[Side], runs: int, settings: dict[str, Any]) -> list[list[Any]]:
    """What the sides yield in each of `runs` runs after one that warms up; every other run goes backwards."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_Process(side, settings)) for side in sides]
        for process in processes:
            process.run()
        found = []
        for index in range(runs):
            order = -1 if index % 2 else 1
            found.append([process.run() for process in processes[::order]][::order])
    return found


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
