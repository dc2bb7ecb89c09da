"""The experiments are listed with the command that each file's first comment holds."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from nemo_steerlm import config
from nemo_steerlm.cli import VERBS
from nemo_steerlm.config import compose
from nemo_steerlm.config.experiments import Experiment, experiment, experiments
from nemo_steerlm.config.primary import conf_folder
from nemo_steerlm.errors import ConfigError

OWN = """# @package _global_
# Mine,
# in two lines.
#   srun steerlm train-sft experiment=mine output=outputs/mine
optimizer:
  lr: 1e-3
"""


def test_every_experiment_names_its_command():
    for found in experiments([conf_folder()]):
        assert found.summary.endswith("."), found
        assert f"experiment={found.name}" in found.command.split(), found
        assert found.verb in ("train-sft", "train-regressor", "annotate", "sample", "bootstrap"), found


def test_own_experiments_stand_beside(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(OWN)
    (tmp_path / "experiment" / "bare.yaml").write_text("optimizer: {lr: 1e-3}\n")
    folders = [conf_folder(), tmp_path]
    mine = experiment("mine", folders)
    assert (mine.verb, mine.summary) == ("train-sft", "Mine, in two lines.")
    assert mine.command == "steerlm train-sft experiment=mine output=outputs/mine"
    assert experiment("bare", folders).verb == ""
    with pytest.raises(ConfigError, match="experiment=other: no such experiment; there are .*mine"):
        experiment("other", folders)


EXPERIMENTS = experiments([conf_folder()])


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_an_experiment_is_what_its_name_says(experiment: Experiment) -> None:
    model, task, _, hardware = experiment.name.split("-")
    _, verb, *words = shlex.split(experiment.command)
    settings = compose.load(verb, getattr(config, VERBS[verb][1]), words)
    if verb.startswith("train-"):
        assert settings.data.row_length() == settings.data.max_length == 4096  # on packed rows
        assert bool(settings.model.lora.rank) == ("lora" in task)
        assert experiment.verb == ("train-sft" if task.startswith("sft") else "train-regressor")
    else:
        assert task.startswith(verb)
    assert (conf_folder() / "model" / f"{model}.yaml").is_file()
    trainer = settings.trainer
    nodes = f"{trainer.num_nodes}x" if trainer.num_nodes > 1 else ""
    assert (f"{nodes}{trainer.devices}x{trainer.gpu}", trainer.precision) == (hardware, "bf16")


def test_an_experiment_of_another_verb_is_refused():
    name = "llama2_13b-sft-oasst-8xh100_80g"
    with pytest.raises(ConfigError, match=f"experiment={name} is for `steerlm train-sft`, found `steerlm annotate`"):
        compose.load("annotate", config.AnnotateConfig, [f"experiment={name}", "checkpoint=m", "input=i", "output=o"])
