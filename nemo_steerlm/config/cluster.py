"""The settings of `steerlm submit`: what a job asks SLURM for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import MISSING

from nemo_steerlm.config.evaluate import EvaluateConfig
from nemo_steerlm.config.fields import Settings, option
from nemo_steerlm.config.options import bare_word
from nemo_steerlm.config.train_verbs import BootstrapConfig, TrainRegressorConfig, TrainSftConfig
from nemo_steerlm.config.verbs import AnnotateConfig, ExportConfig, ImportConfig, PrepareConfig, SampleConfig
from nemo_steerlm.errors import ConfigError, suggest

#: Verbs that can be a job, with their settings.
SUBMITTED: dict[str, type] = {
    "prepare": PrepareConfig,
    "import": ImportConfig,
    "train-regressor": TrainRegressorConfig,
    "annotate": AnnotateConfig,
    "train-sft": TrainSftConfig,
    "sample": SampleConfig,
    "bootstrap": BootstrapConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
}
SHARDED = ("annotate", "sample")
_TIME = re.compile(r"(\d+-)?\d+(:[0-5]?\d){0,2}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MAIL = "BEGIN, END, FAIL, REQUEUE, TIME_LIMIT_80, TIME_LIMIT_90, ALL, NONE, joined by commas"


@dataclass(kw_only=True)
class ContainerConfig(Settings):
    """The container that a job's processes run in."""

    kind: str = option("none", "how the image is started", choices=("none", "pyxis", "apptainer"))
    image: str | None = option(
        None, "image: a .sqsh or .sif file, or REGISTRY#IMAGE:TAG (pyxis), docker://... (apptainer)"
    )
    mounts: list[str] = option(list, "folders of the host inside, each HOST:INSIDE or HOST:INSIDE:ro")

    def validate(self, prefix: str = "") -> None:
        """As `Settings.validate`, and that there is an image exactly where one is used."""
        super().validate(prefix)
        if self.kind != "none" and not self.image:
            raise ConfigError(f"{prefix}image is missing; give it on the command line, e.g. {prefix}image=nemo.sqsh")
        if self.kind == "none" and (self.image or self.mounts):
            raise ConfigError(f"{prefix}image and {prefix}mounts need {prefix}kind=pyxis or apptainer")
        for mount in self.mounts:
            if not re.fullmatch(r"[^:,\s]+:[^:,\s]+(:r[ow])?", mount):
                raise ConfigError(
                    f"{prefix}mounts: '{mount}' is not of the form HOST:INSIDE[:ro] without spaces or commas"
                )


@dataclass(kw_only=True)
class ClusterConfig(Settings):
    """What a job asks SLURM for. Empty values are left to the cluster's own defaults."""

    nodes: int | None = option(None, "nodes; null = the verb's trainer.num_nodes", least=1)
    gpus_per_node: int | None = option(
        None, "GPUs a node; null = the verb's trainer.devices, 0 = ask for none", least=0
    )
    cpus_per_task: int | None = option(None, "cores of each process", least=1)
    memory: str | None = option(None, "memory a node, e.g. 200G; 0 = all of it")
    time: str = option("24:00:00", "time limit: MINUTES, H:M:S, DAYS-H or DAYS-H:M:S")
    account: str | None = option(None, "account that is charged")
    partition: str | None = option(None, "partition, or several joined by commas")
    qos: str | None = option(None, "quality of service")
    reservation: str | None = option(None, "reservation")
    constraint: str | None = option(None, "features the nodes must have, e.g. h100&ib")
    exclusive: bool = option(True, "take whole nodes")
    mail_user: str | None = option(None, "address for mail")
    mail_type: str | None = option(None, f"when to send mail: {_MAIL}")
    comment: str | None = option(None, "comment that SLURM keeps")
    name: str | None = option(None, "name of the job; null = the verb and the output folder's name")
    extra: list[str] = option(list, "more options of sbatch, as written, e.g. [--gres=nvme:1]")
    environment: dict[str, str] = option(dict, "variables of the job, e.g. {NCCL_IB_HCA: mlx5}")
    setup: list[str] = option(list, "shell lines before the processes start, as written, e.g. [module load cuda]")
    start: str = option(
        "srun", "how processes start: srun = one task a GPU; torchrun = one task a node", choices=("srun", "torchrun")
    )
    program: str | None = option(
        None, "the steerlm command on the nodes; null = this Python, `steerlm` in a container"
    )
    container: ContainerConfig = option(ContainerConfig, "container")
    save_before: int = option(300, "seconds before the time limit at which the processes save and end", least=10)
    restarts: int = option(100, "how often a job that was stopped or preempted is queued again", least=0)

    def validate(self, prefix: str = "") -> None:
        """As `Settings.validate`; one line for each option, names of variables, the form of the time."""
        super().validate(prefix)
        for name, value in vars(self).items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and not text.isprintable():
                    raise ConfigError(f"{prefix}{name}={text!r}: expected one line of printable characters")
        if self.name is not None and set(self.name) & set("/%"):
            raise ConfigError(f"{prefix}name={self.name}: expected the name of a file, without / and %")
        if not _TIME.fullmatch(self.time):
            raise ConfigError(f"{prefix}time={self.time}: expected MINUTES, H:M:S, DAYS-H or DAYS-H:M:S")
        for name, text in self.environment.items():
            if not _NAME.fullmatch(name):
                raise ConfigError(f"{prefix}environment: '{name}' is not the name of a variable")
            if "\0" in text:
                raise ConfigError(f"{prefix}environment.{name} holds a NUL character, which no variable can")
        for line in self.extra:
            if not line.startswith("-"):
                raise ConfigError(f"{prefix}extra: '{line}' is no option of sbatch; expected e.g. --gres=nvme:1")


@dataclass(kw_only=True)
class SubmitConfig(Settings):
    """Settings of `steerlm submit`."""

    verb: str = option(MISSING, "verb that the job runs", choices=tuple(SUBMITTED), example="train-sft")
    keys: list[str] = option(list, "the verb's own words, as on its command line")
    cluster: ClusterConfig = option(ClusterConfig, "what the job asks SLURM for")
    dry_run: bool = option(False, "print the batch script and submit nothing")
    array: int | None = option(None, "run as a job array of so many tasks, each a shard (annotate, sample)", least=2)
    after: list[int] = option(list, "numbers of jobs that must succeed first, e.g. [4711]", least=1)

    def validate(self, prefix: str = "") -> None:
        """As `Settings.validate`, and that only verbs with shards are arrays."""
        super().validate(prefix)
        if self.array is not None and self.verb not in SHARDED:
            raise ConfigError(f"array={self.array}: {self.verb} has no shards; {' and '.join(SHARDED)} have")


def divide(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide the words after `submit` into its own, with the verb, and those of the verb, which follow its name.

    Raises:
        ConfigError: there is no verb, or it cannot be a job.
    """
    place = bare_word(words)
    if place == len(words):
        return list(words), []
    if words[place] not in SUBMITTED:
        raise ConfigError(
            f"'{words[place]}' cannot be submitted{suggest(words[place], SUBMITTED)}; there are {', '.join(SUBMITTED)}"
        )
    return [*words[:place], f"verb={words[place]}"], list(words[place + 1 :])
