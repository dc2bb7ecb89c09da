"""Annotation by any number of ranks and shards, killed at any moment, gives one and the same file."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_steerlm.config import AnnotateConfig, ComputeConfig, ParallelConfig
from nemo_steerlm.conversation import read_conversations, write_conversations
from tests.distributed import run_distributed
from tests.verbs.forks import finish, kill_when, start
from tests.verbs.helpers import make_world, regressor_config

ROWS, KILLS, PART = 240, 10, 2


def _after_a_part(parts: Path, wait: float) -> Callable[[], bool]:
    """The moment `wait` seconds after the first new part."""
    there = len(list(parts.glob("part-*")))

    def moment() -> bool:
        come = len(list(parts.glob("part-*"))) > there
        time.sleep(wait if come else 0)
        return come

    return moment


def annotate_everything(folder: str) -> dict:
    """All of it in one process that imports once; every run is a set of forked children."""
    from nemo_steerlm.verbs import annotate, train_regressor

    world = Path(folder)
    make_world(world)
    finish(start(lambda: train_regressor.main(regressor_config(world, steps=1))))
    _rows(world)

    def job(output: str, **changes) -> Callable[[], None]:
        settings = dict(part_size=PART, batch_tokens=512, trainer=ComputeConfig())
        return lambda: annotate.main(
            AnnotateConfig(
                checkpoint=str(world / "regressor/model"),
                input=str(world / "rows.jsonl"),
                output=str(world / output),
                **{**settings, **changes},
            )  # fmt: skip
        )

    finish(start(job("whole.jsonl")))
    moments, parts, killed, left = random.Random(5), world / "killed.jsonl.parts", [], []
    for attempt in range(KILLS):
        moment = _after_a_part(parts, moments.uniform(0, 0.04))
        killed.append(kill_when(moment, start(job("killed.jsonl"), 1 + attempt % 3)))
        left.append(len(list(parts.glob("part-*"))))
    for ranks in (1, 2, 3):
        shutil.copytree(parts, world / f"resumed-{ranks}.jsonl.parts")
        finish(start(job(f"resumed-{ranks}.jsonl"), ranks))
    for shard in (2, 0, 1):
        finish(start(job("sharded.jsonl", shards=f"{shard}/3")))
        left.append(len(list(world.glob("sharded.jsonl.parts/part-*"))))
    finish(start(job("tensor.jsonl", parallel=ParallelConfig(tensor=2)), 2))
    before = (world / "whole.jsonl").stat().st_mtime_ns
    finish(start(job("whole.jsonl"), 2))
    return {"killed": killed, "left": left, "written again": (world / "whole.jsonl").stat().st_mtime_ns != before}


def _rows(world: Path) -> None:
    """Rows of the synthetic world under new names, every tenth of them many times as long."""
    source = list(read_conversations(world / "data/unlabelled.jsonl"))
    rows = [dataclasses.replace(source[i % len(source)], id=f"row-{i}") for i in range(ROWS)]
    for row in rows[::10]:
        row.turns = row.turns * 5
    write_conversations(world / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("annotation")
    return {"folder": folder, **run_distributed(annotate_everything, 1, folder=str(folder), timeout=600)}


def test_killed_ten_times_and_resumed_at_any_number_of_ranks(outcome: dict) -> None:
    assert outcome["killed"] == [True] * KILLS
    assert outcome["left"][:KILLS] == sorted(outcome["left"][:KILLS])  # a kill loses no part
    assert 0 < outcome["left"][KILLS - 1] < ROWS // PART  # and the job was not done before it was resumed
    folder = outcome["folder"]
    whole = (folder / "whole.jsonl").read_bytes()
    assert [json.loads(line)["id"] for line in whole.splitlines()] == [f"row-{i}" for i in range(ROWS)]
    for ranks in (1, 2, 3):
        assert (folder / f"resumed-{ranks}.jsonl").read_bytes() == whole
        assert not (folder / f"resumed-{ranks}.jsonl.parts").exists()


def test_shards_are_joined_by_the_last(outcome: dict) -> None:
    assert outcome["left"][KILLS:] == [40, 80, 0]
    folder = outcome["folder"]
    assert (folder / "sharded.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert (folder / "sharded.manifest.json").read_bytes() == (folder / "whole.manifest.json").read_bytes()
    assert json.loads((folder / "sharded.report.json").read_text())["conversations"] == ROWS


def test_the_ranks_of_one_model_do_a_part_together(outcome: dict) -> None:
    folder = outcome["folder"]
    for one, two in zip(*(read_conversations(folder / f"{n}.jsonl") for n in ("whole", "tensor")), strict=True):
        for turn, other in zip(one.turns, two.turns, strict=True):
            assert (turn.label_predicted is None) == (other.label_predicted is None)
            for name, value in (turn.label_predicted or {}).items():
                assert other.label_predicted is not None
                assert other.label_predicted[name] == pytest.approx(value, abs=2e-4)


def test_a_finished_job_is_not_done_again(outcome: dict) -> None:
    assert not outcome["written again"]
