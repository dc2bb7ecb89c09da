"""`steerlm submit`: a verb as a job of a cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_steerlm.config.cluster import ClusterConfig, SubmitConfig
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.launch import slurm


def main(config: SubmitConfig, verb: str, words: Sequence[str], settings: Any) -> str:
    """Submit a verb; returns what to print.

    Args:
        config: the cluster.
        verb: the verb.
        words: its words.
        settings: its configuration, which these words gave.

    Raises:
        ConfigError: the verb cannot be a job, or the scheduler refuses it.
    """
    job = job_of(config, verb, words, settings)
    if config.dry_run:
        return slurm.render(job, config.cluster)
    number = slurm.submit(job, config.cluster, config.after)
    log = job.folder / f"{job.name}-{number}.log"
    return f"job {number}: {job.script}\nits log: {log}; of process 0: {log.with_name(log.stem + '-0.log')}"


def job_of(config: SubmitConfig, verb: str, words: Sequence[str], settings: Any) -> slurm.Job:
    """The job of a verb whose words gave `settings` (raises ConfigError)."""
    if getattr(settings, "output", None) is None:
        raise ConfigError(f"{verb} has no output folder or file, and cannot be a job")
    if config.array is not None and not hasattr(settings, "shards"):
        raise ConfigError(f"array={config.array}: {verb} cannot be split in shards")
    cluster, output = config.cluster, Path(settings.output).absolute()
    nodes, processes, gpus, more = _processes(cluster, getattr(settings, "trainer", None))
    return slurm.Job(
        verb=verb,
        words=[*words, *more],
        folder=output.with_name(output.name + ".jobs") if output.suffix else output / "jobs",
        nodes=nodes,
        processes=processes,
        gpus=gpus,
        name=cluster.name or f"{verb}-{output.name}",
        array=config.array,
    )


def _processes(cluster: ClusterConfig, trainer: Any) -> tuple[int, int, int, list[str]]:
    """Nodes, processes and GPUs on each, and the words that tell the verb of them."""
    if trainer is None:  # it works in one process
        return 1, 1, cluster.gpus_per_node or 0, []
    nodes = cluster.nodes or trainer.num_nodes
    gpus = trainer.devices if cluster.gpus_per_node is None else cluster.gpus_per_node
    if trainer.accelerator == "cpu" and cluster.gpus_per_node is None:
        gpus = 0
    processes = trainer.devices if gpus == 0 else gpus
    given = dataclasses.replace(trainer, num_nodes=nodes, devices=processes)
    return (
        nodes,
        processes,
        gpus,
        [
            f"trainer.{key}={getattr(given, key)}"
            for key in ("num_nodes", "devices")
            if getattr(given, key) != getattr(trainer, key)
        ],
    )
