"""A loss, a gradient or a weight that is not finite: the step is skipped, the run ends, nothing bad is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_steerlm.config import ParallelConfig
from nemo_steerlm.errors import CheckpointError
from nemo_steerlm.megatron import finite
from tests.distributed import run_distributed
from tests.models.helpers import OPTIMIZER, make_model, make_task, train
from tests.models.test_average import stored_tensors

SAMPLE = 13  # in step 2 alone of the first three


def _nan_loss(total: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return total * float("nan")


def _nan_gradient(total: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return total + torch.sqrt(output.sum() * 0)  # the root's slope at 0 is infinite, times 0


def _poison(bad: Callable, samples: set[int] | None = None) -> Callable[[Any], Any]:
    """A task whose loss of micro-batches with one of the samples (None: of all) is `bad`."""

    def task_of(model: Any) -> Any:
        task = make_task(model)
        loss = task.loss

        def poisoned(output: torch.Tensor, batch: dict) -> tuple:
            total, *rest = loss(output, batch)
            hit = samples is None or samples & set(batch["indices"].tolist())
            return bad(total, output) if hit and model.training else total, *rest

        task.loss = poisoned
        return task

    return task_of


def _same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def bad_trainings(folder: str) -> dict:
    """In two processes: one bad step at several layouts, and a training that has nothing else."""
    import torch.distributed as dist

    root = Path(folder)
    found: dict[str, Any] = {}
    optimizer = {k: getattr(OPTIMIZER, k) for k in ("lr", "warmup_steps", "schedule")}
    runs: dict[str, tuple] = {
        "dp2": ({}, _nan_loss, {}),
        "dp2, overlap, average": ({}, _nan_loss, {"optimizer": {**optimizer, "overlap": True, "ema_decay": 0.5}}),
        "dp2, not distributed": ({}, _nan_loss, {"optimizer": {**optimizer, "distributed": False}}),
        "tp2": ({"tensor": 2}, _nan_loss, {}),
        "pp2": ({"pipeline": 2}, _nan_gradient, {}),
    }
    for name, (layout, bad, settings) in runs.items():
        lines = train(
            "policy", root / name, init=None, parallel=ParallelConfig(**layout), steps=3, checkpoint_every=1,
            validate=False, make_task=_poison(bad, {SAMPLE}), **settings,
        )  # fmt: skip
        states = [stored_tensors(root / name / f"checkpoints/step-{step:08d}") for step in (2, 3)]
        found[name] = {
            "losses": [line["train/loss"] is not None for line in lines],
            "norms": [line["train/grad_norm"] is not None for line in lines],
            "counted": [line["train/bad_steps"] for line in lines],
            "moved": not _same(*states),
        }
    settings = {"init": None, "parallel": ParallelConfig(), "validate": False}
    train(  # its two steps are the two checkpoints that are kept
        "policy", root / "still", steps=2, checkpoint_every=1, make_task=_poison(_nan_loss, {SAMPLE}),
        optimizer={**optimizer, "ema_decay": 0.5}, **settings,
    )  # fmt: skip
    found["still"] = _same(*(stored_tensors(root / f"still/checkpoints/step-{step:08d}") for step in (1, 2)))
    message = ""
    try:
        train("policy", root / "end", steps=5, checkpoint_every=3, make_task=_poison(_nan_loss), **settings)
    except ValueError as error:
        message = f"{type(error).__name__}: {error}"
    found["messages"] = [None] * dist.get_world_size()
    dist.all_gather_object(found["messages"], message)
    found["checkpoints"] = sorted(map(str, (root / "end/checkpoints").glob("*")))
    found["again"] = len(train("policy", root / "again", steps=2, **settings))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run_distributed(bad_trainings, 2, folder=str(tmp_path_factory.mktemp("bad")))


@pytest.mark.parametrize("name", ["dp2", "dp2, overlap, average", "dp2, not distributed", "tp2", "pp2"])
def test_a_step_that_is_bad_on_one_rank_is_skipped_on_all_and_counted(found: dict, name: str) -> None:
    run = found[name]
    assert run["losses"] == ([True, True, True] if name == "pp2" else [True, False, True])
    assert run["norms"] == [True, False, True]
    assert run["counted"] == [0, 1, 1]
    assert run["moved"]


def test_a_skipped_step_changes_neither_weights_nor_the_optimizers_state_nor_the_average(found: dict) -> None:
    assert found["still"]


def test_bad_steps_in_a_row_end_the_training_before_a_checkpoint(found: dict) -> None:
    assert found["messages"][0] == found["messages"][1]
    kind, step, rest = found["messages"][0].split(": ", 2)
    assert (kind, step) == ("DataError", "step 3")
    assert "the samples 0, 1, 2, 3, 16, 17, 18, 19 of the training data" in rest
    assert "after 3 such steps in a row (trainer.max_bad_steps)" in rest
    assert found["checkpoints"] == []


def test_the_same_process_can_train_again(found: dict) -> None:
    assert found["again"] == 2


def _broken(model: Any) -> None:
    """A NaN where no loss sees it: in a row of the embedding that stands for no token."""
    with torch.no_grad():
        model.chunks[0].embedding.word_embeddings.weight[505] = float("nan")


def broken_models(folder: str) -> dict:
    """In one process: the ways to write and load a model that is not finite."""
    from nemo_steerlm.megatron import parallel

    root, one, messages = Path(folder), ParallelConfig(), {}
    parallel.initialize(one, seed=1)
    model = make_model("regressor", one)
    model.build()
    _broken(model)

    def attempt(name: str, function: Callable[[], Any]) -> None:
        try:
            function()
        except CheckpointError as error:
            messages[name] = str(error)

    attempt("write", lambda: model.save_pretrained(root / "model"))
    left = [path.name for path in root.iterdir()]
    own, finite.check = finite.check, lambda *_: None  # as an earlier version wrote it
    model.save_pretrained(root / "earlier")
    finite.check = own
    attempt("load", lambda: make_model("regressor", one).load_weights(root / "earlier"))
    settings = dict(init=None, parallel=one, steps=2, checkpoint_every=1, validate=False, prepare=_broken)
    attempt("checkpoint", lambda: train("regressor", root / "run", **settings))  # type: ignore[arg-type]
    return {**messages, "left": left + [path.name for path in (root / "run/checkpoints").glob("*")]}


def test_a_model_that_is_not_finite_is_neither_written_nor_loaded(tmp_path: Path) -> None:
    found = run_distributed(broken_models, 1, folder=str(tmp_path))
    what = "weights that are not finite (embedding.word_embeddings.weight); "
    assert found == {
        "write": f"{tmp_path}/model is not written: {what}{finite.DIVERGED}",
        "load": f"{tmp_path}/earlier: {what}{finite.DAMAGED}",
        "checkpoint": f"{tmp_path}/run/checkpoints/step-00000001 is not written: {what}{finite.DIVERGED}",
        "left": [],
    }
