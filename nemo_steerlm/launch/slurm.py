"""A verb as a SLURM job: one readable batch script, its submission, and what the queue says of it.

Values of the configuration reach the script as options of sbatch, quoted for sbatch, or as words of bash, quoted for
bash. Only `cluster.extra` and `cluster.setup` are taken as written.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from nemo_steerlm.config.cluster import ClusterConfig
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.files import atomic_writer
from nemo_steerlm.terminal import shell_word

_TEMPLATES = Path(__file__).with_name("templates")
_OPTIONS = {
    "account": "account", "partition": "partition", "qos": "qos", "reservation": "reservation",
    "constraint": "constraint", "memory": "mem", "time": "time", "mail_user": "mail-user", "mail_type": "mail-type",
    "comment": "comment", "cpus_per_task": "cpus-per-task",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """What runs in one job.

    Attributes:
        verb: the verb.
        words: its `key=value` words.
        folder: where the script and the logs lie: the run folder's `jobs`.
        directory: where the job runs, which its relative paths are below.
        nodes: number of nodes.
        processes: processes on each node.
        gpus: GPUs on each node; 0: none are asked for.
        name: the job's name, also that of its files.
        array: number of tasks of a job array; None: no array.
    """

    verb: str
    words: Sequence[str]
    folder: Path
    directory: Path
    nodes: int
    processes: int
    gpus: int
    name: str
    array: int | None = None

    @property
    def script(self) -> Path:
        """The batch script."""
        return self.folder / f"{self.name}.sbatch"

    @property
    def number(self) -> str:
        """The job's number in the names of its logs, as SLURM fills it in."""
        return "%A_%a" if self.array else "%j"


def render(job: Job, cluster: ClusterConfig) -> str:
    """The batch script of a job.

    Raises:
        ConfigError: a value cannot be given to sbatch, or SLURM would replace part of a log's name.
    """
    if "%" in str(job.folder):
        raise ConfigError(f"{job.folder}: SLURM replaces % in the names of logs; choose an output without it")
    templates = Environment(  # noqa: S701  (a shell script, not HTML; every value is quoted here)
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    return templates.get_template("job.sbatch.j2").render(
        title=shell_word(f"steerlm {job.verb}"),
        file=shell_word(str(job.script)),
        options=[*_options(job, cluster), *cluster.extra],
        environment={name: shell_word(value) for name, value in cluster.environment.items()},
        setup=cluster.setup,
        restarts=cluster.restarts,
        launch=" \\\n    ".join(_launch(job, cluster)),
    )


def submit(job: Job, cluster: ClusterConfig, after: Sequence[int] = ()) -> int:
    """Write a job's script and hand it to sbatch.

    Args:
        after: jobs that must have succeeded before it starts; if one fails, this one is cancelled.

    Returns:
        The job's number.

    Raises:
        ConfigError: there is no sbatch here, or it refuses the job.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with atomic_writer(job.script) as file:
        file.write(render(job, cluster))
    words = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes"]
    if after:
        words.append("--dependency=afterok:" + ":".join(map(str, after)))
    return int(ask([*words, str(job.script)]).split(";")[0])


def ask(words: Sequence[str]) -> str:
    """What a command of SLURM prints (raises ConfigError where it fails or is absent)."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError(
            f"{words[0]}: no such program; `submit` runs on a login node of the cluster (dry_run=true prints the "
            "script anywhere)"
        ) from None
    if done.returncode:
        raise ConfigError(f"{words[0]}: {' '.join(done.stderr.split()) or f'ended with code {done.returncode}'}")
    return done.stdout.strip()


def _options(job: Job, cluster: ClusterConfig) -> list[str]:
    """The options of sbatch, each one line."""
    tasks = job.processes if cluster.start == "srun" else 1
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": tasks,
        **({"gpus-per-node": job.gpus} if job.gpus else {}),
        **{name: getattr(cluster, key) for key, name in _OPTIONS.items() if getattr(cluster, key) is not None},
        **({"array": f"0-{job.array - 1}"} if job.array else {}),
        "chdir": job.directory,
        "output": job.folder / f"%x-{job.number}.log",
        "signal": f"B:USR1@{cluster.save_before}",
    }
    flags = ["--requeue", "--open-mode=append", *(["--exclusive"] if cluster.exclusive else [])]
    return [*(f"--{name}={_sbatch_word(f'--{name}', value)}" for name, value in options.items()), *flags]


def _sbatch_word(name: str, value: object) -> str:
    """A value as sbatch reads it in a script: in double quotes, unless it is plain."""
    text = str(value)
    if not text.isprintable():
        raise ConfigError(f"{name}: {text!r} holds a character that a line of a batch script cannot")
    if text.replace("_", "").replace("-", "").isalnum():
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _launch(job: Job, cluster: ClusterConfig) -> list[str]:
    """The lines of the command that starts the processes on all nodes."""
    log = job.folder / f"%x-{job.number}-%t.log"
    srun = ["srun", "--kill-on-bad-exit=1", f"--output={log}", "--open-mode=append"]
    container = cluster.container
    inside: list[str] = []
    if container.kind == "pyxis":
        srun += [f"--container-image={container.image}", "--no-container-mount-home"]
        if container.mounts:
            srun.append(f"--container-mounts={','.join(container.mounts)}")
    elif container.kind == "apptainer":
        mounts = [word for mount in container.mounts for word in ("--bind", mount)]
        inside = ["apptainer", "exec", "--nv", "--no-home", *mounts, str(container.image)]
    words = [job.verb, *job.words]
    lines = [_words(srun), *([_words(inside)] if inside else []), *_program(job, cluster)]
    if job.array:
        return [*lines, _words(words) + f' "shards=$SLURM_ARRAY_TASK_ID/{job.array}"']
    return [*lines, _words(words)]


def _program(job: Job, cluster: ClusterConfig) -> list[str]:
    own = cluster.program or (
        "steerlm" if cluster.container.kind != "none" else f"{shell_word(sys.executable)} -m nemo_steerlm"
    )
    if cluster.start == "srun":
        return [own]
    python = "python" if cluster.container.kind != "none" or cluster.program else shell_word(sys.executable)
    torchrun = (
        f"{python} -m torch.distributed.run --nnodes={job.nodes} --nproc-per-node={job.processes}"
        ' --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT"'
    )
    return [torchrun, f"--no-python {own}" if cluster.program else "-m nemo_steerlm"]


def _words(words: Sequence[str]) -> str:
    return " ".join(shell_word(word) for word in words)
