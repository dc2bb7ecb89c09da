"""Run a test function in several processes, as torchrun would start them.

    result = run_distributed(check_layouts, 4, folder=str(tmp_path))

`check_layouts` is an ordinary function of the test module: every process calls it as one rank of a job. Batch several
checks in one function and let it return what the test asserts on: starting the processes costs seconds.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fork_server import interpreter

ROOT = Path(__file__).resolve().parents[1]


def run_distributed(
    target: Callable | str,
    world_size: int,
    *,
    timeout: float = 300.0,
    env: dict[str, str] | None = None,
    **kwargs: Any,
) -> Any:
    """Call `target(**kwargs)` in `world_size` processes of one thread each, as ranks of one job.

    One process, forked where the imports are done already, forks the ranks.

    Args:
        target: a module-level function, or its name as "package.module:function" or "path/to/file.py::function".
        timeout: seconds until all processes are ended and the test fails, with every rank's stack.
        env: more environment variables for every process.
        kwargs: JSON-able arguments.

    Returns:
        What rank 0's call returned, through JSON.

    Raises:
        AssertionError: a process failed or time ran out; the message ends with that rank's stderr.
    """
    if not isinstance(target, str):
        target = function_name(target)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        job = {"target": target, "kwargs": kwargs, "folder": folder, "world_size": world_size, "timeout": timeout}
        leader = subprocess.Popen(
            [interpreter(), "-m", "tests.distributed", json.dumps(job)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _, errors = leader.communicate(timeout=timeout + 300)  # it keeps the time itself, once it has imported
            assert leader.returncode == 0, errors[-12000:]
        finally:
            try:
                os.killpg(leader.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            leader.wait()
        return json.loads((Path(folder) / "result.json").read_text())


def _lead(job: dict[str, Any]) -> str | None:
    """Start the ranks and wait for them; returns what went wrong."""
    import torch

    import nemo_steerlm.megatron.parallel  # noqa: F401  (imported before the ranks are forked)

    torch.set_num_threads(1)
    resolve(job["target"])
    # CUDA does not survive a fork.
    context: Any = multiprocessing.get_context("spawn" if os.environ.get("STEERLM_TEST_GPU") == "1" else "fork")
    with socket.socket() as probe:  # a port that is free now; rank 0 binds it next
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(job, rank, port)) for rank in range(job["world_size"])]
    for process in ranks:
        process.start()
    return _wait(ranks, Path(job["folder"]), job["timeout"])


def _rank(job: dict[str, Any], rank: int, port: int) -> None:
    """One rank: its output goes to a file, its stack too when time is nearly up."""
    with open(Path(job["folder"]) / f"{rank}.stderr", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    size = job["world_size"]
    own = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR="127.0.0.1")
    faulthandler.dump_traceback_later(max(1.0, job["timeout"] - 5), file=2)
    try:
        import torch

        torch.set_num_threads(1)
        result = resolve(job["target"])(**job["kwargs"])
        if rank == 0:
            (Path(job["folder"]) / "result.json").write_text(json.dumps(result))
        sys.modules["nemo_steerlm.megatron.parallel"].shutdown()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an orderly end may wait for ranks that wait for this one
    os._exit(0)


def _wait(ranks: list[Any], folder: Path, timeout: float) -> str | None:
    """Wait until all ended well, one did not, or time is up."""
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.exitcode for process in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            # The first to fail takes the others down with lost connections: its own traceback is the one to show.
            rank = min(failed, key=lambda r: (folder / f"{r}.stderr").stat().st_mtime)
            return f"rank {rank} exited with {codes[rank]}:\n{_tail(folder, rank)}"
        if None not in codes:
            return None
        if time.monotonic() > deadline:
            waiting = [rank for rank, code in enumerate(codes) if code is None]
            tails = "\n".join(f"--- rank {rank}\n{_tail(folder, rank, 2500)}" for rank in waiting)
            return f"ranks {waiting} still ran after {timeout:.0f} s:\n{tails}"
        time.sleep(0.02)


def _tail(folder: Path, rank: int, characters: int = 6000) -> str:
    return (folder / f"{rank}.stderr").read_text(errors="replace")[-characters:]


def function_name(target: Callable) -> str:
    """The name under which another process finds a module-level function."""
    return f"{inspect.getfile(target)}::{target.__qualname__}"


def resolve(target: str) -> Callable:
    """The function a target names; a file inside the repository is imported under its dotted name."""
    if "::" in target:
        file, name = target.split("::")
        path = Path(file).resolve()
        if path.is_relative_to(ROOT):
            module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        else:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None and spec.loader is not None, f"cannot import {path}"
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    else:
        package, name = target.split(":")
        module = importlib.import_module(package)
    return getattr(module, name)


if __name__ == "__main__":
    problem = _lead(json.loads(sys.argv[1]))
    if problem is not None:
        sys.stderr.write(problem)
        sys.stderr.flush()
        os._exit(1)  # the ranks that still run are ended with this process's group
