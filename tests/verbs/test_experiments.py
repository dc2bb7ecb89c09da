"""`steerlm experiments` says of every recipe what it is and what it runs on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nemo_steerlm import cli
from nemo_steerlm.config import ExperimentsConfig
from nemo_steerlm.config.primary import conf_folder
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.verbs.experiments import main

MINE = """# @package _global_
# Mine on {where}. And more of it.
#   steerlm annotate experiment=mine checkpoint=m input=i.jsonl output=o.jsonl
trainer: {{{trainer}}}
"""


def write(folder: Path, where: str, trainer: str) -> Path:
    (folder / "experiment").mkdir(exist_ok=True)
    (folder / "experiment" / "mine.yaml").write_text(MINE.format(where=where, trainer=trainer))
    return folder


def test_every_experiment_is_listed_with_its_gpus() -> None:
    title, _, *lines = main(ExperimentsConfig()).splitlines()
    assert re.split(" {2,}", title) == ["experiment", "model", "verb", "GPUs", "GiB", "hours per 100M tokens"]
    rows = [re.split(" {2,}", line) for line in lines[::2]]
    assert [row[0] for row in rows] == sorted(file.stem for file in (conf_folder() / "experiment").glob("*.yaml"))
    paper = next(row for row in rows if row[0] == "nemotron_43b-sft-oasst-16x8xa100_80g")
    assert paper[1:] == ["nemotron_43b", "train-sft", "128 x A100-80G", "41.7", "0.60"]
    assert all(line.startswith("    ") and 20 < len(line) < 119 for line in lines[1::2])


def test_a_verb_and_a_folder_of_the_user_choose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "the L40S", "gpu: l40s_48g, devices: 4")
    assert cli.main(["experiments", "annotate", "--config-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("mine "))
    assert re.split(" {2,}", lines[place]) == ["mine", "mine", "annotate", "4 x L40S-48G", "–", "–"]
    assert lines[place + 1] == "    Mine on the L40S"
    assert not any("train-" in line for line in lines)
    assert main(ExperimentsConfig(verb="bootstrap")) == f"no experiment of bootstrap in {conf_folder()}"


def test_an_experiment_that_does_not_compose_is_named(tmp_path: Path) -> None:
    write(tmp_path, "no GPU", "gpus: 8")
    with pytest.raises(ConfigError, match="experiment=mine: unknown key 'trainer.gpus'"):
        main(ExperimentsConfig(config_dir=str(tmp_path)))
