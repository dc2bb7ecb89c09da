"""One owner for an output: a second job that would write to the same place is refused at once.

The owner holds `.NAME.lock` beside the output: by flock where the file system supports it, so that the lock ends with
the process; elsewhere by the existence of the file, which names the owner's host, process and start time.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from nemo_steerlm.errors import ConfigError

UNFINISHED = ".unfinished"  # ends the name of a folder that is being written


@contextlib.contextmanager
def owned(output: str | Path, share: str | None = None) -> Iterator[None]:
    """Own an output inside this context; half-written files are removed after an error.

    Args:
        output: a file or a folder; the folder around it is made.
        share: this job's share of an output that several jobs write together, as "0/8"; each share has one owner, and
            meanwhile no job can own the whole output.

    Raises:
        ConfigError: a living process owns it, or the place cannot be written to.
    """
    output = Path(output).absolute()
    locks = [_Lock(_beside(output, ""), output, shared=share is not None)]
    if share is not None:
        locks.append(_Lock(_beside(output, "." + share.replace("/", "-of-")), output, shared=False))
    with contextlib.ExitStack() as held:
        for lock in locks:
            held.enter_context(lock)
        try:
            yield
        except BaseException:
            _tidy(output)
            raise


def _beside(output: Path, ending: str) -> Path:
    return output.with_name(f".{output.name}{ending}.lock")


def _tidy(output: Path) -> None:
    """Remove the folders that were being written when an error came."""
    inside = output.rglob("*" + UNFINISHED) if output.is_dir() else ()
    for folder in (output.with_name(output.name + UNFINISHED), *inside):
        shutil.rmtree(folder, ignore_errors=True)


class _Lock:
    """One lock file, as a context."""

    def __init__(self, path: Path, output: Path, shared: bool) -> None:
        self.path, self.output, self.shared = path, output, shared
        self._file: int | None = None

    def __enter__(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while self._file is None:
                self._file = self._locked()
        except OSError as error:
            raise ConfigError(
                f"output={self.output}: cannot be written: {error.filename or self.path.parent}: {error.strerror}; "
                "choose another place"
            ) from error

    def __exit__(self, *_: Any) -> None:
        assert self._file is not None
        alone = True
        if self.shared:  # the last share to end removes the file
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                alone = False
        if alone:
            self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None

    def _locked(self) -> int | None:
        """The file with its lock, or None where it went away meanwhile."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = self._owner(file)
            os.close(file)
            raise self._in_use(owner) from None
        except OSError:  # no flock on this file system: the file's owner counts
            if _alive(owner := self._owner(file)):
                os.close(file)
                raise self._in_use(owner) from None
        if not self.path.exists() or not os.path.samestat(os.fstat(file), os.stat(self.path)):
            os.close(file)  # its last owner removed it between our two calls
            return None
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(_me()).encode(), 0)
        return file

    def _owner(self, file: int) -> dict[str, Any]:
        try:
            return dict(json.loads(os.pread(file, 4096, 0)))
        except (ValueError, TypeError):
            return {}

    def _in_use(self, owner: dict[str, Any]) -> ConfigError:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.get("started", time.time())))
        who = f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown host')}"
        return ConfigError(
            f"output={self.output}: in use by {who}, started {since}; wait for it, or choose another output "
            f"({self.path} says so; remove it if that process is gone)"
        )


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _alive(owner: dict[str, Any]) -> bool:
    """Whether the owner may still be running; processes of other hosts cannot be checked."""
    if not owner:
        return False
    if owner.get("host") != socket.gethostname():
        return True
    try:
        return abs(psutil.Process(int(owner["pid"])).create_time() - float(owner["started"])) < 1
    except (psutil.Error, KeyError, ValueError):
        return False
