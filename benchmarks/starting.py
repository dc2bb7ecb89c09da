"""What a verb costs before it builds its model, beside `import torch`: fresh processes that take turns."""

from __future__ import annotations

import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import growth, inputs
from benchmarks.measure import Row

RUNS = 5
TARGET = 0.4  # 2.5 times torch
_REGRESSOR = """
import sys
from pathlib import Path
from benchmarks import annotation
annotation.regressor(Path(sys.argv[1]))
print([])
"""
_UP_TO_THE_MODEL = """
import importlib, sys
from nemo_steerlm import cli

load = importlib.import_module

def import_module(name, package=None):
    module = load(name, package)
    if name.startswith("nemo_steerlm.verbs."):
        sys.modules["nemo_steerlm.models.base"].MegatronModel.build = lambda *_, **__: sys.exit()
    return module

importlib.import_module = import_module
sys.exit(cli.main(sys.argv[1:]) or "it got past the model")
"""


def rows(folder: Path, runs: int) -> Iterator[Row]:
    """Measure everything here; `folder` holds the inputs."""
    runs = max(runs, RUNS)
    growth.python(_REGRESSOR, folder)
    policy, data = growth.policy(folder, 6), folder / "to-start.jsonl"
    with (folder / "conversations.jsonl").open(encoding="utf-8") as lines:
        data.write_text("".join(itertools.islice(lines, 20)), encoding="utf-8")
    regressor = f"checkpoint={folder}/regressor"
    with tempfile.TemporaryDirectory() as output:
        verbs = {
            "generate": ["generate", f"checkpoint={policy}", "prompt=Hello"],
            "annotate": ["annotate", regressor, f"input={data}", f"output={output}/labelled.jsonl"],
            "sample": [
                "sample", f"checkpoint={policy}", f"prompts={data}", f"annotated={data}", "target=[toxicity]",
                f"output={output}/sampled.jsonl",
            ],
            "evaluate": ["evaluate", "task=regressor", regressor, f"input={data}", f"output={output}/evaluation"],
        }  # fmt: skip
        commands = [["-c", "import torch"], *(["-c", _UP_TO_THE_MODEL, *words] for words in verbs.values())]
        found = []
        for turn in range(runs + 1):  # one that warms up
            order = -1 if turn % 2 else 1
            found.append([_seconds(command, folder / "bytecode") for command in commands[::order]][::order])
    for kind, unit in enumerate(("CPU", "wall")):
        torch, *ours = ([1 / seconds[kind] for seconds in side] for side in zip(*found[1:], strict=True))
        for verb, rates in zip(verbs, ours, strict=True):
            ratios = [rate / peer for rate, peer in zip(rates, torch, strict=True)]
            yield Row(
                name=f"{verb}, up to its model, vs import torch, {unit} time", ratio=statistics.median(ratios),
                target=TARGET, ours=statistics.median(rates), peer=statistics.median(torch), unit="starts", runs=runs,
                spread=(min(ratios), max(ratios)),
            )  # fmt: skip


def _seconds(arguments: list[str], bytecode: Path) -> tuple[float, float]:
    """CPU and wall time of a fresh interpreter that finds everything compiled, as pip leaves it."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(bytecode), "PYTHONDONTWRITEBYTECODE": ""}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=inputs.ROOT, env=environment, capture_output=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(done.stderr.decode()[-2000:])
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall
