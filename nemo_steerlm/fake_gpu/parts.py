"""Which part of a training allocates what: the project's own functions, each known by what it makes."""

from __future__ import annotations

import functools
from typing import Any

from nemo_steerlm.fake_gpu.mode import FakeGpu
from nemo_steerlm.megatron import gpt, lora, optim, token_adapter
from nemo_steerlm.megatron.average import WeightAverage
from nemo_steerlm.models.base import MegatronModel
from nemo_steerlm.train.strategy import MegatronStrategy

PARAMETERS, GRADIENTS, OPTIMIZER, AVERAGE = "parameters", "gradient buffers", "optimizer", "average"
ACTIVATIONS, CHECKPOINT, OTHER = "activations", "checkpoint", "other"


def install() -> None:
    """Let the memory of every FakeGpu name its parts."""
    _label(gpt, "build", PARAMETERS)
    _label(optim, "wrap", GRADIENTS)
    _label(optim, "build", OPTIMIZER)
    _label(lora, "add", PARAMETERS)
    _label(token_adapter, "add", PARAMETERS)
    _label(WeightAverage, "__init__", AVERAGE)
    _label(MegatronModel, "run", ACTIVATIONS)
    _label(MegatronStrategy, "_sharded_state", CHECKPOINT)


def _label(owner: Any, name: str, part: str) -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def labelled(*args: Any, **kwargs: Any) -> Any:
        assert FakeGpu.active is not None
        memory = FakeGpu.active.memory
        with memory.of(part):
            made = function(*args, **kwargs)
        if name == "wrap":  # the distributed optimizer lets the weights live in buffers of their own
            memory.move((weight for chunk in made for weight in chunk.parameters()), PARAMETERS)
        if name == "build" and part == OPTIMIZER:  # it makes the moments in its first step
            made.step = functools.wraps(made.step)(_within(memory, part, made.step))
        return made

    setattr(owner, name, labelled)


def _within(memory: Any, part: str, function: Any) -> Any:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with memory.of(part):
            return function(*args, **kwargs)

    return inside
