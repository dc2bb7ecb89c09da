"""Operations, times and prices beside hand computation and published figures."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_steerlm.config import LoRAConfig, ParallelConfig
from nemo_steerlm.config.gpus import GPUS
from nemo_steerlm.plan.estimate import estimate, steps_of
from nemo_steerlm.plan.job import Job
from nemo_steerlm.plan.speed import LINK_SHARE, flops_per_token, step_time
from tests.plan.helpers import shape

H100 = GPUS["h100_80g"]
JOB = Job(architecture=shape("llama2_7b"), devices=8, packed=True, batch=64)


def test_operations_of_a_token() -> None:
    linears = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    attention = 32 * 2 * 4096 * 4096  # query times key, weight times value, two operations each, of half the keys
    forward = 2 * (linears + 32000 * 4096) + attention
    found = flops_per_token(JOB)
    assert found.forward == forward and found.model == 3 * forward and found.recomputed == 0
    full = flops_per_token(dataclasses.replace(JOB, recompute="full"))
    assert full.model == 3 * forward and full.recomputed == 2 * linears + attention
    assert flops_per_token(dataclasses.replace(JOB, recompute="selective")).recomputed == attention


def test_frozen_weights_need_no_gradient() -> None:
    whole, adapted = flops_per_token(JOB), flops_per_token(
        dataclasses.replace(JOB, trained="lora", lora=LoRAConfig(rank=1, targets=["linear_proj"]))
    )  # fmt: skip
    adapters = 3 * 2 * 32 * 2 * 4096
    attention = 32 * 2 * 4096 * 4096
    assert adapted.model == pytest.approx(whole.model * 2 / 3 + attention + adapters)


def test_the_published_count_of_a_13b_model() -> None:
    """726 TFLOP/s at 9,384 tokens/s (NVIDIA/NeMo-Framework-Launcher, examples/README.md, Llama 2 13B SFT): 77.4 G."""
    short = dataclasses.replace(JOB, architecture=shape("llama2_13b"), sample=1.0)
    assert flops_per_token(short).model == pytest.approx(726e12 / 9384, rel=0.01)


def test_one_gpu_computes_at_the_given_share() -> None:
    job = dataclasses.replace(JOB, devices=1)
    time = step_time(job, H100, 0.4)
    assert time.products == pytest.approx(64 * 4096 * flops_per_token(job).model / (0.4 * 989.4e12))
    assert time.accumulation == pytest.approx(64 * 6_738_415_616 * 12 / 3.35e12)
    assert time.tensor == time.pipeline == time.bubble == time.data == time.recomputation == 0
    found = estimate(job, H100, 0.4)
    assert found.tokens_per_second == pytest.approx(64 * 4096 / time.total)
    assert found.mfu_reached == pytest.approx(0.4 * time.products / time.total)


def test_tensor_parallelism_moves_four_reductions_a_layer() -> None:
    job = dataclasses.replace(JOB, parallel=ParallelConfig(tensor=2))
    hidden = 2 * 4096 * 4096
    moved = 16 * 32 * 4 * 2 * (1 / 2) * hidden  # micro-batches, layers, reductions, there and back, (t - 1) / t
    assert step_time(job, H100, 0.4).tensor == pytest.approx(moved / (450e9 * LINK_SHARE))


def test_the_bubble_is_that_of_the_schedule() -> None:
    job = dataclasses.replace(JOB, parallel=ParallelConfig(pipeline=4))  # 2 data-parallel ranks, 32 micro-batches
    time = step_time(job, H100, 0.4)
    busy = time.products + time.recomputation + time.accumulation + time.pipeline
    assert time.bubble == pytest.approx(busy * 3 / 32)
    interleaved = dataclasses.replace(JOB, parallel=ParallelConfig(pipeline=4, virtual_pipeline=2))
    time = step_time(interleaved, H100, 0.4)
    assert time.bubble == pytest.approx((time.products + time.accumulation + time.pipeline) * 3 / 64)


def test_steps_hours_and_price() -> None:
    assert (
        steps_of(None, 5, 1001, 128) == 40 and steps_of(7, None, None, 128) == 7 and steps_of(None, 5, None, 8) is None
    )
    found = estimate(JOB, H100, 0.4, steps=100, price=2.5)
    assert found.hours == pytest.approx(100 * found.time.total / 3600)
    assert found.cost == pytest.approx(found.hours * 8 * 2.5)  # type: ignore[operator]


def test_short_samples_share_packed_rows() -> None:
    job = dataclasses.replace(JOB, sample=512.0)  # 64 samples are 8 rows, one for each rank
    assert job.micro_batches == 1 and job.computed == 4096
    padded = dataclasses.replace(JOB, packed=False, sample=512.0, padding=0.2)
    assert padded.micro_batches == 8 and padded.computed == pytest.approx(640)
