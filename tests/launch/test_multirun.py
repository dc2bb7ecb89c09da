"""A sweep is a job for each combination of values, in a numbered folder; all are checked before the first starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_steerlm import cli
from nemo_steerlm.launch import multirun
from tests.verbs.helpers import make_world

TRAIN = (
    "train-sft attributes=synthetic model=llama_tiny model.tokenizer=tokenizer data.train=data/train.jsonl "
    "data.val=data/val.jsonl data.max_length=256 trainer.global_batch_size=4 trainer.micro_batch_size=4 "
    "trainer.accelerator=cpu steering.check=false logging.tensorboard=false"
).split()  # fmt: skip
PREPARE = ["prepare", "--multirun", "source=synthetic"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The words of the jobs that would have been started."""
    monkeypatch.chdir(tmp_path)
    found: list[list[str]] = []

    def run(words: list[str]) -> int:
        found.append(words)
        return 0

    monkeypatch.setattr(multirun, "_run", run)
    return found


def test_two_trainings_in_numbered_folders(world: Path) -> None:
    words = [*TRAIN, "-m", "optimizer.lr=1e-3,1e-2", "trainer.max_steps=1", "output=sweep", "model.init=null"]
    done = subprocess.run([sys.executable, "-m", "nemo_steerlm", *words], cwd=world, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (world / "sweep" / "jobs.jsonl").read_text().splitlines()]
    for number, rate in enumerate((1e-3, 1e-2)):
        run = world / "sweep" / str(number)
        assert OmegaConf.load(run / "config.yaml").optimizer.lr == rate and (run / "model").is_dir()
        typed = yaml.safe_load((run / "overrides.yaml").read_text())
        assert typed[-2:] == [f"optimizer.lr={('1e-3', '1e-2')[number]}", f"output=sweep/{number}"]
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert rows[number]["figure"] == "val/loss" and rows[number]["value"] == last["val/loss"]
    assert yaml.safe_load((world / "sweep" / "overrides.yaml").read_text()) == [
        word for word in words[1:] if word != "-m"
    ]
    assert OmegaConf.load(world / "sweep" / "multirun.yaml").hydra.overrides.task == ["++optimizer.lr='1e-3','1e-2'"]
    table = done.stdout.splitlines()[-5:]
    assert table[0].split() == ["job", "code", "figure", "words"] and table[4] == "sweep: 2 jobs"
    assert table[2].split() == ["0", "0", "val/loss", f"{rows[0]['value']:.6g}", "optimizer.lr=1e-3"]


def test_a_job_that_fails_is_told_and_the_others_run(tmp_path: Path) -> None:
    (tmp_path / "good.csv").write_text("ask,say\nHi,Hello\n")
    words = "prepare -m source=table columns={prompt:ask,response:say} input=none.csv,good.csv check=true output=o"
    done = subprocess.run(
        [sys.executable, "-m", "nemo_steerlm", *words.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and "none.csv" in done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()[-3:-1]] == [["0", "2"], ["1", "0"]]
    assert done.stdout.splitlines()[-1] == "o: 2 jobs, 1 failed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_job_and_the_sweep(world: Path, number: signal.Signals) -> None:
    output = f"stopped-{number.name}"
    words = [*TRAIN, "-m", "optimizer.lr=1e-3,1e-2", "trainer.max_steps=5000", f"output={output}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nemo_steerlm", *words], cwd=world, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background
    )  # fmt: skip
    metrics = world / output / "0" / "metrics.jsonl"
    while not metrics.exists() and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(number)
    assert process.wait() == 128 + number
    assert list((world / output / "0" / "checkpoints").glob("step-*")) and not (world / output / "1").exists()


SWEEPS: dict[str, tuple[list[str], list[list[str]]]] = {
    "range": (["seed=range(1,4)"], [["seed=1"], ["seed=2"], ["seed=3"]]),
    "choice": (["seed=choice(4,7)"], [["seed=4"], ["seed=7"]]),
    "product": (["seed=1,2", "dedupe=true,false"], [["seed=1", "dedupe=true"], ["seed=1", "dedupe=false"],
                                                   ["seed=2", "dedupe=true"], ["seed=2", "dedupe=false"]]),
    "group": (["attributes=synthetic,helpsteer"], [["attributes=synthetic"], ["attributes=helpsteer"]]),
    "glob": (["attributes=glob(helpsteer*)"], [["attributes=helpsteer"], ["attributes=helpsteer2"]]),
    "lists": (["languages=[en,de],[fr]", "+seed=3"], [["languages=[en,de]"], ["languages=[fr]"]]),
    "text": (["dataset=1.50,it's,${x},'a, b'"],
             [["dataset=1.50"], ["dataset=it's"], ["dataset=${x}"], ["dataset=a, b"]]),
    "no sweep": (["dataset='a, b'", "seed=3", "~languages"], [[]]),
}  # fmt: skip


