"""Reading and generation on CUDA, and model folders in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_steerlm.fake_gpu.mode import FakeGpu
from nemo_steerlm.fake_gpu.room import Room
from tests.fake_gpu import steps

TEXTS = [list(range(1, 50)), list(range(1, 30)), [*range(1, 45), 7]]
TP, PP = dict(tensor=2), dict(pipeline=2)


def read(gpu: FakeGpu, layout: dict[str, Any], head: str, pooling: str, precision: str) -> dict[str, Any]:
    """Values, and probabilities where the head has them, over all data-parallel ranks too."""
    model = steps.build("regressor", layout, head=head, pooling=pooling, precision=precision).eval()
    shapes = [model.predict(TEXTS).shape, model.predict_over_ranks(TEXTS, batch_tokens=64).shape]
    if head != "regression":
        shapes += [probabilities.shape for probabilities in model.distribution_over_ranks(TEXTS).values()]
    return {"shapes": shapes, "waits": gpu.waits}


def generate(gpu: FakeGpu, layout: dict[str, Any], precision: str) -> list[list[int]]:
    """How many tokens come, at every way to draw."""
    from nemo_steerlm.megatron.drawing import SamplingSettings

    model = steps.build("policy", layout, precision=precision).eval()
    found = []
    ways: list[dict[str, Any]] = [
        {},
        dict(temperature=1.0),
        dict(temperature=0.7, top_k=5),
        dict(temperature=1.0, top_p=0.9),
    ]
    for way in ways:
        settings = SamplingSettings(max_new_tokens=5, **way)
        found.append([len(answer.tokens) for answer in model.sample(TEXTS, settings, batch_size=2)])
    return found


def through_a_folder(gpu: FakeGpu, folder: str, kind: str, layout: dict[str, Any]) -> int:
    """Write a model folder, read it again, and convert its weights to fp32 on the way."""
    from nemo_steerlm.formats import model_folder

    model = steps.build(kind, layout)
    model.save_pretrained(Path(folder) / "model")
    again = steps.build(kind, layout, precision="fp32")
    again.load_weights(Path(folder) / "model")
    assert model_folder.read(Path(folder) / "model").kind == kind
    return sum(parameter.numel() for parameter in again.parameters())


@pytest.mark.parametrize(
    ("layout", "rank", "head", "pooling", "precision"),
    [
        (TP, 0, "regression", "last", "bf16"),
        (TP, 1, "distribution", "mean", "bf16"),
        (PP, 0, "regression", "mean", "bf16"),
        (PP, 3, "ordinal", "last", "fp32"),
        (PP, 3, "regression", "mean", "fp32"),
        (TP, 0, "generative", "last", "bf16"),
    ],
    ids=str,
)
def test_reading(room: Room, layout: dict, rank: int, head: str, pooling: str, precision: str) -> None:
    job: dict[str, Any] = dict(layout=layout, head=head, pooling=pooling, precision=precision)
    found = room.run(read, rank=rank, world=4, **job)
    assert all(shape == [3, 3] or shape == [3, 5] for shape in found["shapes"])


@pytest.mark.parametrize(("layout", "rank", "precision"), [(TP, 0, "bf16"), (PP, 0, "bf16"), (PP, 1, "fp32")], ids=str)
def test_generation(room: Room, layout: dict, rank: int, precision: str) -> None:
    assert room.run(generate, rank=rank, world=2, layout=layout, precision=precision) == [[5, 5, 5]] * 4


@pytest.mark.parametrize(("kind", "layout"), [("regressor", TP), ("policy", PP)], ids=str)
def test_model_folder(room: Room, tmp_path: Path, kind: str, layout: dict) -> None:
    assert room.run(through_a_folder, world=2, folder=str(tmp_path), kind=kind, layout=layout) > 0
