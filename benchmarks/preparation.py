"""`prepare` on a large file, beside reading and writing the same JSON and nothing else."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import inputs
from benchmarks.measure import Row, compare

COPIES = 100
UNIT = "MB"


def rows(folder: Path, runs: int) -> Iterator[Row]:
    """Measure everything here; `folder` holds the inputs."""
    if not inputs.TREES.is_file():
        print(f"prepare is not measured: {inputs.TREES} is not here (set STEERLM_REAL_DATA)")
        return
    path, tenth = (_enlarged(folder, copies) for copies in (COPIES, COPIES // 10))
    name = f"prepare {path.stat().st_size / 1e6:.0f} MB of OASST trees vs bare json"
    yield from compare(ours, {name: (bare_json, 0.5)}, path=path, tenth=tenth, unit=UNIT, runs=min(runs, 3))


def _enlarged(folder: Path, copies: int) -> Path:
    """The trees `copies` times, every copy with ids and prompts of its own, so that nothing is a duplicate."""
    path = folder / f"trees-{copies}x.jsonl"
    if path.is_file():
        return path
    with gzip.open(inputs.TREES, "rt", encoding="utf-8") as file:
        trees = [json.loads(line) for line in file]
    with path.open("w", encoding="utf-8") as file:
        for copy in range(copies):
            for tree in trees:
                file.write(json.dumps(_renamed(tree, copy)) + "\n")
    return path


def _renamed(tree: dict[str, Any], copy: int) -> dict[str, Any]:
    def message(old: dict[str, Any]) -> dict[str, Any]:
        new = dict(old, message_id=f"{old['message_id']}-{copy}", replies=[message(r) for r in old.get("replies", [])])
        if old.get("parent_id"):
            new["parent_id"] = f"{old['parent_id']}-{copy}"
        return new

    prompt = message(tree["prompt"])
    prompt["text"] = f"{copy}. {prompt['text']}"
    return dict(tree, message_tree_id=f"{tree['message_tree_id']}-{copy}", prompt=prompt)


def ours(path: Path, tenth: Path) -> Iterator[float]:
    """MB a second of `steerlm prepare source=oasst`."""
    _seconds(tenth)
    small = _peak()
    for run in itertools.count():
        yield path.stat().st_size / 1e6 / _seconds(path)
        if run == 0:
            print(f"    prepare: {_peak():.0f} MiB at most, {small:.0f} MiB on a tenth of the file")


def _seconds(path: Path) -> float:
    from nemo_steerlm.config import AttributesConfig, PrepareConfig
    from nemo_steerlm.data.prepare import prepare

    with tempfile.TemporaryDirectory(dir=path.parent) as output:
        attributes = AttributesConfig(preset="helpsteer")
        config = PrepareConfig(source="oasst", input=str(path), output=f"{output}/data", attributes=attributes)
        started = time.perf_counter()
        prepare(config)
        return time.perf_counter() - started


def _peak() -> float:
    """The most memory this process held, in MiB (getrusage would count what its parent held before the exec)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1024  # type: ignore[index]


def bare_json(path: Path, tenth: Path) -> Iterator[float]:
    """MB a second of `json.loads` and `json.dumps` of every line."""
    while True:
        started = time.perf_counter()
        with path.open(encoding="utf-8") as file, tempfile.TemporaryFile("w", dir=path.parent) as output:
            for line in file:
                output.write(json.dumps(json.loads(line)) + "\n")
        yield path.stat().st_size / 1e6 / (time.perf_counter() - started)