@pytest.mark.parametrize("name", SWEEPS)
def test_values_become_jobs(name: str, started: list[list[str]], capsys: pytest.CaptureFixture) -> None:
    given, jobs = SWEEPS[name]
    assert cli.main([*PREPARE, *given, "output=o"]) == 0
    shared = {"no sweep": ["dataset=a, b", "seed=3", "~languages"], "lists": ["+seed=3"]}.get(name, [])
    assert started == [
        ["prepare", "source=synthetic", *shared, *job, f"output=o/{number}"] for number, job in enumerate(jobs)
    ]
    assert f"o: {len(jobs)} jobs" in capsys.readouterr().out


def test_an_output_that_is_a_file_stays_one_and_a_verb_without_has_a_dated_folder(started: list[list[str]]) -> None:
    words = ["annotate", "-m", "checkpoint=m", "input=i", "output=out/labelled.jsonl.gz", "turns=all,missing"]
    assert cli.main(words) == 0
    assert [words[-1] for words in started] == [f"output=out/labelled/{number}/labelled.jsonl.gz" for number in (0, 1)]
    started.clear()
    assert cli.main(["generate", "-m", "checkpoint=m", "prompt=Hi", "attributes.humor=1,4"]) == 0
    assert [words[1:] for words in started] == [["checkpoint=m", "prompt=Hi", f"attributes.humor={n}"] for n in (1, 4)]
    assert len(list(Path("multirun").glob("????-??-??/??-??-??/multirun.yaml"))) == 1


def test_the_users_own_configuration_may_hold_the_sweep(started: list[list[str]], tmp_path: Path) -> None:
    Path("mine.yaml").write_text("seed: 4\nhydra: {sweeper: {params: {val_fraction: '0.1,0.2', source: synthetic}}}\n")
    assert cli.main(["prepare", "-m", "--config", "mine.yaml", "output=o", "source=synthetic"]) == 0
    assert [words[-2] for words in started] == ["val_fraction=0.1", "val_fraction=0.2"]
    assert {words[1] for words in started} == {f"--config={tmp_path}/mine.yaml"}


REFUSED = {
    "of one job": (["seed=1,x", "output=o"], "seed: Value 'x'"),
    "of a group": (["attributes=synthetic,helpster", "output=o"], "attributes=helpster: no such choice"),
    "no output": (["seed=1,2"], "output is missing: --multirun puts job 0 into output/0"),
    "two outputs": (["seed=1", "output=a,b"], "output is swept, but --multirun numbers"),
    "interval": (["val_fraction=interval(0.1,0.2)", "output=o"], "BasicSweeper does not support sweep type"),
    "function": (["seed=range(1,x)", "output=o"], "evaluating 'range(1,x)'"),
    "unknown": (["sed=1,2", "output=o"], "unknown key 'sed'; did you mean 'seed'"),
    "launcher": (["seed=1,2", "output=o", "hydra/launcher=submitit_local"], "pip install hydra-submitit-launcher"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_told_before_a_job_starts(name: str, started: list, capsys: pytest.CaptureFixture) -> None:
    words, message = REFUSED[name]
    assert cli.main([*PREPARE, *words]) == 2 and started == []
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert message in line and line.startswith("steerlm: error: ")


def test_one_process_sweeps(started: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("RANK", "0")
    assert cli.main([*PREPARE, "seed=1,2", "output=o"]) == 2 and started == []
    assert "call it once, without srun or torchrun" in capsys.readouterr().err


def test_a_launcher_that_is_installed_starts_the_jobs(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="hydra-joblib-launcher is not installed")
    (tmp_path / "good.csv").write_text("ask,say\nHi,Hello\n")
    words = "prepare -m source=table columns={prompt:ask,response:say} input=good.csv check=true seed=1,2 output=o"
    command = [sys.executable, "-m", "nemo_steerlm", *words.split(), "hydra/launcher=joblib"]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "o: 2 jobs"), done.stderr
