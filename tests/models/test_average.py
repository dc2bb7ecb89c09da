"""The moving average of the weights: its numbers, its way through checkpoints, and that model/ holds it."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from nemo_steerlm.config import ParallelConfig
from tests.distributed import run_distributed
from tests.models.helpers import make_model, train


def initial_weights(root: Path) -> dict:
    """Write the weights all runs start from; the settings of a run of two steps."""
    from nemo_steerlm.megatron import checkpoint, parallel

    one = ParallelConfig()
    parallel.initialize(one, seed=1)
    model = make_model("policy", one)
    model.build()
    checkpoint.save(root / "init", checkpoint.model_state(model.chunks))
    optimizer = {"lr": 1e-2, "warmup_steps": 0, "ema_decay": 0.75}
    return dict(init=root / "init", parallel=one, steps=2, validate=False, optimizer=optimizer)


def stored_tensors(path: Path) -> dict:
    """The tensors of a checkpoint or of a model folder's weights, by name."""
    import torch
    from megatron.core import dist_checkpointing

    tensors = dist_checkpointing.load_plain_tensors(str(path))
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


def train_with_average(folder: str) -> dict:
    """In one process: two steps and their averages; the second step again from the first's checkpoint."""
    import torch

    root = Path(folder)
    found: dict[str, Any] = {}
    settings = {**initial_weights(root), "checkpoint_every": 1}

    def write(model) -> None:
        before = [p.detach().clone() for p in model.chunks[0].parameters()]
        model.save_pretrained(root / "model")
        found["restored"] = all(torch.equal(a, b) for a, b in zip(before, model.chunks[0].parameters(), strict=True))

    train("policy", root / "run", inspect=write, **settings)

    def stored(path: str, prefix: str = "") -> dict[str, torch.Tensor]:
        tensors = stored_tensors(root / path)
        names = [n for n in tensors if n.startswith(prefix) and not n.startswith("optimizer")]
        return {n.removeprefix(prefix): tensors[n] for n in names if prefix or not n.startswith("average.")}

    expected = {name: weight.double() for name, weight in stored("init").items()}
    for step in ("run/checkpoints/step-00000001", "run/checkpoints/step-00000002"):
        for name, weight in stored(step).items():
            expected[name] = 0.75 * expected[name] + 0.25 * weight.double()
    written, kept = stored("model/weights"), stored("run/checkpoints/step-00000002", "average.")
    last = stored("run/checkpoints/step-00000002")
    found["names"] = expected.keys() == written.keys() == kept.keys()
    found["error"] = max(float((written[n] - expected[n]).abs().max()) for n in expected)
    found["kept"] = all(torch.equal(written[n], kept[n]) for n in expected)
    found["distance"] = max(float((last[n] - expected[n]).abs().max()) for n in expected)

    shutil.copytree(root / "run/checkpoints/step-00000001", root / "again/checkpoints/step-00000001")
    train("policy", root / "again", **settings)
    again = stored("again/checkpoints/step-00000002", "average.")
    found["resumed"] = all(torch.equal(again[n], kept[n]) for n in kept)
    train("policy", root / "run", inspect=lambda m: m.save_pretrained(root / "model-again"), **settings)
    reopened = stored("model-again/weights")
    found["reopened"] = all(torch.equal(reopened[n], kept[n]) for n in kept)
    return found


def test_the_average_is_written_kept_and_resumed(tmp_path: Path) -> None:
    found = run_distributed(train_with_average, 1, folder=str(tmp_path))
    assert found["names"] and found["error"] < 1e-6 < 1e-3 < found["distance"]
    assert found["kept"] and found["restored"] and found["resumed"] and found["reopened"]


def _save(folder: Path, model: Any) -> None:
    model.save_pretrained(folder)


def train_on_two(folder: str) -> dict:
    """Two data-parallel ranks, with the gathering of weights overlapped and not: what the runs leave on disk."""
    root, stored = Path(folder), {}
    settings = initial_weights(root)
    for name, extra in {"plain": {}, "overlap": {"overlap": True}}.items():
        settings["optimizer"] |= extra
        train("policy", root / name, inspect=partial(_save, root / name / "model"), **settings)
        for part in ("checkpoints/step-00000002", "model/weights"):
            stored[name, part] = stored_tensors(root / name / part)
    plain, overlap = ({k[1]: v for k, v in stored.items() if k[0] == name} for name in ("plain", "overlap"))
    return {p: max(float((plain[p][n] - overlap[p][n]).abs().max()) for n in plain[p]) for p in plain}


def test_overlapped_gathering_leaves_the_same_checkpoint_and_model(tmp_path: Path) -> None:
    assert all(error < 1e-6 for error in run_distributed(train_on_two, 2, folder=str(tmp_path)).values())
