"""Runs functions of test modules on the fake GPU: one process imports everything and forks a process for each call."""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.distributed import ROOT, function_name, resolve


class JobFailed(AssertionError):
    """A job raised, or its time ran out; the message ends with its stderr."""


class Room:
    """A process in which torch believes in a GPU, and its children.

    torch is patched in that process, never in the caller's.
    """

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(
        self,
        target: Callable[..., Any],
        *,
        rank: int = 0,
        world: int = 1,
        timeout: float = 300.0,
        env: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call `target(gpu, **kwargs)` as one rank of a job, `gpu` being the `FakeGpu`.

        Args:
            target: a module-level function of a test module.
            rank, world: which process of how many; every process is the only one on its node.
            timeout: seconds until the job is ended.
            env: more environment variables of the job.
            kwargs: JSON-able arguments.

        Returns:
            What the call returned, through JSON.

        Raises:
            JobFailed: it raised, or time ran out.
        """
        server = self._started()
        assert server.stdin is not None and server.stdout is not None
        own = dict(RANK=rank, WORLD_SIZE=world, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, MASTER_ADDR="absent", MASTER_PORT=1)
        with tempfile.TemporaryDirectory(prefix="fake-gpu-") as folder:
            job = dict(target=function_name(target), kwargs=kwargs, folder=folder, timeout=timeout)
            job["env"] = {**{name: str(value) for name, value in own.items()}, **(env or {})}
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            ended = server.stdout.readline()
            assert ended, "the server of tests/fake_gpu ended; its stderr is above"
            if int(ended):
                raise JobFailed((Path(folder) / "stderr").read_text(errors="replace")[-8000:])
            return json.loads((Path(folder) / "result.json").read_text())

    def close(self) -> None:
        """End the process."""
        if self._server is not None:
            self._server.communicate()  # closes its stdin
            self._server = None

    def _started(self) -> subprocess.Popen[str]:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "tests.fake_gpu.room"],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._server


def _serve() -> None:
    """Fork a process for each line of stdin, and say on stdout how it ended."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    from tests.fake_gpu import cuda, groups, guard

    guard.load()
    cuda.install()
    groups.install()
    import nemo_steerlm.train.fit  # noqa: F401  (imported once, for all)
    from tests.fake_gpu import parts

    groups.write_alone()
    parts.install()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(_run(json.loads(line)))
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        answers.flush()
    os._exit(0)  # nothing to clean up


def _run(job: dict[str, Any]) -> int:
    """The call itself; its output goes to a file, its stack too when time is up."""
    folder = Path(job["folder"])
    with open(folder / "stderr", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.dump_traceback_later(job["timeout"], exit=True, file=2)  # type: ignore[arg-type]
    os.environ.update(job["env"])
    from tests.fake_gpu.mode import FakeGpu

    try:
        with FakeGpu() as gpu:
            result = resolve(job["target"])(gpu, **job["kwargs"])
        (folder / "result.json").write_text(json.dumps(result))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


if __name__ == "__main__":
    _serve()
