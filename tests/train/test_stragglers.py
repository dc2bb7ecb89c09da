"""The report names the slow rank and what it is slow in, by clocks that the work of each rank moves."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_steerlm.config import ParallelConfig
from nemo_steerlm.train.stragglers import judge
from tests.distributed import run_distributed
from tests.models.helpers import make_task, train


def train_with_a_slow_rank(folder: str) -> dict:
    """Two data-parallel ranks; the second takes three times as long for a loss, the first waits for it."""
    from nemo_steerlm.megatron import optim, phases
    from nemo_steerlm.models import training

    slow = os.environ["RANK"] == "1"
    now, said = [0.0], []
    for module in (phases, training):
        module.time = SimpleNamespace(perf_counter=lambda: now[0])  # type: ignore[attr-defined]

    def taking(function: Any, seconds: float) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            now[0] += seconds
            return function(*args, **kwargs)

        return call

    def task_of(model: Any) -> Any:
        task = make_task(model)
        task.collate, task.loss = taking(task.collate, 0.25), taking(task.loss, 3.0 if slow else 1.0)
        return task

    room: Any = optim
    room.finalize_model_grads = taking(room.finalize_model_grads, 0.0 if slow else 4.0)
    room.move = taking(room.move, 0.125)
    logger = logging.getLogger("nemo_steerlm.train.stragglers")
    logger.setLevel(logging.INFO)
    logger.addHandler(SimpleNamespace(level=0, handle=lambda record: said.append(record.getMessage())))  # type: ignore[arg-type]
    settings: dict[str, Any] = dict(init=None, parallel=ParallelConfig(), make_task=task_of, validate=False)
    lines = train("policy", Path(folder) / "run", straggler_every=2, **settings)
    return {"lines": lines, "said": said}


def test_the_slow_rank_is_named_with_its_phases(tmp_path: Path) -> None:
    found = run_distributed(train_with_a_slow_rank, 2, folder=str(tmp_path))
    # two micro-batches a step and rank: 6.5 s and 2.5 s of own work a step
    figures = {"rank": 1, "ratio": 6.5 / 4.5, "data": 0.5, "forward_backward": 6.0, "optimizer": 0.125, "other": 0}
    expected = {f"straggler/{name}": pytest.approx(value) for name, value in figures.items()}
    reports = [line for line in found["lines"] if "straggler/rank" in line]
    assert reports == [{"step": step, **expected} for step in (2, 4)]
    assert len(found["said"]) == 2
    assert found["said"][0].startswith("stragglers at step 2: slowest is rank 1 on ")
    assert found["said"][0].endswith(
        ", 1.44 x the median; a step (the median): data 0.500 s (0.500); forward and backward 6.000 s (4.000); "
        "optimizer 0.125 s (0.125); other 0.000 s (2.000)"
    )


def test_the_slowest_is_who_works_longest_not_who_waits() -> None:
    rows = [[1.0, 2.0, 0.1, 9.0], [4.0, 2.0, 0.1, 0.0], [1.0, 3.0, 0.1, 5.0]]
    rank, figures = judge(rows)
    assert rank == 1 and figures["straggler/ratio"] == pytest.approx(6.0 / 4.0)
    assert figures["straggler/data"] == 4.0 and figures["straggler/other"] == 0.0
