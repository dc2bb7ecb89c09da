"""Measure, print a table, write results.json and results.md: `python -m benchmarks [NAME ...] [--runs N]`."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import sys
from pathlib import Path

from benchmarks import inputs
from benchmarks.measure import Row
from nemo_steerlm.provenance import versions
from nemo_steerlm.report.tables import text_table

NAMES = ("training", "annotation", "generation", "preparation", "growth", "starting")
_HEAD = ["measurement", "ours / peer", "spread", "target", "", "ours", "peer", "unit", "runs"]


def main() -> None:
    """Run the named benchmarks, all by default."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *NAMES], help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--runs", type=int, default=2, help="runs of each side, after one that warms up")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="folder of inputs and results")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    folder = inputs.prepare(options.output / "inputs")
    found: list[Row] = []
    for name in options.names or NAMES:
        for row in importlib.import_module(f"benchmarks.{name}").rows(folder, options.runs):
            found.append(row)
            print("  ".join(filter(None, _cells(row))), flush=True)
            text = json.dumps([row.to_dict() for row in found], indent=2)
            (options.output / "results.json").write_text(text + "\n", encoding="utf-8")
            (options.output / "results.md").write_text(_markdown(found), encoding="utf-8")
    print(text_table([_cells(row) for row in found], _HEAD))
    print(f"written: {options.output / 'results.json'}, {options.output / 'results.md'}")


def _cells(row: Row) -> list[str]:
    reached = "" if row.target is None else "reached" if row.ratio >= row.target else "NOT REACHED"
    target = "" if row.target is None else f">= {row.target:.2f}"
    low, high = row.spread
    return [
        row.name, f"{row.ratio:.2f}", f"{low:.2f} to {high:.2f}", target, reached, f"{row.ours:,.4g}",
        f"{row.peer:,.4g}", row.unit, str(row.runs),
    ]  # fmt: skip


def _markdown(found: list[Row]) -> str:
    """A section for RESULTS.md: what was run, where and when, and the rows."""
    command = "python -m benchmarks " + " ".join(sys.argv[1:])
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        f"`{command.strip()}`, {datetime.date.today()}, {os.cpu_count()} cores of {_processor()}, {platform.system()}",
        "",
        f"Input: {inputs.source()}. Versions: {used}.",
        "",
        "| " + " | ".join(_HEAD) + " |",
        "|" + "---|" * len(_HEAD),
        *("| " + " | ".join(_cells(row)) + " |" for row in found),
    ]
    return "\n".join(lines) + "\n"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "an unknown processor"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "a processor")


main()
