"""Verbs that get their models from the hub, of which hub_server.py is a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_steerlm import AttributeRegressor
from nemo_steerlm.cli import main
from nemo_steerlm.verbs import train_regressor
from tests.hub_server import Hub, reached, served
from tests.verbs.helpers import make_world, regressor_config

JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
TRAINING = (
    "attributes=synthetic", "data.train=data/train.jsonl", "data.max_length=256", "optimizer.lr=1e-3",
    "trainer.global_batch_size=8", "trainer.micro_batch_size=8", "trainer.progress_bar=false",
    "logging.tensorboard=false", "output=run",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    train_regressor.main(regressor_config(folder, steps=2))
    assert main(["export", f"checkpoint={folder}/regressor/model", f"output={folder}/hf"]) == 0
    return folder


@pytest.fixture
def site(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(world)
    with served() as site, reached(site, tmp_path / "cache", monkeypatch):
        yield site


def test_a_regressor_of_the_hub_labels_as_the_local_one(
    world: Path, site: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = site.add("org/regressor", world / "regressor" / "model")
    rows = {}
    for checkpoint in ("regressor/model", "org/regressor"):
        output = tmp_path / f"{checkpoint.replace('/', '-')}.jsonl"
        assert main(["annotate", f"checkpoint={checkpoint}", "input=data/val.jsonl", f"output={output}"]) == 0
        rows[checkpoint] = output.read_bytes()
    assert rows["regressor/model"] == rows["org/regressor"]
    run = json.loads((tmp_path / "org-regressor.run.json").read_text())
    assert run["config"]["checkpoint"] == f"org/regressor@{commit}"
    assert f"checkpoint=org/regressor@{commit}" in (tmp_path / "org-regressor.report.html").read_text()
    capsys.readouterr()
    words = ["task=regressor", "checkpoint=org/regressor", "input=data/val.jsonl", f"output={tmp_path}/eval"]
    assert main(["evaluate", *words, "calibrate=linear"]) == 2
    assert f"writes into the model folder; org/regressor@{commit} is none" in capsys.readouterr().err
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    from_hub, local = map(AttributeRegressor.from_pretrained, ("org/regressor@main", "regressor/model"))
    assert from_hub.score([chat]) == local.score([chat])


def test_a_hugging_face_folder_of_the_hub_is_imported_or_refused_as_a_local_one(
    world: Path, site: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = site.add("org/hf", world / "hf")
    assert main(["annotate", "checkpoint=org/hf", "input=data/val.jsonl", f"output={tmp_path}/x.jsonl"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"steerlm: error: org/hf@{commit}: not a model folder (no model_config.yaml); ")
    assert f"`steerlm import input=org/hf@{commit}`" in said
    assert main(["import", "input=org/hf", f"output={tmp_path}/imported"]) == 0
    run = json.loads((tmp_path / "imported" / "run.json").read_text())
    assert run["config"]["input"] == f"org/hf@{commit}" and len(run["inputs"]) == 2
    assert main(["annotate", "checkpoint=org/nothing", "input=data/val.jsonl", f"output={tmp_path}/x.jsonl"]) == 2
    assert "org/nothing: no such file or folder here, and the Hugging Face hub shows no" in capsys.readouterr().err


def test_processes_begin_with_one_commit_and_a_resumed_run_stays_with_it(
    world: Path, site: Hub, tmp_path: Path
) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nemo_steerlm", "train-regressor", "model.init=org/base", *TRAINING, *words]
        return subprocess.run(command, env=alone, cwd=world, capture_output=True, text=True)

    alone = {name: value for name, value in os.environ.items() if name not in JOB}
    old = site.add("org/base", world / "regressor" / "model")
    done = run("trainer.max_steps=1", "trainer.devices=2", "trainer.micro_batch_size=4")
    assert done.returncode == 0, done.stderr
    assert len(site.files) == len(set(site.files)) and site.asked.count("GET /api/models/org/base/revision/main") == 1
    new = site.add("org/base", world / "hf")
    done = run("trainer.max_steps=2")
    assert done.returncode == 0, done.stderr
    for name in ("config.yaml", "run.json"):
        text = (world / "run" / name).read_text()
        assert f"org/base@{old}" in text and str(tmp_path) not in text
    done = run("trainer.max_steps=3", "model.init=org/base@main")
    assert done.returncode == 2
    assert f"model.init=org/base@{old}, now org/base@{new}" in done.stderr
