"""An exponential moving average of the trained weights, which a run can write to `model/`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from nemo_steerlm.megatron import checkpoint


class WeightAverage:
    """`average = decay * average + (1 - decay) * weight` after each step, in fp32, of this rank's weights.

    Args:
        decay: weight of the previous average; 0.999 averages over about the last thousand steps.
    """

    def __init__(self, chunks: list[Any], decay: float) -> None:
        self.chunks, self.decay = chunks, decay
        self.values = {p: p.detach().float().clone() for c in chunks for p in c.parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current weights."""
        for parameter, average in self.values.items():
            average.lerp_(parameter.float(), 1 - self.decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model computes with, and is saved with, the averages."""
        weights = {parameter: parameter.detach().clone() for parameter in self.values}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(weights)

    @staticmethod
    @torch.no_grad()
    def _put(values: dict[torch.nn.Parameter, torch.Tensor]) -> None:
        for parameter, value in values.items():
            parameter.copy_(value)

    def sharded_state(self) -> dict[str, Any]:
        """The averages, sharded like the weights in `checkpoint.training_state`."""
        state = checkpoint.training_state(self.chunks)
        return {
            part: {name: self._entry(entry) for name, entry in entries.items() if entry.data in self.values}
            for part, entries in state.items()
        }

    def _entry(self, entry: Any) -> Any:
        changes = {"key": f"average.{entry.key}", "data": self.values[entry.data]}
        if isinstance(entry, ShardedTensor):
            changes["dtype"] = torch.float32
        return dataclasses.replace(entry, **changes)

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Take a loaded `sharded_state`."""
        for chunk, part in zip(self.chunks, state.values(), strict=True):
            parameters = dict(chunk.named_parameters())
            for name, value in part.items():
                self.values[parameters[name]].copy_(value)
