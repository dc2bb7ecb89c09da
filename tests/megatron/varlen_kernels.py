"""Stand-ins for `torch.nn.attention.varlen.varlen_attn`, whose kernel needs a GPU: torch's signatures, dense sums.

What the arguments mean is from torch's documentation of 2.11 and 2.12: `cu_seq_*` are int32 bounds, `max_*` the
longest texts, `window_size` how many keys before and after a query it sees (-1: all), the last query beside the last
key.
"""

from __future__ import annotations

import torch


def torch_2_11(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, *, return_aux: None = None, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:  # fmt: skip
    """As many heads of keys and values as of queries."""
    assert query.shape[1:] == key.shape[1:] == value.shape[1:], (query.shape, key.shape, value.shape)
    return _dense(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), scale, window_size)


def torch_2_12(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, *, return_aux: None = None, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Fewer heads of keys and values only where the flag says so."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return _dense(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), scale, window_size)


def _dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int], scale: float | None, window: tuple[int, int],
) -> torch.Tensor:  # fmt: skip
    sizes = []
    for bound, tensor, most in zip(bounds, (query, key), longest, strict=True):
        assert bound.dtype == torch.int32 and bound[0] == 0 and bound[-1] == len(tensor)
        sizes.append(bound.diff().tolist())
        assert max(sizes[-1]) == most
    outs = []
    for q, k, v in zip(query.split(sizes[0]), key.split(sizes[1]), value.split(sizes[1]), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        offset = torch.arange(len(k)) - torch.arange(len(k) - len(q), len(k))[:, None]  # of a key from a query
        left, right = (len(k) if side < 0 else side for side in window)
        scores = scores.masked_fill((offset < -left) | (offset > right), -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outs)
