"""A checkpoint written in the background holds the moment it was asked for, and appears only when it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_steerlm.config import ParallelConfig
from tests.distributed import run_distributed
from tests.models.helpers import make_model, make_task, train


def save_in_background(folder: str) -> dict:
    """Two tensor-parallel ranks: save, go on changing the weights, and what is on disk at each moment."""
    import torch.distributed as dist

    from nemo_steerlm.megatron import checkpoint, parallel
    from nemo_steerlm.megatron.checkpoint import CheckpointFolder

    found, layout = dict[str, Any](), ParallelConfig(tensor=2)
    parallel.initialize(layout, seed=1)
    model = make_model("policy", layout)
    model.build()
    run = CheckpointFolder(Path(folder), keep=2)
    at_save = {name: p.detach().clone() for name, p in model.chunks[0].named_parameters()}
    state = {"model": checkpoint.training_state(model.chunks)}
    pending = checkpoint.PendingSave(run.path(2), state, {"step": 2})
    with torch.no_grad():
        for parameter in model.chunks[0].parameters():
            parameter.zero_()
    parallel.barrier()
    found["before its end"] = run.steps()
    while not pending.poll():
        dist.barrier()
    found["after"] = run.steps()

    # a kill while step 4 is written: its thread is done, nobody ends the save
    checkpoint.PendingSave(run.path(4), {"model": checkpoint.training_state(model.chunks)})._thread.join()  # type: ignore[union-attr]
    parallel.barrier()
    latest = run.latest()
    assert latest is not None
    found["after a kill"] = [run.steps(), latest.name, sorted(p.name for p in Path(folder).iterdir())]
    loaded = checkpoint.load(latest, {"model": checkpoint.training_state(model.chunks)})
    checkpoint.load_training_state(model.chunks, loaded["model"])
    found["step"] = loaded["common"]["step"]
    found["equal"] = all(torch.equal(p, at_save[name]) for name, p in model.chunks[0].named_parameters())

    try:  # the error of one rank's thread reaches every rank
        pending = checkpoint.PendingSave(run.path(6), {"model": checkpoint.training_state(model.chunks)})
        pending._thread.join()  # type: ignore[union-attr]
        _fail_writing(pending, checkpoint)
        pending.finish()
    except BaseException as error:  # megatron-core passes on torch's CheckpointException, which is no Exception
        found["error"] = str(error)
    found["after an error"] = run.steps()
    return found


def _fail_writing(pending, checkpoint) -> None:
    """Replace what rank 0's thread reported by the error it would have met on a full disk."""
    import os

    if os.environ["RANK"] == "0":
        results = checkpoint.filesystem_async._results_queue
        results.get()
        checkpoint._write([], [("/nowhere/file", "file", ([], []))], results, {})


def train_both_ways(folder: str) -> dict:
    """The same run with and without, and resumed from a checkpoint written in the background."""
    import shutil

    from megatron.core import dist_checkpointing

    root, found = Path(folder), dict[str, Any]()
    settings: dict[str, Any] = dict(init=None, parallel=ParallelConfig(), checkpoint_every=2, validate=False)
    for name, background in (("plain", False), ("background", True)):
        found[name] = train("regressor", root / name, async_checkpoint=background, **settings)
    again = root / "again/checkpoints/step-00000002"
    shutil.copytree(root / "background/checkpoints" / again.name, again)
    found["again"] = train("regressor", root / "again", async_checkpoint=True, **settings)
    stored = [
        {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        for tensors in (
            dist_checkpointing.load_plain_tensors(str(root / name / "checkpoints/step-00000004"))
            for name in ("plain", "background")
        )
    ]
    found["same tensors"] = len(stored[0]) > 0 and stored[0].keys() == stored[1].keys()
    found["different"] = [name for name in stored[0] if not torch.equal(stored[0][name], stored[1][name])]
    found["folders"] = sorted(p.name for p in (root / "background/checkpoints").iterdir())
    return found


def test_a_background_save_is_of_its_moment_and_whole(tmp_path: Path) -> None:
    found = run_distributed(save_in_background, 2, folder=str(tmp_path))
    assert found["before its end"] == []
    assert found["after"] == [2]
    assert found["after a kill"] == [[2], "step-00000002", ["step-00000002"]]
    assert found["step"] == 2 and found["equal"]
    assert "No such file" in found["error"] and found["after an error"] == [2]


def test_training_with_background_checkpoints_is_the_same_training(tmp_path: Path) -> None:
    found = run_distributed(train_both_ways, 1, folder=str(tmp_path))
    losses = {name: [(r["train/loss"], r["train/grad_norm"]) for r in found[name]] for name in ("plain", "background")}
    assert losses["plain"] == losses["background"]
    assert [(r["train/loss"], r["train/grad_norm"]) for r in found["again"]] == losses["plain"][2:]
    assert found["same tensors"] and found["different"] == []
    assert found["folders"] == ["step-00000002", "step-00000004"]


def save_a_head_on_four(folder: str) -> list[int]:
    """A frozen backbone on four data-parallel ranks: the head is so small that a rank's share of it is empty."""
    import dataclasses

    import torch.distributed as dist

    from nemo_steerlm.megatron import checkpoint, parallel
    from tests.models.helpers import ARCHITECTURE

    parallel.initialize(ParallelConfig(), seed=1)
    narrow = dataclasses.replace(ARCHITECTURE, num_layers=1, hidden_size=32)
    model = make_model("regressor", ParallelConfig(), architecture=narrow, freeze="trunk")
    model.build()
    model.begin(make_task(model), [None], bad_steps=None)
    model.configure_model()
    model.configure_optimizers()
    inner = getattr(model.optimizer, "chained_optimizers", [model.optimizer])[0].optimizer
    inner.step()  # no gradients yet: only the state comes into being
    state = model.training_state()
    arguments = {"metadata": checkpoint.metadata()}
    optimizer = model.optimizer.sharded_state_dict(state["model"], **arguments)
    checkpoint.save(Path(folder) / "saved", {**state, "optimizer": optimizer})
    state = model.training_state()  # saving used up the other
    optimizer = model.optimizer.sharded_state_dict(state["model"], is_loading=True, **arguments)
    loaded = checkpoint.load(Path(folder) / "saved", {**state, "optimizer": optimizer})
    model.optimizer.load_state_dict(loaded["optimizer"])
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(4)]
    dist.all_gather(sizes, torch.tensor([sum(s["exp_avg"].numel() for s in inner.state.values())]))
    return [int(size) for size in sizes]


def test_a_rank_whose_share_of_the_optimizer_is_empty_saves_and_loads(tmp_path: Path) -> None:
    sizes = run_distributed(save_a_head_on_four, 4, folder=str(tmp_path))
    assert 0 in sizes and sum(sizes) == 3 * 32
