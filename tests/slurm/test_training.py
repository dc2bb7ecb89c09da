"""Trainings on two nodes: equal to those of one process, also after a time limit and a preemption."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_steerlm.config import ModelConfig, ParallelConfig, SteeringCheckConfig, TrainSftConfig
from nemo_steerlm.config.cluster import ClusterConfig
from nemo_steerlm.config.command import command
from nemo_steerlm.launch import slurm
from tests.distributed import ROOT, run_distributed
from tests.slurm.one_machine import Cluster, wait_for
from tests.verbs.helpers import policy_config

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]
STEPS = 10


def submit(cluster: Cluster, world: Path, output: str, parallel: ParallelConfig, **asked: Any) -> int:
    """Submit a training of two nodes with two processes each."""
    config = settings_of(world, output, asked.pop("steps", STEPS), parallel=parallel)
    config.trainer = replace(config.trainer, devices=2, num_nodes=2, accelerator="cpu", micro_batch_size=2)
    verb, *words = shlex.split(command("train-sft", config))[1:]
    job = slurm.Job(
        verb=verb,
        words=words,
        folder=world / output / "jobs",
        directory=world,
        nodes=2,
        processes=2,
        gpus=0,
        name=output,
    )
    environment = {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    settings = ClusterConfig(**{"time": "10", "partition": "low", "environment": environment, **asked})
    settings.validate("cluster.")
    with cluster.entered():
        return slurm.submit(job, settings)


def settings_of(folder: Path, output: str, steps: int, **changes: Any) -> TrainSftConfig:
    """A training without dropout, whose masks would depend on the layout."""
    config = policy_config(folder, output, steps=steps, steering=SteeringCheckConfig(check=False, rows=0), **changes)
    if output == "base":
        assert config.model.architecture is not None
        config.model.architecture.hidden_dropout = config.model.architecture.attention_dropout = 0.0
    else:  # random weights would depend on it too
        config.model = ModelConfig(init=str(folder / "base" / "model"))
    return config


def losses(folder: Path) -> list[float]:
    """Training losses by step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def log(folder: Path) -> str:
    """What the jobs of a run folder wrote."""
    return "\n".join(f"-- {file.name}\n{file.read_text()}" for file in sorted(folder.rglob("jobs/*.log")))


@pytest.fixture(scope="module")
def alone(world: Path) -> Path:
    """The same training in one process, uninterrupted."""
    run_distributed(train_alone, 1, folder=str(world), output="base", steps=1)
    run_distributed(train_alone, 1, folder=str(world), output="alone", steps=STEPS)
    return world / "alone"


def train_alone(folder: str, output: str, steps: int) -> None:
    from nemo_steerlm.verbs import train_sft

    train_sft.train(settings_of(Path(folder), output, steps))


@pytest.mark.parametrize("parallel", [ParallelConfig(tensor=2, pipeline=2), ParallelConfig()], ids=["tp2pp2", "dp4"])
def test_two_nodes(cluster: Cluster, world: Path, alone: Path, parallel: ParallelConfig) -> None:
    name = f"tp{parallel.tensor}"
    job = submit(cluster, world, name, parallel)
    assert cluster.wait(job, "COMPLETED", "FAILED") == "COMPLETED", log(world / name)
    assert losses(world / name) == pytest.approx(losses(alone), rel=1e-4)


def test_preempted(cluster: Cluster, world: Path, alone: Path) -> None:
    job = submit(cluster, world, "preempted", ParallelConfig())
    metrics = world / "preempted" / "metrics.jsonl"
    wait_for(lambda: cluster.state(job) == "FAILED" or metrics.exists() and metrics.stat().st_size, "a step", 200)
    assert cluster.state(job) == "RUNNING", log(world)
    high = cluster.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 5")
    assert cluster.wait(int(high), "COMPLETED") and cluster.wait(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert cluster.field(job, "Restarts") == "1"
    assert losses(world / "preempted") == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.usefixtures("alone")
def test_time_limit(cluster: Cluster, world: Path) -> None:
    run_distributed(train_alone, 1, folder=str(world), output="long", steps=400)
    job = submit(cluster, world, "limited", ParallelConfig(), steps=400, time="2", save_before=15)
    assert cluster.wait(job, "COMPLETED", "FAILED", "TIMEOUT", seconds=500) == "COMPLETED", log(world / "limited")
    assert int(cluster.field(job, "Restarts")) >= 1
    assert losses(world / "limited") == pytest.approx(losses(world / "long"), rel=1e-3)


@pytest.mark.parametrize("start", ["srun", "torchrun"])
def test_a_signal_to_the_script_saves_and_queues_again(cluster: Cluster, world: Path, alone: Path, start: str) -> None:
    name = f"signalled-{start}"
    job = submit(cluster, world, name, ParallelConfig(), start=start)
    metrics = world / name / "metrics.jsonl"
    wait_for(lambda: cluster.state(job) == "FAILED" or metrics.exists() and metrics.stat().st_size, "a step", 200)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))  # as SLURM does near the time limit
    assert cluster.wait(job, "COMPLETED", "FAILED") == "COMPLETED", log(world / name)
    assert cluster.field(job, "Restarts") == "1", log(world / name)
    assert losses(world / name) == pytest.approx(losses(alone), rel=1e-4)
