"""How cost grows: with the data, with the sequence, with the model; and what the help costs."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import annotation, inputs
from benchmarks.measure import Row

_MEMORY = """
import json, resource, sys
from pathlib import Path
from benchmarks.growth import train_packed
rate = train_packed(Path(sys.argv[1]), int(sys.argv[2]))
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, rate]))
"""
_START = """
import json, sys, time
from nemo_steerlm import AttributeConditionedGPT
started = time.perf_counter()
AttributeConditionedGPT.from_pretrained(sys.argv[1])
print(json.dumps([time.perf_counter() - started]))
"""


def rows(folder: Path, runs: int) -> Iterator[Row]:
    """Measure everything here; `folder` holds the inputs."""
    yield from _data(folder)
    yield from _sequence(folder)
    yield from _start(folder, runs)


def _row(name: str, unit: str, small: float, large: float, runs: int = 1) -> Row:
    """`large` beside `small`: a growth factor, recorded without a target."""
    ratio = large / small
    return Row(
        name=name, ratio=ratio, target=None, ours=large, peer=small, unit=unit, runs=runs, spread=(ratio, ratio)
    )


def python(code: str, *arguments: object) -> list[float]:
    """The list of numbers a fresh interpreter prints in its last line."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=inputs.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


# -- data -------------------------------------------------------------------------------------------------------------

_ANNOTATE = """
import json, resource, sys
from pathlib import Path
from benchmarks import annotation
rates = annotation.ours(Path(sys.argv[1]))
next(rates)  # the first run warms up
rate = next(rates)
print(json.dumps([rate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def _data(folder: Path) -> list[Row]:
    """`annotate` over a file and over ten times as much."""
    lines = (folder / "conversations.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    measured = {}
    for times in (1, 10):
        ids = [(copy, row) for copy in range(times) for row in range(len(lines))]
        records = [json.dumps({**json.loads(lines[row]), "id": f"{copy}-{row}"}) for copy, row in ids]
        for name in (annotation.INPUT, annotation.WARM_UP):
            (folder / name).write_text("\n".join(records) + "\n", encoding="utf-8")
        measured[times] = python(_ANNOTATE, folder)
    (one, memory_one), (ten, memory_ten) = measured[1], measured[10]
    return [
        _row("annotate: responses/s at 10x the data vs 1x", "responses/s", one, ten),
        _row("annotate: peak memory at 10x the data vs 1x", "MiB", memory_one, memory_ten),
    ]


# -- sequence ---------------------------------------------------------------------------------------------------------


def train_packed(folder: Path, length: int) -> float:
    """Tokens a second of two optimizer steps on one packed bin of `length` tokens."""
    from benchmarks.training import Samples, passes

    row = length // 256  # samples a bin
    data = Samples(inputs.dense_items(2 * row, 255))
    return next(passes(folder, "policy", "fp32", data, batch=row, max_length=length, pack_length=length))


def _sequence(folder: Path) -> list[Row]:
    measured = {length: python(_MEMORY, folder, length) for length in (1024, 4096, 16384)}
    base_memory, base_rate = measured[1024]
    found = []
    for length in (4096, 16384):
        memory, rate = measured[length]
        found.append(_row(f"packed training: peak memory at {length} tokens vs 1024", "MiB", base_memory, memory))
        found.append(_row(f"packed training: tokens/s at {length} tokens vs 1024", "tokens/s", base_rate, rate))
    return found


# -- start ------------------------------------------------------------------------------------------------------------


def _start(folder: Path, runs: int) -> list[Row]:
    found = []
    loads = {}
    for layers in (6, 96):
        model = policy(folder, layers)
        loads[layers] = [python(_START, model) for _ in range(runs)]
    median = {layers: statistics.median(load for (load,) in values) for layers, values in loads.items()}
    found.append(_row("loading a model folder of 96 layers vs 6", "s", median[6], median[96], runs))
    empty = statistics.median(_seconds("-c", "pass") for _ in range(5))
    help_ = statistics.median(_seconds("-m", "nemo_steerlm", "--help") for _ in range(5))
    found.append(_row("steerlm --help vs an empty python", "s", empty, help_, 5))
    return found


def _seconds(*arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


_MAKE = """
import json, sys
from nemo_steerlm import config as configs
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.megatron import parallel
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.train.start import start_model
folder, layers, preset = sys.argv[1:]
parallel.initialize()
shape = dict(hidden_size=256, ffn_hidden_size=768, num_attention_heads=8)
architecture = configs.Architecture(num_layers=int(layers), **shape)
training = configs.TrainSftConfig(
    output="", data=configs.PolicyDataConfig(train=""), optimizer=configs.OptimizerConfig(lr=0.0),
    model=configs.ModelConfig(architecture=architecture, tokenizer=f"{folder}/llama"),
    trainer=configs.TrainerConfig(max_steps=1, global_batch_size=1, micro_batch_size=1),
)
model = start_model(AttributeConditionedGPT, training, AttributeSchema.load(preset))
model.save_pretrained(f"{folder}/policy-{layers}")
print(json.dumps([]))
"""


def policy(folder: Path, layers: int) -> Path:
    """A policy's model folder with random weights."""
    path = folder / f"policy-{layers}"
    if not path.is_dir():
        python(_MAKE, folder, layers, inputs.preset())
    return path
