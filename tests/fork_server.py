"""A Python that has imported everything: `[interpreter(), "-m", "nemo_steerlm", ...]` starts in a blink.

Importing torch, megatron-core and Lightning takes seconds of CPU, and the suite starts more than a hundred processes.
One server for each pytest process pays for it once and forks. A forked process is what a fresh one would be, but for
the modules that are imported already and the seed of `hash`, which all of them share; tests about imports, log lines
and real jobs use `sys.executable`.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_ROOMS = ("verbs", "train", "models", "report")


@functools.cache
def interpreter() -> str:
    """The path of an executable that runs `-m MODULE ...` in a fork of the server, and all else in a real Python.

    CUDA does not survive a fork: with STEERLM_TEST_GPU=1 it is the real Python.
    """
    if os.environ.get("STEERLM_TEST_GPU") == "1":
        return sys.executable
    folder = tempfile.TemporaryDirectory(prefix="fork-")
    atexit.register(folder.cleanup)
    executable = Path(folder.name) / "python"
    client = Path(__file__).with_name("fork_client.py").read_text()
    executable.write_text(f"#!{sys.executable} -SE\n{client}")
    executable.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.fork_server", str(executable)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert server.stdin is not None and server.stdout is not None
    assert server.stdout.readline() == b"ready\n", "the fork server did not start"
    atexit.register(server.wait)
    atexit.register(server.stdin.close)
    return str(executable)


def _serve(executable: str) -> None:
    """Fork for every connection, until standard input closes: when the pytest process ends, however it does."""
    importlib.import_module("nemo_steerlm.cli")
    for room in _ROOMS:
        package = importlib.import_module(f"nemo_steerlm.{room}")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    gc.freeze()  # no process forked from here on collects, or copies, what was imported
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{Path(executable).parent}/socket")
    listener.listen(16)
    sys.executable = executable  # what a forked process starts forks too
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that mind one connection each
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while not select.select([sys.stdin, listener], [], [])[0].count(sys.stdin):
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            _mind(connection)
            os._exit(0)
        connection.close()


def _mind(connection: socket.socket) -> None:
    """Run what a client asks for; pass signals on, and end it when the client ends."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    request, wanted = b"", int.from_bytes(size, "big")
    while len(request) < wanted:
        request += connection.recv(wanted - len(request))
    child = os.fork()
    if child == 0:
        os.setsid()
        connection.close()
        _become(json.loads(request), streams)
    while os.getsid(child) != child:
        pass  # a group of its own, which can be killed from here on
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(child)
    watched: list[Any] = [connection, ended]
    while ended not in select.select(watched, [], [])[0]:
        number = connection.recv(1)
        if not number:
            os.killpg(child, signal.SIGKILL)
            return
        os.kill(child, number[0])
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        connection.sendall(str(code).encode())
    except OSError:
        pass  # the client was killed


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Be the process that the client asked for."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    if "STEERLM_PARENT" in os.environ:  # launch/local.py looks for the launcher; here the minder dies with it
        os.environ["STEERLM_PARENT"] = str(os.getppid())
    os.chdir(request["folder"])
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    module, *words = request["words"]
    sys.argv, sys.path[0] = [module, *words], request["folder"]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code: Any = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
        code = 1
    _leave(code or 0)


def _leave(code: int) -> None:
    """End as Python does: what was registered for the end of the process runs, streams are flushed."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 120
    os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])
