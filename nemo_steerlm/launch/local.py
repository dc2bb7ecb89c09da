"""The processes of a run: started here on one machine, or by torchrun or srun, with the same environment variables.

`RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, GROUP_RANK, MASTER_ADDR, MASTER_PORT` are as torchrun sets them.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from nemo_steerlm.errors import ConfigError

_ERRORS, _PARENT = "STEERLM_ERRORS", "STEERLM_PARENT"
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
#: Signals that a starter passes on to what it started.
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_GRACE = 10.0  # seconds between asking the other processes to end and killing them


def join(devices: int, num_nodes: int, environment: MutableMapping[str, str] = os.environ) -> bool:
    """Take this process's place in a run that torchrun, srun or `run` started.

    Args:
        devices: processes a node, as configured.
        num_nodes: nodes, as configured.
        environment: changed in place under srun: torchrun's variables are added.

    Returns:
        True when this process is one of the run; False when the processes are not started yet.

    Raises:
        ConfigError: the number of processes differs from the configured one.
    """
    if "RANK" not in environment and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        environment.update(_from_srun(environment))
    world = devices * num_nodes
    if "RANK" in environment:
        started = int(environment.get("WORLD_SIZE", 1))
        if started != world:
            raise ConfigError(
                f"{started} processes were started but trainer.num_nodes={num_nodes} x trainer.devices={devices}"
                f" = {world}; give trainer.devices the number of processes on each node"
            )
        _die_with_parent(environment)
        return True
    if num_nodes > 1:
        raise ConfigError(f"trainer.num_nodes={num_nodes}: start the processes with srun or torchrun on every node")
    return world == 1


def alone(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether this process does the work of a verb that runs in one process.

    If torchrun or srun started several, as in a script that puts `srun` before every line, the first works alone and
    the others have nothing to do.
    """
    by_srun = int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    rank = environment.get("RANK") or (environment["SLURM_PROCID"] if by_srun else "0")
    for name in _TORCHRUN:
        environment.pop(name, None)
    return int(rank) == 0


def _from_srun(slurm: MutableMapping[str, str]) -> dict[str, str]:
    """torchrun's variables from those of a SLURM step with equally many tasks on each node."""
    world, nodes = int(slurm["SLURM_STEP_NUM_TASKS"]), int(slurm.get("SLURM_STEP_NUM_NODES", 1))
    cores = int(slurm.get("SLURM_CPUS_PER_TASK") or int(slurm.get("SLURM_CPUS_ON_NODE", _cores())) // (world // nodes))
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(world // nodes),
        "GROUP_RANK": slurm.get("SLURM_NODEID", "0"),
        "MASTER_ADDR": slurm.get("MASTER_ADDR") or _first_host(slurm, nodes),
        "MASTER_PORT": slurm.get("MASTER_PORT") or str(20000 + int(slurm["SLURM_JOB_ID"]) % 10000),
        # a task that is bound to its share of the cores sees only these
        "OMP_NUM_THREADS": slurm.get("OMP_NUM_THREADS") or str(max(1, min(_cores(), cores))),
    }


def _first_host(slurm: MutableMapping[str, str], nodes: int) -> str:
    """The host of rank 0. The launching node comes last: srun may have been called on a login node."""
    if nodes == 1:
        return "127.0.0.1"
    hosts = slurm.get("SLURM_STEP_NODELIST") or slurm.get("SLURM_JOB_NODELIST", "")
    address = first_host(hosts) or slurm.get("SLURM_LAUNCH_NODE_IPADDR")
    if not address:
        raise ConfigError(f"cannot tell the first host of {hosts or 'this job'}: set MASTER_ADDR")
    return address


def first_host(hosts: str) -> str:
    """The first host of a SLURM list ("node[001-003,7],gpu5" -> "node001"), "" where it is none.

    `scontrol show hostnames` does the same, but a container rarely has it.
    """
    first = re.match(r"(?:[^][,\s]|\[\w[^][]*\])+(?=,|$)", hosts)
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first[0]) if first else ""


def run(command: Sequence[str], devices: int) -> int:
    """Start `devices` copies of a command on this machine and wait for them.

    One that fails ends the others. Messages of `report` are printed once.

    Args:
        command: program and arguments; each copy must call `join`.
        devices: number of processes.

    Returns:
        0, or the exit code of the copy that failed; 2 takes precedence, 128 + n stands for signal n.
    """
    with tempfile.TemporaryDirectory(prefix="steerlm-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {
            "WORLD_SIZE": devices, "LOCAL_WORLD_SIZE": devices, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": probe.getsockname()[1], _ERRORS: folder, _PARENT: os.getpid(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or max(1, _cores() // devices),
        }  # fmt: skip
        probe.close()
        processes: list[subprocess.Popen] = []
        pending: list[int] = []
        before = {number: signal.signal(number, lambda received, _: pending.append(received)) for number in FORWARDED}
        try:
            for rank in range(devices):
                own = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
                # In sessions of their own, a terminal's Ctrl-C reaches the copies once: through `_wait`.
                processes.append(subprocess.Popen(command, env={**os.environ, **own}, start_new_session=True))
            codes, told = _wait(processes, pending)
        finally:
            _end(processes)
            for number, handler in before.items():
                signal.signal(number, handler)
        messages = sorted(Path(folder).iterdir(), key=lambda file: int(file.name))
        rank, code = _cause(codes)
        if messages:
            print(messages[0].read_text(encoding="utf-8"), file=sys.stderr)
        elif code and not told:
            end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            print(f"steerlm: error: process {rank} of {devices} {end} and has ended the run", file=sys.stderr)
        return code if code >= 0 else 128 - code


def _cause(codes: Sequence[int | None]) -> tuple[int, int]:
    """The rank that ended the run, and its exit code: a user's error first, then a kill, which ends the others."""
    failed = [(code != 2, code > 0, rank, code) for rank, code in enumerate(codes) if code]
    return min(failed)[2:] if failed else (0, 0)


def _wait(processes: Sequence[subprocess.Popen], pending: list[int]) -> tuple[list[int | None], bool]:
    """Exit codes, once all have succeeded or one has failed, and whether signals were passed on.

    After a signal they end by themselves at slightly different times, for which they get time.
    """
    told, deadline = False, float("inf")
    while True:
        while pending:
            told, number = True, pending.pop(0)
            for process in processes:
                process.send_signal(number)
        codes = [process.poll() for process in processes]
        if any(codes):
            deadline = min(deadline, time.monotonic() + (_GRACE if told else 0.0))
        if None not in codes or time.monotonic() >= deadline:
            return codes, told
        time.sleep(0.1)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def report(message: str) -> None:
    """Print an error once: through the launcher where there is one, else on stderr, with the rank unless it is 0."""
    rank = os.environ.get("RANK", "0")
    if folder := os.environ.get(_ERRORS):
        Path(folder, rank).write_text(message, encoding="utf-8")
    else:
        print(message if rank == "0" else f"{message} [rank {rank}]", file=sys.stderr)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _die_with_parent(environment: MutableMapping[str, str]) -> None:
    """Ask Linux to kill this process when the launcher dies, so that no orphan goes on writing to the run folder."""
    parent = environment.get(_PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)
