"""What the jobs of these tests share: a small model at a layout, and batches for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from nemo_steerlm.config import Architecture, ParallelConfig
from nemo_steerlm.fake_gpu import steps
from nemo_steerlm.fake_gpu.mode import FakeGpu
from nemo_steerlm.fake_gpu.steps import speak_for_the_last_stage, train
from tests.models.helpers import ARCHITECTURE, make_batches, make_model, make_task

__all__ = ["speak_for_the_last_stage", "train"]


def build(
    kind: str,
    layout: dict[str, Any],
    *,
    architecture: Architecture = ARCHITECTURE,
    precision: str = "bf16",
    **settings: Any,
) -> Any:
    """A model of random weights on the device; the processes meet first."""
    from nemo_steerlm.megatron import parallel

    parallel.initialize(ParallelConfig(**layout), seed=1)
    model = make_model(kind, ParallelConfig(**layout), architecture=architecture, precision=precision, **settings)
    model.build()
    return model


def batches(
    kind: str, layout: dict[str, Any], *, rows: int = 2, length: int = 32, count: int = 2, packed: bool = False
) -> list[Any]:
    """`count` equal micro-batches of `rows` samples of `length` tokens, or of one row in which they are packed.

    Every token but the first carries loss; every label is 1.
    """
    mask = np.arange(length) > 0
    item = dict(tokens=np.arange(length) % 400 + 1, loss_mask=mask, labels=np.ones(3, np.float32))
    cut: dict[str, Any] = dict(micro_batch_size=rows, parallel=ParallelConfig(**layout))
    made = make_batches(kind, [item] * 8, steps=1, pack_length=rows * length if packed else None, **cut)
    return [made[0][0]] * count


def begin(model: Any, micro_batches: list[Any] | None = None, task: Any = None) -> None:
    """Begin a training; with micro-batches the head starts at ones."""
    import torch

    from nemo_steerlm.train.bad_steps import BadSteps
    from nemo_steerlm.train.tasks import RegressionTask

    if micro_batches is not None:
        task = RegressionTask(model, start=torch.ones(model.outputs))
    model.begin(task or make_task(model), [micro_batches], bad_steps=BadSteps())


def prepare(model: Any, micro_batches: list[Any] | None = None, task: Any = None) -> None:
    """Make the model ready to be trained; see `begin`."""
    begin(model, micro_batches, task)
    steps.prepare(model)


def validate(model: Any, micro_batches: list[Any]) -> dict[str, float]:
    """The metrics of one validation step."""
    model.eval()
    model.on_validation_epoch_start()
    model.validation_step(micro_batches, 0)
    model.on_validation_epoch_end()
    model.train()
    return model.validated  # type: ignore[no-any-return]


def waits_per_micro_batch(gpu: FakeGpu, model: Any, micro_batch: Any) -> dict[str, int]:
    """Where a step waits for the device once more for each micro-batch more, and how often."""
    counts = []
    for count in (1, 1, 3):  # the first step makes the optimizer's state
        before = gpu.waits.copy()
        train(model, [micro_batch] * count)
        counts.append(gpu.waits - before)
    return {place: count // 2 for place, count in (counts[2] - counts[1]).items()}
