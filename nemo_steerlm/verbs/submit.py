"""`steerlm submit`: a verb as a job of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_steerlm.config import compose
from nemo_steerlm.config.cluster import SUBMITTED, ClusterConfig, SubmitConfig
from nemo_steerlm.config.options import parse
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.launch import slurm


def main(config: SubmitConfig) -> str:
    """`steerlm submit`: hand a verb to SLURM; returns what to print.

    Raises:
        ConfigError: the verb's words are wrong, it has no output, or SLURM refuses the job.
    """
    config.validate()
    options = parse(config.verb, config.keys)
    if options.help or options.cfg or options.info or options.multirun:
        raise ConfigError(f"--help, --cfg, --info and --multirun belong to `steerlm {config.verb}` itself")
    settings = compose.load(
        config.verb, SUBMITTED[config.verb], options.words, options.config_dir, config=options.config
    )
    job = job_of(config, settings)
    if config.dry_run:
        return slurm.render(job, config.cluster)
    number = slurm.submit(job, config.cluster, config.after)
    logs = f"{job.name}-{number}" + ("_TASK" if job.array else "")
    return f"job {number}: {job.script}\nlogs in {job.folder}: {logs}.log, and {logs}-RANK.log of each process"


def job_of(config: SubmitConfig, settings: Any) -> slurm.Job:
    """The job of a verb with these settings (raises ConfigError)."""
    if getattr(settings, "output", None) is None:
        raise ConfigError(f"{config.verb}: output= is missing; the job's script and logs lie beside it")
    cluster, output = config.cluster, Path(settings.output).absolute()
    trainer = getattr(settings, "trainer", None)
    if trainer is None and (cluster.nodes or 1) > 1:
        raise ConfigError(f"cluster.nodes={cluster.nodes}: {config.verb} works in one process")
    if config.array and getattr(settings, "shards", None) is not None:
        raise ConfigError(f"array={config.array} gives each task its shards; leave out shards={settings.shards}")
    nodes, processes, gpus, more = _processes(cluster, trainer)
    return slurm.Job(
        verb=config.verb,
        words=[*config.keys, *more],
        folder=output.with_name(output.name + ".jobs") if output.suffix else output / "jobs",
        directory=Path.cwd(),
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
    given = {"num_nodes": nodes, "devices": processes}
    words = [f"trainer.{key}={value}" for key, value in given.items() if value != getattr(trainer, key)]
    return nodes, processes, gpus, words
