"""Checkpoints on the disks of two nodes: copied out whole, recovered after a kill, given up where a part is lost."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from nemo_steerlm.config import ParallelConfig
from tests.distributed import run_distributed
from tests.models.helpers import make_model


def use_local_disks(folder: str) -> dict:
    """Two tensor-parallel ranks, each on a node of its own; what lies where after each event."""
    from nemo_steerlm import integrity
    from nemo_steerlm.errors import CheckpointError
    from nemo_steerlm.megatron import checkpoint, local_disk, parallel
    from nemo_steerlm.megatron.checkpoint import CheckpointFolder, PendingSave

    rank, layout = int(os.environ["RANK"]), ParallelConfig(tensor=2)
    parallel.initialize(layout, seed=1)
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    model = make_model("policy", layout)
    model.build()
    own, other = (Path(folder) / f"node{node}/run" for node in (rank, 1 - rank))
    shared = CheckpointFolder(Path(folder) / "checkpoints", keep=2)
    disk = local_disk.LocalDisk(own, shared)

    def save(step: int) -> Path:
        with torch.no_grad():
            for parameter in model.chunks[0].parameters():
                parameter.fill_(step)
        state = {"model": checkpoint.training_state(model.chunks)}
        pending = PendingSave(disk.folder / f"step-{step:08d}", state, {"step": step}, background=True, local=True)
        pending.finish()
        return pending.folder

    def found() -> list:
        """The steps, the step that the newest holds, and what is left on the disks of both nodes."""
        parallel.barrier()
        latest = shared.latest()
        assert latest is not None
        loaded = checkpoint.load(latest, {"model": checkpoint.training_state(model.chunks)})
        checkpoint.load_training_state(model.chunks, loaded["model"])
        values = {float(value) for parameter in model.chunks[0].parameters() for value in parameter.unique()}
        left = [path.name for node in (own, other) if node.exists() for path in node.iterdir()]
        parallel.barrier()
        return [shared.steps(), sorted(values), loaded["common"]["step"], left]

    result: dict[str, Any] = {}
    source = save(2)
    parallel.barrier()
    files = [{path.name for path in (node / source.name).iterdir()} for node in (own, other)]
    result["alone"] = sorted(files[0] & files[1])
    result["before"] = shared.steps()
    disk.copy_out(source.name).finish()
    integrity.check(shared.path(2))
    result["copied"] = found()

    save(4)  # and a kill while it is copied: half of it lies in the run folder
    disk.copy_out("step-00000004")._thread.join()
    parallel.barrier()
    local_disk.LocalDisk(own, shared).recover()
    result["after a kill"] = found()

    save(6)
    if rank == 1:
        shutil.rmtree(own)
    parallel.barrier()
    disk.recover()
    result["a disk is lost"] = found()

    changed = next(path for path in save(8).glob("*.distcp"))
    if rank == 1:
        changed.write_bytes(changed.read_bytes()[:-1] + b"?")
    parallel.barrier()
    disk.recover()
    result["a file is damaged"] = found()

    save(8)  # of which node 1 has the list of an earlier attempt
    if rank == 1:
        integrity.write_list(own / "step-00000008", {"__9_9.distcp": "0" * 64})
    parallel.barrier()
    disk.recover()
    result["another attempt"] = found()

    source, copy = save(10), local_disk._copy_file
    if rank == 1:
        local_disk._copy_file = _full  # type: ignore[assignment]
    try:
        disk.copy_out(source.name).finish()
    except CheckpointError as error:
        result["full"] = str(error)
    local_disk._copy_file = copy
    result["then"] = [shared.steps(), source.is_dir()]
    disk.recover()
    result["with room again"] = found()
    return result


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_the_newest_checkpoint_of_both_places_is_used(tmp_path: Path) -> None:
    found = run_distributed(use_local_disks, 2, folder=str(tmp_path))
    assert found["alone"] == ["SHA256SUMS"] and found["before"] == []
    assert found["copied"] == [[2], [2.0], 2, []]
    assert found["after a kill"] == [[2, 4], [4.0], 4, []]
    for event in ("a disk is lost", "a file is damaged", "another attempt"):
        assert found[event] == found["after a kill"], event
    assert "step-00000010 could not be copied to" in found["full"] and "No space left on device" in found["full"]
    assert found["then"] == [[2, 4], True]
    assert found["with room again"] == [[2, 4, 10], [10.0], 10, []]
