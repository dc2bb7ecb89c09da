"""Forward of texts without gradients, at any pipeline depth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state

from nemo_steerlm.data.prefixes import SharedRow
from nemo_steerlm.megatron import parallel
from nemo_steerlm.megatron.decoding import forward, to_device
from nemo_steerlm.megatron.gpt import LanguageModel
from nemo_steerlm.megatron.layers import has_flash_attention, packed_attention

# Queries of one call of SDPA: a CPU's kernel computes the masked half too, wherever there are fewer than 512 keys.
_BLOCK = 64
# Tokens of a forward pass: enough to keep a GPU busy, few enough for a CPU's cache.
_BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}
_Text = tuple[np.ndarray, int]  # the places of its tokens, and how many of the last of them are queries
_Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def batch_tokens_by_default() -> int:
    """Tokens of a forward pass that suit the device."""
    return _BATCH_TOKENS[parallel.device().type]


def read(model: LanguageModel, row: SharedRow, everywhere: bool = False) -> torch.Tensor | None:
    """Run all texts of a row in one forward; use it under `serving(model)`.

    A token attends to its own text up to itself, as if its text were alone. The last layer is computed at the last
    token of each text only, or `everywhere`. Nothing waits for the device.

    Returns:
        The final norm's output after the last token of each text, `[texts of the row, hidden]`, or after every token
        of the row, `[tokens, hidden]`; None before the last pipeline stage.
    """
    device, final = next(model.parameters()).device, len(model.decoder.layers) - 1
    within, at_end = _attention(row, row.own, model), _attention(row, [1] * len(row.paths), model)

    def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ends = model.post_process and layer == final and not everywhere
        return (at_end if ends else within)(query, key, value)

    cos, sin = model.rotation(to_device(row.positions, device))
    chosen = None if everywhere else to_device([path[-1] for path in row.paths], device)
    hidden = forward(model, to_device(row.tokens, device)[None], cos, sin, attend, chosen)
    return None if hidden is None else model.decoder.final_layernorm(hidden)[:, 0]


def broadcast_from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """Give every pipeline stage the last stage's `tensor` (same shape and type everywhere, filled in place)."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(tensor, source, group=parallel_state.get_pipeline_model_parallel_group())
    return tensor


def _attention(row: SharedRow, counts: list[int], model: LanguageModel) -> _Attention:
    """Attention from the last `counts[i]` tokens of each text i to that text, causally.

    The result takes queries `[sum of counts, 1, n, d]`, text after text, and the row's keys and values
    `[tokens, 1, g, d]`; it returns `[sum of counts, 1, n * d]`.
    """
    parameter = next(model.parameters())
    scale = model.decoder.layers[0].self_attention.core_attention.scale
    texts = [(path, count) for path, count in zip(row.paths, counts, strict=True) if count]
    kind = _flash_attention if has_flash_attention(parameter) else _blockwise_attention
    return kind(texts, scale, parameter)


def _blockwise_attention(texts: list[_Text], scale: float | None, like: torch.Tensor) -> _Attention:
    """Text by text in blocks of queries, in any type on any device."""
    plan, start = [], 0
    longest = _BLOCK + max(len(path) for path, _ in texts)
    ahead = like.new_full((_BLOCK, _BLOCK), -torch.inf).triu_(1)  # lines up the last query with the last key:
    masks = torch.cat((like.new_zeros(_BLOCK, longest - _BLOCK), ahead), 1)  # a block's mask is its lower right part
    for path, count in texts:
        stretch = bool(path[-1] - path[0] + 1 == len(path))
        keys = slice(path[0], path[-1] + 1) if stretch else to_device(path, like.device)
        blocks, shared = [], len(path) - count
        for first in range(0, count, _BLOCK):
            size = min(_BLOCK, count - first)
            seen = shared + first + size
            mask = masks[_BLOCK - size :, longest - seen :] if size > 1 else None
            blocks.append((slice(start + first, start + first + size), seen, mask))
        plan.append((keys, blocks))
        start += count

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        grouped = query.shape[2] != key.shape[2]
        out = torch.empty_like(query)
        for keys, blocks in plan:
            seen_keys = key[keys] if isinstance(keys, slice) else key.index_select(0, keys)
            seen_values = value[keys] if isinstance(keys, slice) else value.index_select(0, keys)
            for own, seen, mask in blocks:
                q, k, v = (x.permute(1, 2, 0, 3) for x in (query[own], seen_keys[:seen], seen_values[:seen]))
                read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
                out[own] = read.permute(2, 0, 1, 3)
        return out.flatten(2)

    return attend


def _flash_attention(texts: list[_Text], scale: float | None, like: torch.Tensor) -> _Attention:
    """All texts at once on CUDA."""
    counts, lengths = [count for _, count in texts], [len(path) for path, _ in texts]
    places = to_device(np.concatenate([path for path, _ in texts]), like.device)
    query_bounds, key_bounds = (
        to_device(np.cumsum([0, *sizes], dtype=np.int32), like.device) for sizes in (counts, lengths)
    )
    longest = max(counts), max(lengths)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return packed_attention(query, key[places], value[places], query_bounds, key_bounds, longest, scale)

    return attend
