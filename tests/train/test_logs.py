"""Every logger shows the whole configuration of the run and its metrics."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_steerlm.config import LoggingConfig
from nemo_steerlm.errors import ConfigError
from tests.verbs.helpers import make_world

TRAIN = (
    "train-sft attributes=synthetic model=llama_tiny model.tokenizer=tokenizer data.train=data/train.jsonl "
    "data.max_length=256 trainer.max_steps=2 trainer.global_batch_size=4 trainer.micro_batch_size=4 "
    "trainer.accelerator=cpu optimizer.lr=1e-3 steering.check=false"
).split()  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


def train(world: Path, output: str, *words: str) -> Path:
    command = [sys.executable, "-m", "nemo_steerlm", *TRAIN, *words, f"output={output}"]
    done = subprocess.run(command, cwd=world, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return world / output


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """As Lightning names hyperparameters: section/key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def test_tensorboard_shows_the_configuration(world: Path) -> None:
    run = train(world, "tensorboard")
    shown = yaml.unsafe_load((run / "logs" / "hparams.yaml").read_text())
    whole = yaml.safe_load((run / "config.yaml").read_text())
    assert {key: shown[key] for key in whole} == whole
    assert yaml.safe_load((run / "overrides.yaml").read_text()) == [*TRAIN[1:], "output=tensorboard"]


def test_mlflow_shows_the_configuration_and_the_metrics(world: Path) -> None:
    pytest.importorskip("mlflow", reason="the mlflow extra is not installed")
    run = train(world, "mlflow", "logging.mlflow=true", "logging.tensorboard=false", "logging.name=mine")
    with sqlite3.connect(run / "logs" / "mlflow.db") as store:
        assert store.execute("select name, status from runs").fetchall() == [("mine", "FINISHED")]
        shown = dict(store.execute("select key, value from params").fetchall())
        losses = store.execute("select value from metrics where key = 'train/loss' order by step").fetchall()
    whole = flat(yaml.safe_load((run / "config.yaml").read_text()))
    assert {key: shown.get(key) for key in whole} == {key: str(value)[:250] for key, value in whole.items()}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [value for (value,) in losses] == [row["train/loss"] for row in rows]


def test_wandb_shows_the_configuration(world: Path) -> None:
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    run = train(world, "wandb", "logging.wandb=true", "logging.tensorboard=false")
    (file,) = (run / "logs").glob("wandb/offline-run-*/*.wandb")
    stored = file.read_bytes()  # records of JSON; no public reader
    whole = flat(yaml.safe_load((run / "config.yaml").read_text()))
    names = [key.rpartition("/")[2] for key in whole if "/" in key]
    assert len(names) > 80 and [name for name in names if f'"{name}":'.encode() not in stored] == []
    assert b'"lr":0.001' in stored and b'"global_batch_size":4' in stored


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_steerlm.config.training.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"logging.{name}=true needs .*pip install 'nemo_steerlm\[{name}\]'"):
        LoggingConfig(wandb=name == "wandb", mlflow=name == "mlflow").validate()
