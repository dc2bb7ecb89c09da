"""Processes of a run, started for real; the copies are small programs without torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from nemo_steerlm.errors import ConfigError
from nemo_steerlm.launch import local

COPY = """
import json, os, signal, sys, time
from pathlib import Path
from nemo_steerlm.launch import local

folder, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
rank = os.environ["RANK"]
received = []
signal.signal(signal.SIGUSR1, lambda number, _: received.append("USR1"))
assert local.join(int(os.environ["WORLD_SIZE"]), 1)
(folder / f"{rank}.pid").write_text(str(os.getpid()))
(folder / f"{rank}.json").write_text(json.dumps(dict(os.environ)))
step = plan.get(rank, plan.get("all", {}))
deadline = time.time() + step.get("seconds", 0)
while time.time() < deadline and not received:
    time.sleep(0.02)
time.sleep(step.get("linger", 0))
(folder / f"{rank}.received").write_text(",".join(received))
if "message" in step:
    local.report(step["message"])
sys.exit(step.get("code", 0))
"""
LAUNCHER = "import sys; from nemo_steerlm.launch import local; sys.exit(local.run(sys.argv[2:], int(sys.argv[1])))"


@pytest.fixture
def start(tmp_path):
    """Start a launcher of n copies with a plan {rank: {seconds, linger, message, code}}."""
    (tmp_path / "copy.py").write_text(COPY)
    started = []

    def go(devices, plan, **env):
        command = [sys.executable, "-c", LAUNCHER, str(devices), sys.executable, str(tmp_path / "copy.py")]
        started.append(
            subprocess.Popen(
                [*command, str(tmp_path), json.dumps(plan)],
                env={**{k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}, **env},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield go
    for process in started:
        process.kill()
        process.wait()


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def test_copies_see_the_variables_torchrun_would_set(start, tmp_path):
    process = start(3, {})
    assert process.wait(20) == 0
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [one["RANK"] for one in seen] == [one["LOCAL_RANK"] for one in seen] == ["0", "1", "2"]
    for one in seen:
        assert (one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"], one["GROUP_RANK"]) == ("3", "3", "0")
        assert one["MASTER_ADDR"] == "127.0.0.1" and one["MASTER_PORT"] == seen[0]["MASTER_PORT"]
        assert one["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 3))
    process = start(1, {}, OMP_NUM_THREADS="7")
    assert process.wait(20) == 0
    assert json.loads((tmp_path / "0.json").read_text())["OMP_NUM_THREADS"] == "7"


def test_the_first_failure_ends_the_others_and_is_told_once(start, tmp_path):
    began = time.monotonic()
    process = start(3, {"1": {"code": 2, "message": "steerlm: error: no such file"}, "all": {"seconds": 60}})
    _, error = process.communicate(timeout=30)
    assert process.returncode == 2
    assert error == "steerlm: error: no such file\n"
    assert time.monotonic() - began < 15
    assert not any(alive(int(file.read_text())) for file in tmp_path.glob("*.pid"))


def test_a_users_error_of_all_ranks_is_told_once_and_its_code_goes_before_others(start):
    process = start(3, {"0": {"code": 1, "seconds": 0}, "all": {"code": 2, "message": "steerlm: error: bad"}})
    _, error = process.communicate(timeout=30)
    assert process.returncode in (1, 2)  # 1 only where the others had not ended yet
    assert error in (
        "steerlm: error: bad\n",
        "steerlm: error: process 0 of 3 ended with code 1 and has ended the run\n",
    )
    process = start(3, {"all": {"code": 2, "message": "steerlm: error: bad"}})
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (2, "steerlm: error: bad\n")


def test_signals_reach_every_copy(start, tmp_path):
    process = start(2, {"all": {"seconds": 60}})
    wait_for(lambda: len(list(tmp_path.glob("*.json"))) == 2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 0
    assert [(tmp_path / f"{rank}.received").read_text() for rank in range(2)] == ["USR1", "USR1"]


def test_a_copy_ended_by_a_signal_gives_the_shells_code(start, tmp_path):
    process = start(2, {"all": {"seconds": 60}})
    wait_for(lambda: len(list(tmp_path.glob("*.json"))) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM


def test_after_a_signal_each_copy_ends_in_its_own_time(start, tmp_path):
    last = {"seconds": 60, "linger": 1.0, "message": "steerlm: stopped at step 3", "code": 138}
    process = start(2, {"0": last, "1": {"seconds": 60, "code": 138}})
    wait_for(lambda: len(list(tmp_path.glob("*.json"))) == 2)
    process.send_signal(signal.SIGUSR1)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (138, "steerlm: stopped at step 3\n")


@pytest.mark.parametrize(
    ("plan", "killed", "code", "line"),
    [
        ({"all": {"seconds": 60}}, 1, 137, "process 1 of 2 was killed by SIGKILL and has ended the run"),
        ({"0": {"seconds": 60}, "1": {"code": 1}}, None, 1, "process 1 of 2 ended with code 1 and has ended the run"),
    ],
)
def test_a_copy_that_dies_without_a_word_is_named(start, tmp_path, plan, killed, code, line):
    process = start(2, plan)
    if killed is not None:
        wait_for(lambda: len(list(tmp_path.glob("*.json"))) == 2)
        os.kill(int((tmp_path / f"{killed}.pid").read_text()), signal.SIGKILL)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (code, f"steerlm: error: {line}\n")


def test_a_kill_is_the_cause_and_not_what_others_die_of():
    assert local._cause([1, -9, None]) == (1, -9)
    assert local._cause([1, -9, 2]) == (2, 2)
    assert local._cause([0, 1, 1]) == (1, 1)
    assert local._cause([0, 0]) == (0, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux ends the copies of a killed launcher")
def test_no_copy_outlives_a_killed_launcher(start, tmp_path):
    process = start(2, {"all": {"seconds": 60}})
    wait_for(lambda: len(list(tmp_path.glob("*.json"))) == 2)
    pids = [int(file.read_text()) for file in tmp_path.glob("*.pid")]
    process.kill()
    wait_for(lambda: not any(alive(pid) for pid in pids))


def test_one_process_needs_no_launcher_and_several_do():
    assert local.join(1, 1, {}) is True
    assert local.join(4, 1, {}) is False
    with pytest.raises(ConfigError, match="trainer.num_nodes=2: start the processes with srun or torchrun"):
        local.join(4, 2, {})


def test_under_torchrun_the_number_of_processes_must_match():
    assert local.join(2, 2, {"RANK": "3", "WORLD_SIZE": "4"}) is True
    with pytest.raises(ConfigError, match="4 processes were started but .*trainer.devices=1 = 1"):
        local.join(1, 1, {"RANK": "3", "WORLD_SIZE": "4"})


SLURM = {
    "SLURM_JOB_ID": "123456", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[3-4]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}  # fmt: skip


def test_under_srun_its_variables_become_torchruns(monkeypatch):
    monkeypatch.setattr(local, "_cores", lambda: 48)
    environment = dict(SLURM)
    assert local.join(8, 2, environment) is True
    added = {key: value for key, value in environment.items() if key not in SLURM}
    assert added == {
        "RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "1",
        "MASTER_ADDR": "gpu3", "MASTER_PORT": "23456", "OMP_NUM_THREADS": "6",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("seen", "told", "threads"),
    [
        (64, {}, 8),  # all tasks of a node see all its cores
        (64, {"SLURM_CPUS_ON_NODE": "32"}, 4),
        (4, {"SLURM_CPUS_ON_NODE": "32"}, 4),  # bound: each sees its own
        (64, {"SLURM_CPUS_ON_NODE": "64", "SLURM_CPUS_PER_TASK": "6"}, 6),
        (1, {"SLURM_CPUS_PER_TASK": "6"}, 1),  # sbatch's word, which srun did not take over
        (4, {"SLURM_CPUS_ON_NODE": "4"}, 1),
        (64, {"OMP_NUM_THREADS": "3"}, 3),
    ],
)
def test_a_task_of_srun_computes_on_its_share_of_the_cores(monkeypatch, seen, told, threads):
    monkeypatch.setattr(local, "_cores", lambda: seen)
    environment = {**SLURM, **told}
    local.join(8, 2, environment)
    assert environment["OMP_NUM_THREADS"] == str(threads)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu5", "gpu5"),
        ("gpu5,gpu7", "gpu5"),
        ("gpu[3-4]", "gpu3"),
        ("node[001-003,7],gpu5", "node001"),
        ("node[7,001-003]", "node7"),
        ("gpu5,node[001-003]", "gpu5"),
        ("dgx-a[08-11]-ib", "dgx-a08-ib"),
        ("rack[1-2]node[03,05]", "rack1node03"),
        ("a.b-c_d", "a.b-c_d"),
        ("", ""),
        ("node[001-003", ""),
        ("node[]", ""),
    ],
)
def test_the_first_host_of_a_slurm_list(hosts, first):
    assert local.first_host(hosts) == first


def test_without_a_list_of_hosts_the_launching_node_is_taken():
    environment = {**SLURM, "SLURM_STEP_NODELIST": ""}
    local.join(8, 2, environment)
    assert environment["MASTER_ADDR"] == "10.0.0.7"
    del (alone := {**SLURM, "SLURM_STEP_NODELIST": "gpu[3"})["SLURM_LAUNCH_NODE_IPADDR"]
    with pytest.raises(ConfigError, match=r"first host of gpu\[3: set MASTER_ADDR"):
        local.join(8, 2, alone)


def test_a_shell_inside_a_slurm_job_starts_its_own_copies():
    shell = {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0"}
    assert local.join(4, 1, shell) is False and "RANK" not in shell
