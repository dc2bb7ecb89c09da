"""Steps of a model without Lightning's loop, as one rank of a job takes them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def prepare(model: Any) -> None:
    """Make a model ready for `train` after `begin`, as Lightning does."""
    model.configure_model()
    shim = model.configure_optimizers()
    model.train()
    model.optimizers = lambda: SimpleNamespace(optimizer=shim, step=shim.step)  # Lightning's wrapper
    model.log = model.log_dict = lambda *_, **__: None
    model._trainer = SimpleNamespace(global_step=0)


def train(model: Any, micro_batches: list[Any]) -> None:
    """One optimizer step."""
    model.training_step(micro_batches, model.trainer.global_step)
    model.trainer.global_step += 1


def speak_for_the_last_stage() -> None:
    """Let the sums over ranks be those of this stage: the last one, which knows them, is absent."""
    from nemo_steerlm.megatron import reductions
    from nemo_steerlm.models import training
    from nemo_steerlm.train import tasks

    real = reductions.sum_over_ranks
    readers: list[Any] = [training, tasks]
    for module in readers:
        module.sum_over_ranks = lambda *values, **rest: real(*values, **{**rest, "on_last_stage": True})
