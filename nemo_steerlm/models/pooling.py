"""Pooling of a regressor: the last token of a text, or the mean of all its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pool(output: torch.Tensor, first: torch.Tensor, last: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pooled raw outputs of each text, `[n, R]`.

    The mean is taken after the layer, which equals the mean before it: the layer is linear. It is over all tokens of
    the text, history included, as the reference's `use_avg_pool`.

    Args:
        output: `[tokens, R]`, texts one after another, possibly with padding in between.
        first, last: places of each text's first and last token, `[n]`, rising.
        pooling: "last" or "mean".
    """
    if pooling == "last":
        return output[last]
    places = torch.arange(len(output), device=output.device)
    owner = torch.searchsorted(last, places).clamp(max=len(last) - 1)
    inside = (places >= first[owner]) & (places <= last[owner])
    kept = torch.where(inside[:, None], output, 0.0)
    sums = output.new_zeros(len(last), output.shape[1]).index_add(0, owner, kept)
    return sums / (last - first + 1)[:, None]


def pool_whole_texts(output: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """As `pool` with "mean" where the host knows the lengths and there is no padding; bitwise reproducible."""
    return torch.stack([text.mean(0) for text in output.split(list(lengths))])
