"""`steerlm experiments`: the published recipes that `experiment=` takes, with what they need."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from nemo_steerlm import config as c
from nemo_steerlm.config import compose
from nemo_steerlm.config.experiments import Experiment, experiments
from nemo_steerlm.config.gpus import GPUS
from nemo_steerlm.config.primary import conf_folder
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.report.tables import text_table
from nemo_steerlm.verbs.plan import needs

SCHEMAS: dict[str, type[c.InProcesses]] = {
    "train-regressor": c.TrainRegressorConfig,
    "annotate": c.AnnotateConfig,
    "train-sft": c.TrainSftConfig,
    "sample": c.SampleConfig,
    "bootstrap": c.BootstrapConfig,
}
_HOURS = "hours per 100M tokens"  # of full rows; `plan` with data= tells the hours of a data set
assert tuple(SCHEMAS) == c.choices(c.ExperimentsConfig, "verb")


def main(config: c.ExperimentsConfig) -> str:
    """The list for the terminal: a row for each experiment, and below it what it is.

    Raises:
        ConfigError: as `ExperimentsConfig.validate`; an experiment does not compose.
    """
    config.validate()
    folders = [conf_folder(), *([Path(config.config_dir)] if config.config_dir else [])]
    found = [one for one in experiments(folders) if one.verb == config.verb or config.verb is None]
    if not found:
        return f"no experiment of {config.verb} in {' and '.join(map(str, folders))}"
    rows = [columns(one, config.config_dir) for one in found]
    title, rule, *lines = text_table([list(row.values()) for row in rows], list(rows[0])).splitlines()
    listed = [
        f"{line}\n    {one.summary.partition('. ')[0].removesuffix('.')}"
        for one, line in zip(found, lines, strict=True)
    ]
    return "\n".join([title, rule, *listed])


def columns(experiment: Experiment, config_dir: str | None) -> dict[str, Any]:
    """What the list says of one experiment, by column."""
    row = {
        "experiment": experiment.name,
        "model": experiment.model,
        "verb": experiment.verb,
        "GPUs": None,
        "GiB": None,
        _HOURS: None,
    }
    return {**row, **_needs(experiment, config_dir)} if experiment.verb in SCHEMAS else row


def _needs(experiment: Experiment, config_dir: str | None) -> dict[str, Any]:
    """What the composed experiment runs on, and by `plan` the memory of its fullest GPU and the time of tokens."""
    _, verb, *words = shlex.split(experiment.command)
    try:
        config = compose.load(verb, SCHEMAS[verb], words, config_dir)
    except ConfigError as error:
        raise ConfigError(f"experiment={experiment.name}: {error}") from error
    trainer, (memory, speed) = config.trainer, needs(config, words) or (None, None)
    kind = GPUS[trainer.gpu].label if trainer.gpu else "any"
    return {
        "GPUs": f"{trainer.num_nodes * trainer.devices} x {kind}",
        "GiB": None if memory is None else f"{memory / 2**30:5.1f}",
        _HOURS: None if speed is None else f"{1e8 / speed / 3600:6.2f}",
    }
