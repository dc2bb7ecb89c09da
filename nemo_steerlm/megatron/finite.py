"""Weights that are not finite are useless: they are neither written nor loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_steerlm.errors import CheckpointError
from nemo_steerlm.megatron.parallel import device

DIVERGED = "the training diverged: lower optimizer.lr and start from an earlier checkpoint"
DAMAGED = "it is damaged, or its training diverged: take another one"


def parameters(chunks: list[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's weights with their names."""
    for chunk in chunks:
        yield from chunk.named_parameters()


def stored(state: dict[str, dict[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of this rank in a `checkpoint.model_state`, with their names in the checkpoint."""
    for part in state.values():
        yield from ((entry.key, entry.data) for entry in part.values() if isinstance(entry.data, torch.Tensor))


@torch.no_grad()
def check(where: Path | str, tensors: Iterable[tuple[str, torch.Tensor]], advice: str) -> None:
    """Refuse a NaN or an infinity in this rank's tensors; all ranks call it and agree.

    Reads every value once, makes no copy, and waits for the device once.

    Args:
        where: the folder they are read from or written to; the message begins with it.
        tensors: with their names.
        advice: what to do; the message ends with it.

    Raises:
        CheckpointError: on every rank.
    """
    floats = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    ends = [torch.stack(tensor.aminmax()).isfinite().all().logical_not() for _, tensor in floats]  # NaN propagates
    broken = torch.stack(ends).any().float() if ends else torch.zeros((), device=device())
    dist.all_reduce(broken, op=dist.ReduceOp.MAX)
    if not broken:
        return
    mine = [name for (name, _), end in zip(floats, ends, strict=True) if end]
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, mine)
    found = sorted({name for part in names for name in part})
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    raise CheckpointError(f"{where}: weights that are not finite ({found[0]}{more}); {advice}")
