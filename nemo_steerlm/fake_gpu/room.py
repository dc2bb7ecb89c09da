"""Runs functions on the fake GPU: one process imports everything and forks a process for each call.

Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_steerlm.errors import ConfigError
from nemo_steerlm.fake_gpu import guard


class JobFailed(RuntimeError):
    """A job raised, or its time ran out; the message ends with its stderr."""


class Room:
    """A process in which torch believes in a GPU, and its children; a context manager, which ends it.

    torch is patched in that process, never in the caller's. It finds the modules that the caller finds.

    Raises:
        ConfigError: at the first `run`, where `guard.missing` says why there can be none.
    """

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def run(
        self,
        target: Callable[..., Any] | str,
        *,
        rank: int = 0,
        world: int = 1,
        timeout: float = 300.0,
        env: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call `target(gpu, **kwargs)` as one rank of a job, `gpu` being the `FakeGpu`.

        Args:
            target: a module-level function, or its name as "module:function".
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
        own = dict(
            RANK=rank, WORLD_SIZE=world, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, MASTER_ADDR="localhost", MASTER_PORT=1
        )
        name = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
        with tempfile.TemporaryDirectory(prefix="fake-gpu-") as folder:
            job = dict(target=name, kwargs=kwargs, folder=folder, timeout=timeout)
            job["env"] = {**{name: str(value) for name, value in own.items()}, **(env or {})}
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            ended = server.stdout.readline()
            assert ended, "the process of nemo_steerlm.fake_gpu ended; its stderr is above"
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
            if (reason := guard.missing()) is not None:
                raise ConfigError(reason)
            own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            self._server = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "nemo_steerlm.fake_gpu.server"],
                env={**os.environ, **own, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._server
