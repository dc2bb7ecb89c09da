"""Two steps of models that fit no laptop: one rank's memory by part, beside arithmetic.

Per parameter of a rank: 2 bytes in bf16, 4 of its gradient's buffer, and 12 of the optimizer (fp32 master weight and
two moments), shared among the data-parallel ranks. Activations follow "Reducing Activation Recomputation in Large
Transformer Models" (arXiv 2205.05198, section 4): what each operation of a layer keeps for the backward pass.
`pytest -s` prints both.
"""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_steerlm.config import Architecture
from nemo_steerlm.config.families import family_of
from nemo_steerlm.fake_gpu.memory import GIB
from nemo_steerlm.fake_gpu.mode import FakeGpu
from nemo_steerlm.fake_gpu.room import Room
from tests.distributed import ROOT
from tests.fake_gpu import steps

SEQUENCE = 4096


def shape(name: str) -> Architecture:
    values = OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml").architecture
    architecture = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Architecture), values))
    assert isinstance(architecture, Architecture)
    return architecture


def two_steps(gpu: FakeGpu, name: str, layout: dict[str, Any], count: int, **settings: Any) -> dict[str, Any]:
    """Bytes by part at the peak of the second step, whose optimizer has its state."""
    model = steps.build("policy", layout, architecture=shape(name), **settings)
    steps.prepare(model)
    if "pipeline" in layout:
        steps.speak_for_the_last_stage()
    micro_batches = steps.batches("policy", layout, rows=1, length=SEQUENCE, count=count)
    for _ in range(2):
        gpu.memory.restart()
        steps.train(model, micro_batches)
    return {"parameters": sum(weight.numel() for weight in model.parameters()), "peak": gpu.memory.at_peak}


def parameters(it: Architecture, tensor: int, layers: int, ends: int) -> int:
    """Of one rank: its share of every matrix of `layers` layers and of `ends` tables of the vocabulary."""
    h, f = it.hidden_size, it.ffn_hidden_size
    matrices = layers * (4 * h * h + feed_forward(it) * h * f) + ends * it.vocab_size * h
    return matrices // tensor + 2 * layers * norm(it)


def feed_forward(it: Architecture) -> int:
    """Matrices of the feed-forward block, which are as many as the tensors that it keeps: a gate is one more."""
    return 3 if family_of(it).gated else 2


def norm(it: Architecture) -> int:
    """Of one norm: LayerNorm has a bias too."""
    return it.hidden_size * (2 if family_of(it).layernorm1p else 1)


def layer(it: Architecture, tensor: int) -> int:
    """What one layer keeps of a micro-batch of one row for its backward pass, sequence parallelism being on, in bytes.

    In bf16: the inputs of both norms and what the norms make of them (4 h); queries, keys and values as they come, of
    which the values are needed, and rotated queries and keys (5 h); attention's output in the order of the kernel and
    in that of the next product (2 h); gate and up, and their product (3 f), or without a gate 2 f.
    """
    return SEQUENCE * 2 * (11 * it.hidden_size + feed_forward(it) * it.ffn_hidden_size) // tensor


def activations(it: Architecture, tensor: int, layers: int, recompute: str) -> tuple[int, int]:
    """Bounds of the peak, in bytes: of a model on one stage, or of the first of two stages, full recompute."""
    whole = SEQUENCE * it.hidden_size * 2  # a tensor that sequence parallelism has gathered
    if recompute == "none":  # at the end of the forward pass: logits in bf16 and fp32, and what they are made of
        kept = layers * layer(it, tensor) + SEQUENCE * it.vocab_size * (2 + 4) // tensor + whole
        return kept, kept + whole
    kept = 2 * layers * whole // tensor + layer(it, tensor)  # inputs of the layers of two micro-batches; one layer
    return kept, kept + 5 * whole  # inputs gathered again, gradients of what was gathered


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline", "data", "recompute"),
    [("llama2_13b", 4, 1, 2, "none"), ("nemotron_43b", 8, 2, 1, "full")],
)
def test_two_steps(room: Room, name: str, tensor: int, pipeline: int, data: int, recompute: str) -> None:
    it, layers = shape(name), shape(name).num_layers // pipeline
    layout = dict(tensor=tensor, sequence=True, **({"pipeline": pipeline} if pipeline > 1 else {}))
    job: dict[str, Any] = dict(name=name, layout=layout, count=2 * pipeline, recompute=recompute)
    found = room.run(two_steps, world=tensor * pipeline * data, **job)
    weights = parameters(it, tensor, layers, ends=3 - pipeline) + (norm(it) if pipeline == 1 else 0)
    expected = {"parameters": 2 * weights, "gradient buffers": 4 * weights, "optimizer": 12 * weights // data}
    least, most = activations(it, tensor, layers, recompute)
    for part, size in [*expected.items(), ("activations", least)]:
        print(f"{name} {part}: {found['peak'][part] / GIB:.3f} GiB, by arithmetic {size / GIB:.3f}")  # noqa: T201
    assert found["parameters"] == weights
    for part, size in expected.items():
        assert found["peak"][part] == pytest.approx(size, rel=2e-3), part
    assert least <= found["peak"]["activations"] <= most
    assert sum(found["peak"].values()) < 80 * GIB
