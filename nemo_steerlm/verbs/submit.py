"""`steerlm submit`: a verb as a job of a cluster."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nemo_steerlm.config import compose
from nemo_steerlm.config.cluster import SUBMITTED, ClusterConfig, SubmitConfig
from nemo_steerlm.config.options import parse
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.launch import slurm


def main(config: SubmitConfig) -> str:
    """`steerlm submit`: submit a verb, or run it here; returns what to print.

    Raises:
        ConfigError: the verb's words are wrong, it has no output, or the scheduler refuses the job.
    """
    config.validate()
    options = parse(config.verb, config.keys)
    settings = compose.load(config.verb, SUBMITTED[config.verb], options.words, options.config_dir)
    job = job_of(config, settings)
    if config.dry_run:
        return slurm.render(job, config.cluster)
    number = slurm.submit(job, config.cluster, config.after)
    log = job.folder / f"{job.name}-{number}.log"
    return f"job {number}: {job.script}\nits log: {log}; of its first process: {log.with_name(log.stem + '-0.log')}"


def job_of(config: SubmitConfig, settings: Any) -> slurm.Job:
    """The job of a verb with these settings (raises ConfigError)."""
    if getattr(settings, "output", None) is None:
        raise ConfigError(f"{config.verb}: output= is missing; the job's script and logs lie beside it")
    cluster, output = config.cluster, Path(settings.output).absolute()
    nodes, processes, gpus, more = _processes(cluster, getattr(settings, "trainer", None))
    return slurm.Job(
        verb=config.verb,
        words=[*config.keys, *more],
        folder=output.with_name(output.name + ".jobs") if output.suffix else output / "jobs",
        nodes=nodes,
        processes=processes,
        gpus=gpus,
        name=cluster.name or f"{config.verb}-{output.name}",
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
