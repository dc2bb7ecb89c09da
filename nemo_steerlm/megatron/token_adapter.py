"""Trained embeddings of some tokens beside a frozen vocabulary: those of the attribute tokens.

A pretrained model reacts to a new token once its embedding has moved by about its own norm, which takes long at the
learning rate of the other weights. So the adapter holds `D` `[tokens, hidden]`, zero at first, and the embedding is

    E[token] + SPEED * rms(E) * D[token]

Where embedding and vocabulary projection are tied, the adapter also changes the logits, as the merged matrix would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor

#: Norms of a typical embedding by which one moves in 1 / optimizer.lr steps of AdamW.
SPEED = 75.0


class TokenAdapter(torch.nn.Module):
    """The adapter of one model chunk, replicated on all tensor-parallel ranks.

    Attributes:
        rows: `D`, `[tokens, hidden]`.
    """

    places: torch.Tensor  # `[vocab_size]`: 1 + the row of a token, 0 where it has none
    own: torch.Tensor  # rows of `D` whose logits are this rank's
    columns: torch.Tensor  # where these stand among its logits

    def __init__(self, chunk: Any, tokens: Sequence[int], vocab_size: int) -> None:
        super().__init__()
        weight = _weight(chunk)
        self.rows = torch.nn.Parameter(weight.new_zeros(len(tokens), weight.shape[1]))
        first = parallel_state.get_tensor_model_parallel_rank() * len(weight)
        self.scale = SPEED * _rms(weight[: max(0, vocab_size - first)], vocab_size)
        places = torch.zeros(vocab_size, dtype=torch.long)
        places[list(tokens)] = torch.arange(1, len(tokens) + 1)
        self.register_buffer("places", places.to(weight.device), persistent=False)
        own = [(i, token - first) for i, token in enumerate(tokens) if 0 <= token - first < len(weight)]
        numbers = torch.tensor(own, dtype=torch.long, device=weight.device).view(-1, 2)
        self.register_buffer("own", numbers[:, 0], persistent=False)
        self.register_buffer("columns", numbers[:, 1], persistent=False)

    def embedded(self, embedding: Any, tokens: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The output of the word embedding for `tokens` `[batch, seq]` with this adapter added."""
        rows = F.pad(self.rows * self.scale, (0, 0, 1, 0))
        more = F.embedding(self.places[tokens], rows)
        if embedding.reduce_scatter_embeddings:  # [seq / tp, batch, hidden]
            more = tensor_parallel.scatter_to_sequence_parallel_region(more.transpose(0, 1).contiguous())
        return output + more

    def projected(self, projection: Any, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """This rank's logits of `x` `[seq, batch, hidden]` with this adapter added."""
        if projection.sequence_parallel:
            x = tensor_parallel.gather_from_sequence_parallel_region(x)
        else:
            x = tensor_parallel.copy_to_tensor_model_parallel_region(x)
        rows = tensor_parallel.copy_to_tensor_model_parallel_region(self.rows)[self.own] * self.scale
        return logits.index_add_(-1, self.columns, F.linear(x, rows).to(logits.dtype))

    @torch.no_grad()
    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """This rank's part of the vocabulary with the adapter merged, computed in fp32."""
        changed = weight.to(torch.float32, copy=True)
        changed[self.columns] += self.scale * self.rows[self.own].float()
        return changed.to(weight.dtype)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """`D` in the distributed format; the copies of other ranks and of the last stage are replicas."""
        copy = int(getattr(self.rows, "shared", False))
        rank = parallel_state.get_tensor_model_parallel_rank()
        replica = (copy, rank, metadata["dp_cp_group"].rank())
        key = f"{prefix}rows"
        return {key: ShardedTensor.from_rank_offsets(key, self.rows, replica_id=replica)}


def add(chunks: list[Any], tokens: Sequence[int], vocab_size: int) -> None:
    """Give these tokens of a model whose other weights are frozen an adapter; a second call changes nothing."""
    for chunk in chunks:
        tied = chunk.share_embeddings_and_output_weights
        if not (chunk.pre_process or (chunk.post_process and tied)) or hasattr(chunk, "token_adapter"):
            continue
        adapter = chunk.token_adapter = TokenAdapter(chunk, tokens, vocab_size)
        if tied and not (chunk.pre_process and chunk.post_process):
            # The distributed optimizer shards both copies alike; `sum_copies` adds up their gradients.
            rows: Any = adapter.rows
            rows.shared_embedding, rows.shared = True, not chunk.pre_process
        if chunk.pre_process:
            chunk.embedding.word_embeddings.register_forward_hook(
                lambda embedding, inputs, output, adapter=adapter: adapter.embedded(embedding, inputs[0], output)
            )
        if chunk.post_process and tied:
            chunk.output_layer.register_forward_hook(
                lambda projection, inputs, output, adapter=adapter: (
                    adapter.projected(projection, inputs[0], output[0]), *output[1:],
                )
            )  # fmt: skip


def sum_copies(chunks: list[Any]) -> None:
    """Add up the gradients of the first and the last pipeline stage, which hold the same rows."""
    for module in (module for chunk in chunks for module in chunk.modules() if isinstance(module, TokenAdapter)):
        rows: Any = module.rows
        if getattr(rows, "shared_embedding", False):
            dist.all_reduce(rows.main_grad, group=parallel_state.get_embedding_group())


def merge(chunk: Any, part: dict[str, Any]) -> None:
    """Merge the adapter of a chunk, if it has one, into the vocabulary of its sharded state."""
    if part.pop("token_adapter.rows", None) is None:
        return
    tied = chunk.share_embeddings_and_output_weights
    for name in ["embedding.word_embeddings.weight"] + ["output_layer.weight"] * tied:
        if name in part:
            part[name] = dataclasses.replace(part[name], data=chunk.token_adapter.merged(_weight(chunk)))


def _weight(chunk: Any) -> torch.Tensor:
    """This rank's rows of the vocabulary, `[vocabulary / tp, hidden]`."""
    if chunk.pre_process:
        return chunk.embedding.word_embeddings.weight
    return chunk.shared_embedding_or_output_weight()


def _rms(own: torch.Tensor, vocab_size: int) -> float:
    """Root of the mean square of the whole vocabulary's numbers."""
    squares = own.float().square().sum()
    dist.all_reduce(squares, group=parallel_state.get_tensor_model_parallel_group())
    return float(squares / (vocab_size * own.shape[1])) ** 0.5
