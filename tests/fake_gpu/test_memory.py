"""What the room counts, beside what the same step really allocates on the CPU: one process, and TP2 over gloo.

A policy in bf16 agrees to 0.1%, its activations alone too: kernels save the same tensors on both devices, and gloo's
collectives take nothing from torch's allocator at the peak. What is left is less than the 5% that is asked for:

- a regressor: its peak is at the final norm, which CUDA has as one kernel and a CPU composes of operations in fp32
  (`megatron.layers.TorchRMSNorm`). That takes at most four tensors `[tokens, hidden]` more;
- fp32: CUDA's attention returns its output in the order of the next product, the CPU's kernel does not, and a copy of
  each layer's is kept.

`meter.cpp` is the real side. torch's profiler misses what gloo's threads free: under data or tensor parallelism it
counts up to a fifth too much. On the counted side, derivatives that copy only where a tensor is fake were 4 to 6% too
much with sequence parallelism (`mode._DERIVATIVES`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nemo_steerlm.config import Architecture
from nemo_steerlm.fake_gpu.mode import FakeGpu
from nemo_steerlm.fake_gpu.room import Room
from tests.distributed import run_distributed
from tests.fake_gpu import steps

SHAPE = Architecture(
    num_layers=4, hidden_size=256, ffn_hidden_size=704, num_attention_heads=8, vocab_size=4000,
    max_position_embeddings=512,
)  # fmt: skip
TP, SP = dict(tensor=2), dict(tensor=2, sequence=True)


def two_steps(memory: Any, kind: str, layout: dict[str, Any], family: str = "llama", **settings: Any) -> None:
    """The second one, which has the optimizer's state, is the one that counts."""
    model = steps.build(kind, layout, architecture=replace(SHAPE, family=family), **settings)
    steps.prepare(model)
    micro_batches = steps.batches(kind, layout, rows=1, length=512, count=1)
    steps.train(model, micro_batches)
    memory.restart()
    steps.train(model, micro_batches)


def counted(gpu: FakeGpu, **job: Any) -> list[int]:
    """Bytes at the peak and after the step, as the room counts them."""
    two_steps(gpu.memory, **job)
    return [gpu.memory.peak, sum(gpu.memory.now.values())]


def allocated(**job: Any) -> list[int]:
    """The same as the CPU's allocator hands them out."""
    from tests.fake_gpu.real import RealMemory

    memory = RealMemory()
    two_steps(memory, **job)
    return [memory.peak, memory.now]


@pytest.mark.parametrize(
    ("kind", "layout", "settings", "exact"),
    [
        ("policy", {}, dict(), True),
        ("policy", SP, dict(), True),
        ("policy", TP, dict(recompute="full", family="nemotron"), True),
        ("policy", SP, dict(precision="fp32", recompute="selective"), True),
        ("regressor", {}, dict(precision="fp32"), False),
        ("regressor", TP, dict(), False),
    ],
    ids=str,
)
def test_counted_memory_is_allocated(room: Room, kind: str, layout: dict, settings: dict, exact: bool) -> None:
    world, job = layout.get("tensor", 1), dict(kind=kind, layout=layout, **settings)
    peak, resting = room.run(counted, world=world, **job)
    real_peak, real_resting = run_distributed(allocated, world, **job)
    assert resting == pytest.approx(real_resting, rel=1e-3)
    assert peak == pytest.approx(real_peak, rel=1e-3 if exact else 0.05)
    assert peak - resting == pytest.approx(real_peak - real_resting, rel=0.01 if exact else 0.12)
