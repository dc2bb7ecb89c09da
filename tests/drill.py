"""The drill: a run that is ended and restarted at random moments equals the uninterrupted one, bit for bit.

    make drill                                  # 20 restarts of each kind of run, and a table
    python -m tests.drill --restarts 5 --seed 3

Runs are forked: imports are paid for once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nemo_steerlm.config import LoRAConfig, ModelConfig, OptimizerConfig, RegressorModelConfig
from nemo_steerlm.errors import Stopped
from tests.verbs.forks import finish, start
from tests.verbs.helpers import make_world, policy_config, regressor_config, weights_of

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL)
MOMENTS = ("start", "step", "save")
KINDS = {"policy, LoRA": ("policy", 1), "regressor": ("regressor", 1), "policy, LoRA, local disk": ("policy", 2)}
HEAD = ("run", "processes", "steps", *(number.name for number in SIGNALS), *(f"in {moment}" for moment in MOMENTS),
        "steps replayed", "equal", "seconds")  # fmt: skip


def prepare(folder: Path) -> None:
    """Data, tokenizer, and the model that adapters are trained on."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    make_world(folder)
    finish(start(lambda: _main("policy")(_packed(policy_config(folder, "base", steps=2)))))


def drill(folder: Path, name: str, restarts: int, seed: int) -> dict[str, Any]:
    """One row of the table: a kind of run, uninterrupted and ended `restarts` times.

    "In start", "in step" and "in save" count the moments that were aimed at. A signal while a run loads ends it at
    once: there is nothing to save. Steps are replayed that were logged, but are in no checkpoint.

    Args:
        folder: where `prepare` has been.
        name: of `KINDS`.
        seed: of signals and moments.
    """
    kind, ranks = KINDS[name]
    chance, began, main = random.Random(f"{seed} {name}"), time.monotonic(), _main(kind)
    steps = 3 * restarts
    whole, drilled = (_config(folder, kind, f"{kind}-{ranks}-{end}", steps) for end in ("whole", "drilled"))
    if "disk" in name:
        drilled.trainer.checkpoint_local_dir = str(folder / "disk")
    finish(start(lambda: main(whole), ranks))
    run, counts, replayed = Path(drilled.output), Counter[str](), 0
    for _ in range(restarts):
        number, moment = chance.choice(SIGNALS), chance.choice(MOMENTS)
        children = start(_stoppable(lambda: main(drilled)), ranks)
        _wait_for(moment, run, children, chance)
        told = children if number == signal.SIGKILL else [chance.choice(children)]
        assert not _end(children, told, number) <= {0}, "the run was done before its restarts were"
        counts.update((number.name, moment))
        replayed += max(0, _logged(run) - max((*_saved(run), *_on_disk(folder)), default=0))
    finish(start(lambda: main(drilled), ranks))
    found = folder / f"{kind}-{ranks}.json"
    finish(start(lambda: _write(found, _same(Path(whole.output), run))))
    row = [name, ranks, steps, *(counts[n.name] for n in SIGNALS), *(counts[moment] for moment in MOMENTS)]
    return dict(zip(HEAD, [*row, replayed, json.loads(found.read_text()), round(time.monotonic() - began)]))


def import_verbs() -> None:
    """Import what the runs need, before they are forked."""
    import nemo_steerlm.verbs.train_regressor
    import nemo_steerlm.verbs.train_sft  # noqa: F401


def _main(kind: str) -> Callable[[Any], Any]:
    from nemo_steerlm.verbs import train_regressor, train_sft

    return train_sft.train if kind == "policy" else train_regressor.main


def _packed(config: Any) -> Any:
    """Packed rows, whose attention has no dropout, and few validations."""
    config.data.packing, config.trainer.val_every = True, 20
    if config.model.architecture is not None:
        config.model.architecture = dataclasses.replace(config.model.architecture, attention_dropout=0.0)
    return config


