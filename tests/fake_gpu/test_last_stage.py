"""The last pipeline stage, which has the loss and the labels: steps and validation on CUDA."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_steerlm.fake_gpu.mode import FakeGpu
from nemo_steerlm.fake_gpu.room import Room
from tests.fake_gpu import steps

PP = dict(pipeline=2)
VPP = dict(pipeline=2, virtual_pipeline=2)


def run(gpu: FakeGpu, kind: str, layout: dict[str, Any], packed: bool, head_init: bool, **settings: Any) -> list[str]:
    """Two steps and a validation; the names of its metrics."""
    model = steps.build(kind, layout, **settings)
    micro_batches = steps.batches(kind, layout, packed=packed)
    steps.prepare(model, micro_batches if head_init else None)
    for _ in range(2):
        steps.train(model, micro_batches)
    return sorted(steps.validate(model, micro_batches))


@pytest.mark.parametrize(
    ("kind", "layout", "settings"),
    [
        ("policy", VPP, dict(packed=False, recompute="full", lora=dict(rank=4))),
        ("policy", PP, dict(packed=True, precision="fp32")),
        ("regressor", PP, dict(packed=False, head_init=True, pooling="mean")),
        ("regressor", VPP, dict(packed=True, head_init=True, pooling="mean", lora=dict(rank=4))),
        ("regressor", VPP, dict(packed=True, head="ordinal", freeze="trunk")),
    ],
    ids=str,
)
def test_steps_and_validation(room: Room, kind: str, layout: dict, settings: dict) -> None:
    names = room.run(run, rank=3, world=4, kind=kind, layout=layout, **{"head_init": False, **settings})
    assert "val/loss" in names
    assert kind == "policy" or "val/quality/mae" in names
