"""The batch scripts of `submit`: those of the big runs as files, whatever the values hold."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from nemo_steerlm import cli
from nemo_steerlm.config.cluster import ClusterConfig, ContainerConfig, SubmitConfig
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.launch import slurm

HERE = Path(__file__).parent / "sbatch"
EXPERIMENTS = {"13b": "llama2_13b-sft-oasst-16x8xa100_80g", "43b": "nemotron_43b-sft-oasst-16x8xa100_80g"}
IMAGES = {"slurm": "", "slurm_pyxis": "nemo_steerlm.sqsh", "slurm_apptainer": "nemo_steerlm.sif"}
NASTY = "a b\"c$(touch hacked)`touch hacked`'d\\;touch hacked"


@pytest.fixture(autouse=True)
def _in_the_root_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")


def rendered(capsys: pytest.CaptureFixture[str], size: str, group: str) -> str:
    """What a user sees of the run on 16 nodes."""
    image = [f"cluster.container.image={IMAGES[group]}", "cluster.container.mounts=[/lustre:/lustre]"]
    words = [
        *(image if IMAGES[group] else ["cluster.program=steerlm"]), "cluster.account=mine", "cluster.partition=batch",
        "cluster.environment={NCCL_IB_HCA: mlx5}", "dry_run=true", "train-sft", f"experiment={EXPERIMENTS[size]}",
        "model.init=/lustre/base", "data.train=/lustre/labelled.jsonl", f"output=/lustre/policy-{size}",
    ]  # fmt: skip
    assert cli.main(["submit", f"cluster={group}", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("group", IMAGES)
@pytest.mark.parametrize("size", EXPERIMENTS)
def test_the_scripts_of_the_big_runs(capsys: pytest.CaptureFixture[str], size: str, group: str) -> None:
    """Golden files; STEERLM_WRITE_GOLDEN=1 writes them."""
    file = HERE / f"{size}-{group}.sbatch"
    text = rendered(capsys, size, group)
    if os.environ.get("STEERLM_WRITE_GOLDEN") == "1":
        file.write_text(text)
    assert text == file.read_text()
    subprocess.run(["bash", "-n", str(file)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
@pytest.mark.parametrize("file", sorted(HERE.glob("*.sbatch")), ids=lambda file: file.name)
def test_shellcheck_has_nothing_to_say(file: Path) -> None:
    # SC2317: the functions are called by traps
    done = subprocess.run(["shellcheck", "--exclude=SC2317", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def job_in(folder: Path, words: Sequence[str] = ()) -> slurm.Job:
    return slurm.Job(
        verb="train-sft", words=words, folder=folder, directory=folder.parent, nodes=2, processes=8, gpus=8, name="j"
    )


def script_that_runs_here(tmp_path: Path, cluster: ClusterConfig, words: list[str]) -> str:
    """A script in which srun prints its words, run by bash; what it printed."""
    tools = {"srun": 'printf "%s\\0" "$@"', "scontrol": "echo node1", "scancel": "true"}
    for name, line in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    file = tmp_path / "job.sh"
    file.write_text(slurm.render(job_in(tmp_path / "o ut", words), cluster))
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = subprocess.run(
        ["bash", str(file)], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("start", ["srun", "torchrun"])
@pytest.mark.parametrize("kind", ["none", "pyxis", "apptainer"])
def test_hostile_values_stay_values(tmp_path: Path, start: str, kind: str) -> None:
    container = ContainerConfig(kind=kind, image=NASTY) if kind != "none" else ContainerConfig()
    cluster = ClusterConfig(
        account=NASTY, comment=NASTY, environment={"OWN": NASTY + "\n"}, start=start, container=container
    )
    cluster.validate("cluster.")
    words = [f"model.init={NASTY}", "template.end_of_turn='\n'"]
    printed = script_that_runs_here(tmp_path, cluster, words).split("\0")
    assert printed[-3:-1] == words and not (tmp_path / "hacked").exists()
    if kind == "pyxis":
        assert f"--container-image={NASTY}" in printed
    lines = slurm.render(job_in(tmp_path), cluster).splitlines()
    [account] = [line for line in lines if line.startswith("#SBATCH --account=")]
    assert shlex.split(account.removeprefix("#SBATCH --account=")) == [NASTY]


def test_an_array_gives_each_task_its_shard(capsys: pytest.CaptureFixture[str]) -> None:
    words = "dry_run=true array=4 annotate hardware=8xh100_80g checkpoint=m input=i.jsonl output=/out/labelled.jsonl"
    assert cli.main(["submit", *words.split()]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --array=0-3\n" in text and '"shards=$SLURM_ARRAY_TASK_ID/4"' in text
    assert "/out/labelled.jsonl.jobs/%x-%A_%a.log" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "verb is missing"),
        ("trainsft", "'trainsft' cannot be submitted; did you mean 'train-sft'"),
        ("generate checkpoint=m", "'generate' cannot be submitted"),
        ("train-sft learning_rate=3", "unknown key 'learning_rate'; did you mean 'optimizer.lr'"),
        ("array=3 train-sft", "array=3: train-sft has no shards"),
        ("array=3 annotate checkpoint=m input=i output=o shards=0/2", "leave out shards=0/2"),
        ("cluster.nodes=2 prepare source=synthetic output=o", "cluster.nodes=2: prepare works in one process"),
        ("cluster.name=a/b train-sft", "cluster.name=a/b: expected the name of a file"),
        ("train-sft --cfg job", "--cfg, --info and --multirun belong to `steerlm train-sft` itself"),
        ("cluster.time=soon train-sft", "cluster.time=soon: expected MINUTES"),
        ("cluster.container.kind=pyxis train-sft", "cluster.container.image is missing"),
        ("cluster.container.image=x.sif train-sft", "need cluster.container.kind=pyxis or apptainer"),
        ("cluster.extra=[gres] train-sft", "cluster.extra: 'gres' is no option of sbatch"),
    ],
)
def test_mistakes_are_told_before_anything_is_queued(
    capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    assert cli.main(["submit", *words.split()]) == 2
    assert said in capsys.readouterr().err


def test_values_of_options_are_no_verbs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    verb = ["train-sft", "model.init=m", "data.train=t", "output=o", "attributes=synthetic", "trainer.max_steps=2"]
    assert cli.main(["submit", "--config-dir", str(tmp_path), "dry_run=true", *verb]) == 0
    assert "train-sft model.init=m" in capsys.readouterr().out
    assert cli.main(["submit", "--cfg", "job", *verb]) == 0
    assert "verb: train-sft" in capsys.readouterr().out


def test_more_than_one_line_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cluster.comment='a\\n#SBATCH --uid=0': expected one line"):
        SubmitConfig(verb="train-sft", cluster=ClusterConfig(comment="a\n#SBATCH --uid=0")).validate()


def test_a_machine_without_slurm_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    job = job_in(tmp_path)
    with pytest.raises(ConfigError, match="sbatch: no such program; .*dry_run=true prints the script"):
        slurm.submit(job, ClusterConfig())
