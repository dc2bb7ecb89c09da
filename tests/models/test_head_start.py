"""A new regression head that starts at given values: the same head at every layout, and it does say these values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_steerlm.config import ParallelConfig
from tests.distributed import run_distributed
from tests.models.helpers import make_batches, make_model, random_items

VALUES = [3.0, -1.0, 0.5]
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": dict(),
    "tp2+sp": dict(tensor=2, sequence=True),
    "pp2+vpp2": dict(pipeline=2, virtual_pipeline=2),
}


def begin(model: Any, batches: Any) -> None:
    """Begin a training whose head starts at `VALUES`."""
    from nemo_steerlm.train.tasks import RegressionTask

    model.begin(RegressionTask(model, start=torch.tensor(VALUES)), batches, bad_steps=None)


def start(folder: str, layout: ParallelConfig, pack_length: int | None = None) -> tuple[Any, Any]:
    """A model whose head was just moved, and its weights (None on stages without a head)."""
    from nemo_steerlm.megatron import checkpoint, parallel

    parallel.initialize(layout, seed=1)
    model = make_model("regressor", layout)
    model.build()
    if not Path(folder, "metadata.json").is_file():
        checkpoint.save(Path(folder), checkpoint.model_state(model.chunks))
    checkpoint.load_model_state(model.chunks, checkpoint.load(Path(folder), checkpoint.model_state(model.chunks)))
    cut: dict[str, Any] = dict(micro_batch_size=2, parallel=layout, pack_length=pack_length)
    begin(model, make_batches("regressor", random_items("regressor", 8), steps=1, **cut))
    return model, next((c.score.weight.detach() for c in model.chunks if hasattr(c, "score")), None)


def start_everywhere(folder: str) -> dict[str, Any]:
    """In both processes: the head's weights at each layout, from the last stage."""
    import torch.distributed as dist

    found = {}
    for name, sizes in LAYOUTS.items():
        weights: list[Any] = [None, None]
        weight = start(folder, ParallelConfig(**sizes))[1]
        dist.all_gather_object(weights, None if weight is None else weight.tolist())
        found[name] = weights
    return found


def test_the_head_starts_at_the_values_at_every_layout(tmp_path: Path) -> None:
    folder = str(tmp_path / "init")
    model, weight = start(folder, ParallelConfig())
    texts = [item["tokens"] for item in random_items("regressor", 8)]
    predicted = model.predict(texts)
    np.testing.assert_allclose(predicted.mean(0), VALUES, atol=1e-4)
    assert np.abs(predicted - VALUES).max() < 2.5 and model.average is None
    packed = start(folder, ParallelConfig(), pack_length=64)[1]
    torch.testing.assert_close(packed, weight, rtol=0, atol=1e-5)
    for name, weights in run_distributed(start_everywhere, 2, folder=folder).items():
        assert weights[1] is not None, name
        for found in filter(None, weights):
            torch.testing.assert_close(torch.tensor(found), weight, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_the_moving_average_starts_there_too(tmp_path: Path, decay: float | None) -> None:
    from omegaconf import OmegaConf

    from nemo_steerlm.megatron import parallel

    parallel.initialize(ParallelConfig(), seed=1)
    model = make_model("regressor", ParallelConfig())
    OmegaConf.update(model.cfg, "optimizer.ema_decay", decay)
    model.build()
    items = random_items("regressor", 8)
    begin(model, make_batches("regressor", items, steps=1, micro_batch_size=2, parallel=ParallelConfig()))
    weight = model.chunks[0].score.weight
    assert model.training
    if decay is not None:
        assert model.average is not None and torch.equal(model.average.values[weight], weight)