def _config(folder: Path, kind: str, output: str, steps: int) -> Any:
    """Packed, with dropout, a moving average of the weights and checkpoints in the background."""
    changes: dict[str, Any] = {"optimizer": OptimizerConfig(lr=1e-3, warmup_steps=2, ema_decay=0.9)}
    base = str(folder / "base/model")
    if kind == "policy":
        config: Any = policy_config(folder, output, steps, model=ModelConfig(init=base), **changes)
        config.model.lora = LoRAConfig(rank=4, dropout=0.1)
    else:
        config = regressor_config(folder, output, steps, model=RegressorModelConfig(init=base), **changes)
    config.trainer.async_checkpoint = True
    return _packed(config)


def _stoppable(work: Callable[[], Any]) -> Callable[[], None]:
    """As the command line ends a run that a signal stopped."""

    def run() -> None:
        try:
            work()
        except Stopped as stop:
            os._exit(128 + stop.number)

    return run


def _wait_for(moment: str, run: Path, children: list[int], chance: random.Random) -> None:
    """Wait for a moment of a run that was just started: while it loads, between or in steps, or in a save."""
    first, more, late = _logged(run), chance.randint(1, 3), chance.random()
    while not any(map(_ended, children)):
        if moment == "start" or (moment == "step" and _logged(run) >= first + more):
            break
        saves = (*run.glob("checkpoints/step-*.unfinished"), *run.parent.glob("disk/*/step-*.unfinished"))
        if moment == "save" and saves and _logged(run) > first:
            break
        time.sleep(0.0005)
    time.sleep(late * {"start": 1.0, "step": 0.05, "save": 0.01}[moment])


def _end(children: list[int], told: Iterable[int], number: int) -> set[int]:
    """Send a signal to some ranks; the exit codes of all. Like the launcher, kill those that outlive a failed one."""
    for child in told:
        os.kill(child, number)
    deadline = None
    while not all(map(_ended, children)):
        if deadline is None and any(map(_ended, children)):
            deadline = time.monotonic() + 10
        if deadline is not None and time.monotonic() > deadline:
            for child in children:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    codes = {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
    assert len(children) > 1 or codes <= {0, -number, 128 + number}, codes
    return codes


def _ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _rows(run: Path) -> list[dict]:
    path, rows = run / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a half line
        rows.append({name: value for name, value in row.items() if name != "train/tokens_per_second"})
    return rows


def _logged(run: Path) -> int:
    return max((row["step"] for row in _rows(run) if "train/loss" in row), default=0)


def _saved(run: Path) -> list[int]:
    """Steps of complete checkpoints."""
    found = (path.parent.name for path in run.glob("checkpoints/step-*/metadata.json"))
    return [int(name.removeprefix("step-")) for name in found if "." not in name]


def _on_disk(folder: Path) -> list[int]:
    """Steps of complete checkpoints that have not been copied out."""
    found = (path.parent.name for path in folder.glob("disk/*/step-*/SHA256SUMS"))
    return [int(name.removeprefix("step-")) for name in found if "." not in name]


def _same(one: Path, two: Path) -> bool:
    """Whether every logged figure, every weight and every tensor of the last training state are equal."""
    import torch
    from megatron.core import dist_checkpointing

    from nemo_steerlm.config import ParallelConfig
    from nemo_steerlm.megatron import parallel

    parallel.initialize(ParallelConfig())

    def state(run: Path) -> dict[str, Any]:
        folder = run / f"checkpoints/step-{max(_saved(run)):08d}"
        tensors = {f"state {k}": v for k, v in dist_checkpointing.load_plain_tensors(str(folder)).items()}
        return {**weights_of(run / "model"), **tensors}

    first, second = state(one), state(two)
    assert len(first) > 20 and any("average" in name for name in first)
    equal = all(
        torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else True for name, value in first.items()
    )
    return _rows(one) == _rows(two) and first.keys() == second.keys() and equal


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [HEAD, ["---"] * len(HEAD), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main() -> int:
    """Run the drill; 1 if a run was not equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # more threads do not survive a fork
    import_verbs()
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        prepare(Path(folder))
        rows = [drill(Path(folder), name, asked.restarts, asked.seed) for name in KINDS]
    sys.stdout.write(table(rows) + "\n")
    return int(not all(row["equal"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
