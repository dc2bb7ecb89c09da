"""Sums and tables over the ranks of a job."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_steerlm.data.units import EMPTY
from nemo_steerlm.megatron import parallel


def totals(kept: list[dict[str, Any]]) -> tuple[float | torch.Tensor, float | torch.Tensor]:
    """Sum and count over the last stage's results of all micro-batches, on the device; 0 on the other stages."""
    if not kept:
        return 0.0, 0.0
    total, count = (torch.stack([k[name] for k in kept]).double().sum() for name in ("sum", "count"))
    return total, count


def sum_over_ranks(
    *values: float | torch.Tensor, on_last_stage: bool, beside: float | torch.Tensor | None = None
) -> list[float]:
    """Sum numbers over data-parallel ranks; every rank gets the sums.

    Only the last pipeline stage knows losses (`on_last_stage`), and tensor-parallel ranks all know the same ones.
    Waits for the device once: `beside`, a number that every rank has already, is read together with the sums. Where it
    is not finite on one rank, all get NaN.
    """
    table = torch.zeros(len(values) + (beside is not None), dtype=torch.float64, device=parallel.device())
    if on_last_stage:
        for place, value in enumerate(values):
            table[place] = value
        table /= parallel_state.get_tensor_model_parallel_world_size()
    if beside is not None:
        table[-1] = beside * 0  # a NaN where it is not finite
    dist.all_reduce(table)
    if beside is not None:
        table[-1:] += beside
    return table.tolist()


def rows_over_ranks(indices: list[torch.Tensor], rows: list[torch.Tensor], width: int) -> np.ndarray:
    """The rows of all ranks, by the index of their sample, as one table on every rank.

    Args:
        indices: of the samples, `[n]` each, `EMPTY` for none; empty lists on a rank that holds no rows.
        rows: of these samples, `[n, width]` each.
        width: columns.

    Returns:
        float64 `[samples, width]` in the order of the indices: the same for every layout.
    """
    index = torch.cat(indices) if indices else torch.full((1,), EMPTY, device=parallel.device())
    last = index.max()
    dist.all_reduce(last, op=dist.ReduceOp.MAX)
    table = torch.zeros(int(last) + 1, 1 + width, dtype=torch.float64, device=parallel.device())
    if rows and parallel_state.get_tensor_model_parallel_rank() == 0:  # tensor-parallel ranks all know the same rows
        real = index != EMPTY
        table[index[real], 0] = 1.0
        table[index[real], 1:] = torch.cat(rows)[real].double()
    dist.all_reduce(table)  # one rank's values and zeros: exact
    assert not (table[:, 0] > 1).any(), "a sample was validated twice"
    return table[table[:, 0] > 0, 1:].cpu().numpy()
