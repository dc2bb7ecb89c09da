"""Two steps of models that fit no laptop: one rank's memory by part, beside arithmetic.

Per parameter of a rank: 2 bytes in bf16, 4 of its gradient's buffer, and 12 of the optimizer (fp32 master weight and
two moments), shared among the data-parallel ranks. Activations follow "Reducing Activation Recomputation in Large
Transformer Models" (arXiv 2205.05198, section 4): what each operation of a layer keeps for the backward pass.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_steerlm.config import Architecture
from tests.distributed import ROOT
from tests.fake_gpu import steps
from tests.fake_gpu.memory import GIB
from tests.fake_gpu.mode import FakeGpu
from tests.fake_gpu.room import Room

SEQUENCE = 4096


def shape(name: str) -> Architecture:
    values = OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml").architecture
    architecture = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Architecture), values))
    assert isinstance(architecture, Architecture)
    return architecture


def two_steps(gpu: FakeGpu, name: str, layout: dict[str, Any], count: int, **settings: Any) -> dict[str, Any]:
    """Bytes by part: what stays, and at the peak of the second step, whose optimizer has its state."""
    model = steps.build("policy", layout, architecture=shape(name), **settings)
    steps.prepare(model)
    if "pipeline" in layout:
        steps.speak_for_the_last_stage()
    micro_batches = steps.batches("policy", layout, rows=1, length=SEQUENCE, count=count)
    for _ in range(2):
        gpu.memory.restart()
        before = gpu.sent.copy()
        steps.train(model, micro_batches)
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "bytes": gpu.memory.now,
        "peak": gpu.memory.at_peak,
        "sent": gpu.sent - before,
    }


def parameters(it: Architecture, tensor: int, layers: int, ends: int) -> int:
    """Of one rank: its share of every matrix of `layers` layers and of `ends` tables of the vocabulary."""
    h, f = it.hidden_size, it.ffn_hidden_size
    matrices = layers * (4 * h * h + 3 * h * f) + ends * it.vocab_size * h
    return matrices // tensor + 2 * layers * h


def activations(it: Architecture, tensor: int, layers: int) -> int:
    """What a micro-batch of one row keeps in `layers` layers, in bytes, sequence parallelism being on.

    A layer keeps, in bf16: the inputs of both norms and of both first products (4 h), queries, keys and values before
    and after RoPE, attention's output twice (5 to 8 h), gate and up before and after SwiGLU (3 f).
    """
    return layers * SEQUENCE * 2 * (12 * it.hidden_size + 3 * it.ffn_hidden_size) // tensor


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline", "data", "recompute"),
    [("llama2_13b", 4, 1, 2, "none"), ("gpt_43b", 8, 2, 1, "full")],
)
def test_two_steps(room: Room, name: str, tensor: int, pipeline: int, data: int, recompute: str) -> None:
    it, layers = shape(name), shape(name).num_layers // pipeline
    layout = dict(tensor=tensor, sequence=True, **({"pipeline": pipeline} if pipeline > 1 else {}))
    job = dict(name=name, layout=layout, count=2 * pipeline, recompute=recompute)
    found = room.run(two_steps, world=tensor * pipeline * data, timeout=300, **job)
    weights = parameters(it, tensor, layers, ends=3 - pipeline) + (it.hidden_size if pipeline == 1 else 0)
    expected = {
        "parameters": 2 * weights,
        "gradient buffers": 4 * weights,
        "optimizer": 12 * weights // data,
        "activations": activations(it, tensor, layers),
    }
    for part, size in expected.items():  # shown by pytest -s
        sys.stdout.write(f"{name} {part}: {found['peak'].get(part, 0) / GIB:.3f} GiB, expected {size / GIB:.3f}\n")
    assert found["parameters"] == weights
    for part in ("parameters", "gradient buffers", "optimizer"):
        assert found["bytes"][part] == pytest.approx(expected[part], rel=2e-3), part
