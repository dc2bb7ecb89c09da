"""Where a dense training step's time goes, beside transformers' Trainer: `python -m benchmarks.profile_step`.

Both sides make the passes of the benchmark's first row. For each operator it prints the seconds of a pass, those of
the peer and the difference, largest first; and how often the threads of each slept (voluntary context switches).
"""

from __future__ import annotations

import argparse
import resource
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import inputs, training
from benchmarks.measure import Side, in_turn
from nemo_steerlm.report.tables import text_table

SLEEPS = "voluntary context switches"


def main() -> None:
    """Profile both sides in turn and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_step", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="folder of the inputs")
    parser.add_argument("--runs", type=int, default=3, help="passes of each side, after one that warms up")
    parser.add_argument("--rows", type=int, default=20, help="operators to print")
    options = parser.parse_args()
    folder = inputs.prepare(options.output / "inputs")
    settings = dict(folder=folder, kind="policy", precision="fp32", dense=training.DENSE)
    found = in_turn([profile_ours, profile_peer], options.runs, settings)
    sides = list(zip(*found, strict=True))
    sleeps = [statistics.median(times.pop(SLEEPS) for times in side) for side in sides]
    names = {name for side in sides for times in side for name in times}
    table = {name: [statistics.median(times.get(name, 0.0) for times in side) for side in sides] for name in names}
    table["all"] = [sum(values) for values in zip(*table.values(), strict=True)]
    largest = sorted(table, key=lambda name: -abs(table[name][0] - table[name][1]))[: options.rows]
    cells = [[name, *(f"{x:.2f}" for x in table[name]), f"{table[name][0] - table[name][1]:+.2f}"] for name in largest]
    print(text_table(cells, ["operator", "ours, s", "transformers, s", "difference"]))
    print("sleeps of the threads in a pass: ours {:.0f}, transformers {:.0f}".format(*sleeps))


def profile_ours(**settings: Any) -> Iterator[dict[str, float]]:
    """Seconds of each operator in a pass of ours."""
    yield from _profiled(training.ours, settings)


def profile_peer(**settings: Any) -> Iterator[dict[str, float]]:
    """Seconds of each operator in a pass of transformers' Trainer."""
    yield from _profiled(training.transformers_trainer, settings)


def _profiled(side: Side, settings: dict[str, Any]) -> Iterator[dict[str, float]]:
    from torch.profiler import ProfilerActivity, profile

    passes = side(**settings)
    while True:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            next(passes)
        sleeps = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before
        times = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
        yield times | {SLEEPS: sleeps}


if __name__ == "__main__":
    main()
