"""The experiments are listed with the command that each file's first comment holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_steerlm.config.experiments import experiment, experiments
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
