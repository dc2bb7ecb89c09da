"""A SLURM on one machine: a controller, and daemons that stand for nodes, from Debian's packages.

    apt-get install --no-install-recommends slurm-wlm slurmctld slurmd slurm-client munge

The nodes have no addresses of their own: jobs set MASTER_ADDR=127.0.0.1. Their GPUs are plain files, which SLURM
counts and no program can use. Partition `low` is preempted by `high`, after 30 seconds of grace.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

NODES, GPUS, CORES = 2, 8, 8
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
_CONF = """ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,requeue_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=3600
KillWait=5
AccountingStorageType=accounting_storage/none
PlugStackConfig={folder}/plugstack.conf
{nodes}
PartitionName=low  Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1  PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL Default=NO  MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can run here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "the daemons of SLURM need root"


class Cluster:
    """The daemons, from `start` to `stop`.

    Args:
        folder: for configuration, state and logs; short, because a socket's name is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._daemons = folder, list[subprocess.Popen]()
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}

    def start(self) -> None:
        """Start the daemons and wait until the nodes are idle."""
        for name in ("munge", "state", *(f"spool-node{i}" for i in range(NODES))):
            (self.folder / name).mkdir(mode=0o755)
        for gpu in range(GPUS):
            (self.folder / f"gpu{gpu}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")
        (self.folder / "plugstack.conf").touch()
        (self.folder / "slurm.conf").write_text(self._configuration())
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.folder.chmod(0o755)
        munge = {
            name: self.folder / "munge" / name for name in ("key-file", "socket", "log-file", "seed-file", "pid-file")
        }
        munge["key-file"] = key
        self._daemon("munged", "--foreground", *(f"--{name}={path}" for name, path in munge.items()))
        wait_for(munge["socket"].exists, "munged")
        self._daemon("slurmctld", "-D")
        for node in range(NODES):
            self._daemon("slurmd", "-D", "-N", f"node{node}")
        wait_for(lambda: self._states() == ["idle"] * NODES, "the nodes")

    def stop(self) -> None:
        """Cancel the jobs and end the daemons."""
        self.run("scancel", "--user=root")
        time.sleep(1)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Let the commands of SLURM that this process starts speak to the cluster."""
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def run(self, *words: str) -> str:
        """What a command of SLURM prints."""
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False).stdout.strip()

    def state(self, job: int) -> str:
        """A job's state: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ..."""
        return self.field(job, "JobState")

    def field(self, job: int, name: str) -> str:
        """A field of a job as `scontrol show job` names it."""
        words = self.run("scontrol", "--oneliner", "show", "job", str(job)).split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")

    def wait(self, job: int, *states: str, seconds: float = 300.0) -> str:
        """Wait until a job is in one of `states`; returns it."""
        wait_for(lambda: self.state(job) in states, f"job {job} to be {' or '.join(states)}", seconds)
        return self.state(job)

    def _states(self) -> list[str]:
        return self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T").split()

    def _daemon(self, *words: str) -> None:
        with open(self.folder / f"{words[0]}-{len(self._daemons)}.out", "w") as log:
            self._daemons.append(subprocess.Popen(words, env=self.environment, stdout=log, stderr=log))

    def _configuration(self) -> str:
        host = socket.gethostname().partition(".")[0]
        controller, *ports = _free_ports(NODES + 1)
        nodes = [
            f"NodeName=node{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CORES} Boards=1 "
            f"SocketsPerBoard=1 CoresPerSocket={CORES} ThreadsPerCore=1 RealMemory=16000 Gres=gpu:{GPUS} State=UNKNOWN"
            for i, port in enumerate(ports)
        ]
        return _CONF.format(host=host, port=controller, folder=self.folder, nodes="\n".join(nodes))


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Wait until `condition` holds; AssertionError when `seconds` are over."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.2)


def _free_ports(count: int) -> Sequence[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
