"""Run a test function in several processes, as torchrun would start them.

    result = run_distributed(check_layouts, 4, folder=str(tmp_path))

`check_layouts` is an ordinary function of the test module: every process imports the module and calls it. Starting the
processes costs seconds, so batch several checks in one function and let it return what the test asserts on.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run_distributed(
    target: Callable | str,
    world_size: int,
    *,
    timeout: float = 240.0,
    env: dict[str, str] | None = None,
    **kwargs: Any,
) -> Any:
    """Call `target(**kwargs)` in `world_size` processes of one thread each, as ranks of one job.

    Args:
        target: a module-level function, or its name as "package.module:function" or "path/to/file.py::function".
        timeout: seconds until all processes are ended and the test fails.
        env: more environment variables for every process.
        kwargs: JSON-able arguments.

    Returns:
        What rank 0's call returned, through JSON.

    Raises:
        AssertionError: a process failed or time ran out; the message ends with that rank's stderr.
    """
    if not isinstance(target, str):
        target = f"{inspect.getfile(target)}::{target.__qualname__}"
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder, processes = Path(name), []
        try:
            for rank in range(world_size):
                command = [sys.executable, "-m", "tests.distributed", target, json.dumps(kwargs), str(folder)]
                variables = _environment(rank, world_size, folder, env)
                with open(folder / f"{rank}.stderr", "w") as stderr:
                    process = subprocess.Popen(command, cwd=ROOT, env=variables, stderr=stderr, stdout=stderr)
                processes.append(process)
            _wait(processes, folder, timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return json.loads((folder / "result.json").read_text())


def _environment(rank: int, world_size: int, folder: Path, extra: dict[str, str] | None) -> dict[str, str]:
    port_file = folder / "port"
    if not port_file.exists():
        with socket.socket() as probe:  # a port that is free now; rank 0 binds it seconds later
            probe.bind(("127.0.0.1", 0))
            port_file.write_text(str(probe.getsockname()[1]))
    own = dict(
        RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size,
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port_file.read_text(), OMP_NUM_THREADS=1,
    )  # fmt: skip
    return {**os.environ, **{name: str(value) for name, value in own.items()}, **(extra or {})}


def _wait(processes: list[subprocess.Popen], folder: Path, timeout: float) -> None:
    """Return when all ended well; fail as soon as one did not."""
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            # The first to fail takes the others down with lost connections: its own traceback is the one to show.
            rank = min(failed, key=lambda r: (folder / f"{r}.stderr").stat().st_mtime)
            raise AssertionError(f"rank {rank} exited with {codes[rank]}:\n{_tail(folder, rank)}")
        if None not in codes:
            return
        if time.monotonic() > deadline:
            waiting = [rank for rank, code in enumerate(codes) if code is None]
            tails = "\n".join(f"--- rank {rank}\n{_tail(folder, rank, 1500)}" for rank in waiting)
            raise AssertionError(f"ranks {waiting} still ran after {timeout:.0f} s:\n{tails}")
        time.sleep(0.05)


def _tail(folder: Path, rank: int, characters: int = 6000) -> str:
    return (folder / f"{rank}.stderr").read_text(errors="replace")[-characters:]


def _resolve(target: str) -> Callable:
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


def _main(target: str, arguments: str, folder: str) -> None:
    import torch

    torch.set_num_threads(1)
    result = _resolve(target)(**json.loads(arguments))
    if os.environ["RANK"] == "0":
        (Path(folder) / "result.json").write_text(json.dumps(result))
    parallel = sys.modules.get("nemo_steerlm.megatron.parallel")
    if parallel is not None:
        parallel.shutdown()


if __name__ == "__main__":
    _main(*sys.argv[1:])
