"""Faults that no CPU shows turn the room red: each is planted here, in the job's own process."""

from __future__ import annotations

import pytest

from nemo_steerlm.fake_gpu.mode import FakeGpu
from nemo_steerlm.fake_gpu.room import JobFailed, Room
from tests.fake_gpu import steps

TP = dict(tensor=2, sequence=True)


def without_gloo_groups(gpu: FakeGpu) -> None:
    """The optimizer asks for gloo groups, and none were made beside NCCL's."""
    from functools import partial

    from megatron.core import parallel_state

    make = parallel_state.initialize_model_parallel
    parallel_state.initialize_model_parallel = partial(make, create_gloo_process_groups=False)
    steps.prepare(steps.build("policy", dict()))


def places_on_the_cpu(gpu: FakeGpu, planted: bool) -> float:
    """`model.head_init=mean` with `model.pooling=mean`, the texts' places not moved to the device."""
    from nemo_steerlm.models.pooling import pool
    from nemo_steerlm.train import tasks

    if planted:
        tasks.pool = lambda output, first, last, pooling: pool(  # type: ignore[attr-defined]
            output, first.cpu(), last.cpu(), pooling
        )
    model = steps.build("regressor", dict(), pooling="mean")
    steps.begin(model, steps.batches("regressor", dict()))
    return model.chunks[0].score.weight.shape[0]


def numbers_over_nccl(gpu: FakeGpu) -> None:
    """A CPU tensor in a group of NCCL."""
    import torch
    import torch.distributed as dist

    steps.build("policy", dict())
    dist.all_reduce(torch.ones(3))


def waiting(gpu: FakeGpu, planted: bool) -> dict[str, int]:
    """A loss that is printed."""
    from nemo_steerlm.train.tasks import ConditionedSFTTask

    loss = ConditionedSFTTask.loss
    if planted:

        def printed(self, output, batch):  # type: ignore[no-untyped-def]
            result = loss(self, output, batch)
            result[0].item()
            return result

        ConditionedSFTTask.loss = printed  # type: ignore[method-assign]
    model = steps.build("policy", TP)
    steps.prepare(model)
    return steps.waits_per_micro_batch(gpu, model, steps.batches("policy", TP)[0])


def test_a_missing_gloo_group(room: Room) -> None:
    with pytest.raises(JobFailed, match="gloo"):
        room.run(without_gloo_groups, world=2)


def test_mixed_devices(room: Room) -> None:
    assert room.run(places_on_the_cpu, planted=False) == 3
    with pytest.raises(JobFailed, match="(two different|same) device"):
        room.run(places_on_the_cpu, planted=True)


def test_a_cpu_tensor_over_nccl(room: Room) -> None:
    with pytest.raises(JobFailed, match="No backend type associated with device type cpu"):
        room.run(numbers_over_nccl, world=2)


def test_a_wait_in_every_micro_batch(room: Room) -> None:
    once = room.run(waiting, world=2, planted=False)
    assert once == {}, "no micro-batch waits for the device"
    more = room.run(waiting, world=2, planted=True)
    planted = {place: count - once.get(place, 0) for place, count in more.items() if count != once.get(place, 0)}
    assert list(planted.values()) == [1] and "models/training.py" in next(iter(planted)), planted
