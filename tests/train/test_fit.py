"""A run that goes on with another number of data-parallel ranks consumes the samples of the uninterrupted one."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nemo_steerlm.train.batches import StepBatches
from tests.distributed import run_distributed
from tests.verbs.helpers import make_world, policy_config

STEPS, FIRST, BATCH = 16, 6, 8  # steps, those before the change, samples a step


def train_runs(folder: str, runs: list[list[Any]]) -> None:
    """In every process: start or go on with runs, each [name, steps, packed]; a line a step of what it consumed."""
    from nemo_steerlm.verbs import train_sft

    root, rank, ranks = Path(folder), os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (root / "data").exists():
        make_world(root)
    consume = StepBatches.__getitem__
    for name, steps, packed in runs:
        config = policy_config(root, name, steps=steps)
        assert config.model.architecture is not None
        # ranks draw other masks of dropout
        plain = dataclasses.replace(config.model.architecture, hidden_dropout=0.0, attention_dropout=0.0)
        config.model.architecture = plain
        config.data.packing, config.trainer.devices = packed, int(ranks)
        path = root / f"{name}.consumed-{ranks}-{rank}.jsonl"

        def recorded(self: StepBatches, step: int) -> Any:
            found = consume(self, step)
            if len(self) == steps:  # not a validation
                samples = [index for batch in found for index in batch["indices"].tolist()]
                with path.open("a") as file:
                    file.write(json.dumps([step, samples, len(self.lengths)]) + "\n")
            return found

        StepBatches.__getitem__ = recorded  # type: ignore[method-assign]
        train_sft.train(config)
    StepBatches.__getitem__ = consume  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    one, two, whole = ["1 to 2", FIRST, False], ["2 to 1", FIRST, True], ["whole", STEPS, False]
    run_distributed(train_runs, 1, folder=str(root), runs=[whole, one])
    run_distributed(train_runs, 2, folder=str(root), runs=[["1 to 2", STEPS, False], two])
    run_distributed(train_runs, 1, folder=str(root), runs=[["2 to 1", STEPS, True]])
    return root


def _consumed(folder: Path, name: str) -> dict[int, list[list[int]]]:
    """Step -> the samples of each rank."""
    found: dict[int, list[list[int]]] = {}
    for path in sorted(folder.glob(f"{name}.consumed-*.jsonl")):
        for line in path.read_text().splitlines():
            step, samples, count = json.loads(line)
            found.setdefault(step, []).append(samples)
            assert all(0 <= index < count for index in samples)
    return found


@pytest.mark.parametrize("name", ["1 to 2", "2 to 1"])
def test_every_step_has_the_samples_of_the_uninterrupted_run(folder: Path, name: str) -> None:
    expected, found = _consumed(folder, "whole"), _consumed(folder, name)
    assert sorted(found) == sorted(expected) == list(range(STEPS))
    ranks = [1] * FIRST + [2] * (STEPS - FIRST) if name == "1 to 2" else [2] * FIRST + [1] * (STEPS - FIRST)
    assert [len(found[step]) for step in range(STEPS)] == ranks
    in_order = [sorted(sum(found[step], [])) for step in range(STEPS)]
    assert in_order == [sorted(expected[step][0]) for step in range(STEPS)]
    assert all(len(samples) == BATCH for samples in in_order)
    counts = Counter(sum(in_order, []))  # two epochs, each of every sample once, and the first samples of a third
    assert sorted(counts) == list(range(max(counts) + 1)) and set(counts.values()) == {2, 3}


@pytest.mark.parametrize("name", ["1 to 2", "2 to 1"])
def test_losses_are_those_of_the_uninterrupted_run(folder: Path, name: str) -> None:
    def curve(run: str) -> dict[int, tuple[float, float]]:
        rows = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: (row["train/loss"], row["train/grad_norm"]) for row in rows if "train/loss" in row}

    expected, found = curve("whole"), curve(name)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-4), step
