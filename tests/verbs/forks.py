"""Runs as forked processes that can be killed: imports are paid for once, by the process that forks them."""

from __future__ import annotations

import os
import signal
import socket
import time
import traceback
from collections.abc import Callable


def start(work: Callable[[], None], ranks: int = 1) -> list[int]:
    """Fork the ranks of a run; returns their process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            own = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_PORT=port)
            os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR="127.0.0.1")
            try:
                work()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return children


def finish(children: list[int]) -> None:
    """Wait until all ranks have ended well."""
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert codes == [0] * len(children), codes


def kill_when(moment: Callable[[], bool], children: list[int], seconds: float = 120.0) -> bool:
    """Kill all ranks with signal 9 when `moment` comes or one has ended; whether all were still at work then."""
    deadline = time.monotonic() + seconds
    while not moment() and not any(map(_ended, children)):
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.0005)
    for child in children:
        os.kill(child, signal.SIGKILL)
    return all([os.waitpid(child, 0)[1] == signal.SIGKILL for child in children])


def signal_when(moment: Callable[[], bool], children: list[int], one: int, number: int) -> list[int]:
    """Send one of the ranks a signal when `moment` comes; the exit codes of all, -n for one that signal n killed."""
    deadline = time.monotonic() + 120
    while not moment():
        assert time.monotonic() < deadline and not any(map(_ended, children)), "the moment never came"
        time.sleep(0.0005)
    os.kill(children[one], number)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
