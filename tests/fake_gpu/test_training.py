"""Lightning's loop on CUDA: models of every kind train, validate, save and resume at the layouts where it matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_steerlm.config import ParallelConfig
from nemo_steerlm.fake_gpu.mode import FakeGpu
from nemo_steerlm.fake_gpu.room import Room
from tests.fake_gpu import steps
from tests.models.helpers import OPTIMIZER

TP = dict(tensor=2, sequence=True)
PP = dict(pipeline=2)
VPP = dict(pipeline=2, virtual_pipeline=2)
ADAPTERS = dict(rank=4)
AVERAGED = dict(lr=OPTIMIZER.lr, ema_decay=0.9, overlap=True)


def fit(
    gpu: FakeGpu, folder: str, kind: str, layout: dict[str, Any], head_init: bool, resume: bool, **settings: Any
) -> list[dict]:
    """Two steps with their validation and checkpoint, then a third one from there; the lines of metrics.jsonl."""
    import torch

    from nemo_steerlm.train.tasks import RegressionTask
    from tests.models.helpers import make_task, train

    if "pipeline" in layout:
        steps.speak_for_the_last_stage()

    def task_of(model: Any) -> Any:
        return RegressionTask(model, start=torch.ones(model.outputs)) if head_init else make_task(model)

    settings |= dict(init=None, parallel=ParallelConfig(**layout), precision="bf16", make_task=task_of)
    lines = train(kind, Path(folder), steps=2, **settings)
    if not resume:
        return lines
    return train(kind, Path(folder), steps=3, **settings)


@pytest.mark.parametrize(
    ("kind", "layout", "settings"),
    [
        ("policy", TP, dict()),
        ("policy", TP, dict(pack_length=64, lora=ADAPTERS, recompute="full")),
        ("policy", PP, dict(optimizer=AVERAGED)),
        ("policy", VPP, dict(pack_length=64, async_checkpoint=True)),
        ("regressor", TP, dict(pooling="mean", head_init=True)),
        ("regressor", TP, dict(pack_length=64, head="distribution", head_init=True, pairs=3)),
        ("regressor", PP, dict(pooling="mean", pack_length=64, lora=ADAPTERS)),
        ("regressor", VPP, dict(recompute="selective")),
        ("regressor", dict(), dict(head="generative")),
    ],
    ids=str,
)
def test_fit(room: Room, tmp_path: Path, kind: str, layout: dict, settings: dict) -> None:
    settings = {"head_init": False, **settings}
    # One data-parallel rank: of several each writes a share of a checkpoint, and there is only this one.
    world = layout.get("tensor", 1) * layout.get("pipeline", 1)
    lines = room.run(fit, world=world, kind=kind, folder=str(tmp_path), layout=layout, resume=True, **settings)
    assert sum("train/loss" in line for line in lines) == 3 and any("val/loss" in line for line in lines)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize(("kind", "layout"), [("policy", TP), ("regressor", PP)], ids=str)
def test_fit_on_two_data_parallel_ranks(room: Room, tmp_path: Path, kind: str, layout: dict) -> None:
    settings: dict[str, Any] = dict(head_init=False, resume=False, pack_length=64)
    lines = room.run(fit, world=4, kind=kind, folder=str(tmp_path), layout=layout, **settings)
    assert sum("train/loss" in line for line in lines) == 2 and (tmp_path / "checkpoints/step-00000002").is_dir()


def measure_phases(gpu: FakeGpu) -> list[Any]:
    """Waits for the device of a step that is not measured, of one that is, and of taking the times."""
    model = steps.build("policy", {})
    micro_batches = steps.batches("policy", {}, count=3)
    steps.prepare(model)
    steps.train(model, micro_batches)  # makes the optimizer's state
    found: list[Any] = []

    def count(function: Any) -> Any:
        before = gpu.waits.copy()
        result = function()
        found.append((gpu.waits - before).total())
        return result

    count(lambda: steps.train(model, micro_batches))
    model.phases.on = True
    count(lambda: steps.train(model, micro_batches))
    steps.train(model, micro_batches)
    return [*found, sorted(count(model.phases.take)), found[-1]]


def test_measuring_phases_waits_for_the_device_once_a_report(room: Room) -> None:
    off, on, phases, taking = room.run(measure_phases, world=1)
    assert on == off and phases == ["optimizer", "reduction", "run", "step"] and taking == 1
