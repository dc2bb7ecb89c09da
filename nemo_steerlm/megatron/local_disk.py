"""Checkpoints on the disks of the nodes, copied to the run folder in the background.

Each node has a folder `step-N` with the files that its ranks wrote, and the SHA256SUMS of the files of all nodes. It
is removed once all of them are in the run folder, which is the only place a training reads from: what a killed run had
not copied out yet is copied first.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nemo_steerlm import integrity
from nemo_steerlm.errors import CheckpointError
from nemo_steerlm.megatron import checkpoint, parallel
from nemo_steerlm.megatron.checkpoint import CheckpointFolder

_log = logging.getLogger(__name__)
_BLOCK = 1 << 22  # bytes copied at once


class LocalDisk:
    """The part of one run's checkpoints that is on this node's disk.

    Every rank makes the same calls in the same order.

    Args:
        folder: of this run alone; the same path on every node.
        shared: the checkpoints in the run folder.
    """

    def __init__(self, folder: Path, shared: CheckpointFolder) -> None:
        self.folder, self.shared = folder, shared

    def copy_out(self, name: str) -> PendingCopy:
        """Begin to copy the complete checkpoint `name` ("step-00000120") to the run folder."""
        sums = integrity.read_sums(self.folder / name)
        _, mine = _shared_out([file for file in _own_share(sums) if (self.folder / name / file).is_file()])
        return PendingCopy(self.folder / name, self.shared.folder / name, sums, mine)

    def recover(self) -> None:
        """Copy out the newest checkpoint that a killed run left behind, and empty the folder.

        It counts where it is newer than those of the run folder and the nodes of this job together hold all files as
        they were written; else the next older one is looked at.

        Raises:
            CheckpointError: a file could not be copied.
        """
        newest: Any = parallel.broadcast_object(max(self.shared.steps(), default=0))
        left = _gathered([path.parent.name for path in self.folder.glob("step-*/" + integrity.SUMS)])
        complete = {name for names in left for name in names if name.removeprefix("step-").isdigit()}
        for name in sorted(complete, reverse=True):
            if int(name.removeprefix("step-")) > newest and self._recovered(name):
                break
        parallel.barrier()
        if parallel.is_first_of_node():
            shutil.rmtree(self.folder, ignore_errors=True)
        parallel.barrier()

    def _recovered(self, name: str) -> bool:
        source = self.folder / name
        lists = _gathered(_list_in(source))
        sums = next(found for found in lists if found)
        own = _own_share(sums) if lists[dist.get_rank()] == sums else []  # another list: of an earlier attempt
        held, mine = _shared_out([file for file in own if _intact(source, file)])
        if held != set(sums):
            _log.warning(
                "skipped %s on the local disks: %d of %d files are gone", name, len(set(sums) - held), len(sums)
            )
            return False
        PendingCopy(source, self.shared.folder / name, sums, mine).finish()
        _log.info("copied %s from the local disks, which was not in %s yet", name, self.shared.folder)
        return True


class PendingCopy:
    """A checkpoint that is being copied out by a thread of every rank.

    Args:
        source: on this node's disk.
        target: in the run folder.
        sums: sha256 of all files of the checkpoint.
        mine: the files that this rank copies.
    """

    def __init__(self, source: Path, target: Path, sums: Mapping[str, str], mine: list[str]) -> None:
        self._source, self._target, self._sums, self._mine = source, target, sums, mine
        self._partial = checkpoint.empty_partial(target, parallel.is_rank_zero())
        self._problems: list[str] = []
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        try:
            for name in self._mine:
                _copy_file(self._source / name, self._partial / name, self._sums[name])
        except (OSError, CheckpointError) as error:
            self._problems.append(str(error))

    def poll(self) -> bool:
        """End the copy if every rank has done its part; returns whether it did."""
        done = checkpoint.ended_everywhere(self._thread)
        if done:
            self.finish()
        return done

    def finish(self) -> None:
        """Wait for the copying, give the folder its name and remove it from the local disk.

        Raises:
            CheckpointError: a file could not be copied, or is not what was written; raised on every rank.
        """
        self._thread.join()
        problems = [problem for part in _gathered(self._problems) for problem in part]
        if problems:
            raise CheckpointError(f"{self._source.name} could not be copied to {self._target.parent}: {problems[0]}")
        if parallel.is_rank_zero():
            integrity.write_list(self._partial, self._sums)
        checkpoint.replace_folder(self._partial, self._target)
        if parallel.is_first_of_node():
            shutil.rmtree(self._source, ignore_errors=True)


def _gathered(value: Any) -> list[Any]:
    """The value of every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _list_in(folder: Path) -> dict[str, str]:
    try:
        return integrity.read_sums(folder)
    except CheckpointError:
        return {}


def _own_share(sums: Mapping[str, str]) -> list[str]:
    """The files that this rank looks after on its node."""
    return sorted(sums)[int(os.environ.get("LOCAL_RANK", 0)) :: int(os.environ.get("LOCAL_WORLD_SIZE", 1))]


def _shared_out(held: list[str]) -> tuple[set[str], list[str]]:
    """The files that some rank holds, and those this rank copies: the first of several that hold one does."""
    ranks = _gathered(held)
    mine = [name for name in held if not any(name in names for names in ranks[: dist.get_rank()])]
    return {name for names in ranks for name in names}, mine


def _intact(folder: Path, name: str) -> bool:
    try:
        integrity.check(folder, [name])
    except CheckpointError:
        return False
    return (folder / name).is_file()


def _copy_file(source: Path, target: Path, digest: str) -> None:
    """Copy a file to disk, checking its sha256 while it is read."""
    found = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as write:
        while block := read.read(_BLOCK):
            found.update(block)
            write.write(block)
        write.flush()
        os.fsync(write.fileno())
    if found.hexdigest() != digest or target.stat().st_size != source.stat().st_size:
        raise CheckpointError(f"{source}: not the file that was written (its sha256 differs from {integrity.SUMS})")
