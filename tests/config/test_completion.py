"""Completion offers verbs, groups, keys and choices; bash takes them through Hydra's script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_steerlm import cli, config
from nemo_steerlm.config.completion import candidates, script
from nemo_steerlm.config.experiments import experiments
from nemo_steerlm.config.primary import conf_folder
from nemo_steerlm.errors import ConfigError

VERBS = {verb: getattr(config, row[1]) for verb, row in cli.VERBS.items()}
# which other packages bring; NeMo's is there once nemo is imported
OTHERS = ["hydra/launcher=joblib", "hydra/launcher=nemo_launcher"]
OFFERED = {
    "steerlm ": [*sorted([*VERBS, "help", "version"])],
    "steerlm tr": ["train-regressor", "train-sft"],
    "steerlm help prep": ["prepare"],
    "steerlm train-sft opt": ["optimizer.", "optimizer="],
    "steerlm train-sft seed=3  optimizer.s": ["optimizer.schedule="],
    "steerlm train-sft optimizer.schedule=": ["optimizer.schedule=constant", "optimizer.schedule=cosine"],
    "steerlm train-sft model=llama_": ["model=llama_260k", "model=llama_tiny"],
    "steerlm train-sft ~opt": ["~optimizer", "~optimizer."],
    "steerlm train-sft data.packing=": ["data.packing=false", "data.packing=true"],
    "steerlm train-sft seed=": [],
    "steerlm train-sft --config-": ["--config-dir", "--config-name", "--config-path"],
    "steerlm train-sft --cfg j": ["job"],
    "steerlm train-sft --info defaults-": ["defaults-tree"],
    "steerlm train-sft -m hydra/launcher=": ["hydra/launcher=basic"],
    "steerlm prepare experiment=": [],
    "steerlm nothing s": [],
}  # fmt: skip


@pytest.mark.parametrize("line", OFFERED)
def test_what_fits_is_offered(line: str) -> None:
    assert [
        found for found in candidates(line, VERBS) if found in OFFERED[line] or "launcher" not in found
    ] == OFFERED[line]


def test_files_folders_and_the_users_own_choices_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "experiment" / "paper").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "paper" / "one.yaml").write_text("seed: 1\n")
    (tmp_path / "my.yaml").write_text("seed: 1\n")
    assert candidates("steerlm train-sft data.train=m", VERBS) == ["data.train=mine/", "data.train=my.yaml"]
    assert candidates("steerlm train-sft --config my", VERBS) == ["my.yaml"]
    own = candidates("steerlm train-sft --config-dir mine experiment=", VERBS)
    theirs = [f"experiment={one.name}" for one in experiments([conf_folder()]) if one.verb == "train-sft"]
    assert own == sorted(["experiment=paper/one", *theirs])


def test_bash_completes_through_hydras_script(tmp_path: Path) -> None:
    program = tmp_path / "steerlm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m nemo_steerlm "$@"\n')
    program.chmod(0o755)
    code = """eval "$(steerlm -sc install=bash)"
COMP_LINE="steerlm train-sft trainer.precision= seed=1" COMP_POINT=36 COMP_CWORD=2
hydra_bash_completion
printf '%s ' "${COMPREPLY[@]}" # """
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", code], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.stdout.split() == [f"trainer.precision={name}" for name in ("bf16", "fp32", "fp8")], done.stderr


def test_other_shells_and_mistakes(capsys: pytest.CaptureFixture) -> None:
    assert "complete -c steerlm -x -a '(hydra_fish_completion)'" in script("install=fish")
    assert script("install=zsh").startswith("autoload -Uz bashcompinit")
    assert cli.main(["-sc", "install=bsh"]) == 2
    assert "no such shell; there are bash, fish, zsh; did you mean 'bash'?" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="expected install=SHELL or uninstall=SHELL, e.g. steerlm -sc install=bash"):
        script("")
