"""A language model with a key-value cache: one forward over its layers per step.

Megatron-core's own forward serves training: every layer checks for dropout, recomputation, offloading and fusions, and
computes RoPE's cosines. At one token a step these checks cost more than the matrix products of a small model.
`Decoder` calls the same embedding, norms, projections and MLPs, in the same order, and nothing else, so that tensor
parallelism and wrapped projections work as in training.

Shapes follow megatron-core: `s` sequence, `b` batch, `n` heads, `g` key/value groups, `d` head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_tensor_model_parallel_region,
)

from nemo_steerlm.errors import ConfigError
from nemo_steerlm.megatron import patches
from nemo_steerlm.megatron.gpt import LanguageModel
from nemo_steerlm.megatron.layers import rotate

# Capacity grows by this many positions or a quarter, whichever is more.
_BLOCK = 64
# This share of a GPU stays free: workspaces of kernels, buffers of collectives, fragmentation.
_KEPT_FREE = 0.05
# What a logit takes while tokens are drawn: it in bf16 and fp32, and in float64 its weight, its border, their sort.
_DRAW_BYTES = 64
# Attention reads this many positions or a multiple: few shapes, and aligned rows of the bias for CUDA's kernels.
_STRIDE = 16

# Arguments of a linear's product that matter for its backward pass, or for layouts that inference does not have.
_TRAINING = {
    "gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel", "tp_group", "grad_output_buffer",
    "wgrad_deferral_limit", "gtp_remat_size",
}  # fmt: skip
_LINEARS = "megatron.core.tensor_parallel.layers"
_LINEARS_EFFECT = "inference prepares a backward pass in every linear layer, which is slower"

# (number of the layer in this stage, query, key, value) -> what is attended to, `[s, b, n * d]`
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def serving(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode and no gradients inside, and linears that prepare nothing for a backward pass.

    megatron-core 0.16.1 to 0.19.2, tensor_parallel/layers.py: `_forward_impl` (lines 948 and 1239 of 0.16.1) is its
    private name for a linear's product without its communication, and prepares a backward pass without gradients too.
    Remove when it does not.
    """
    training = model.training
    linears = [m for m in model.modules() if isinstance(m, (ColumnParallelLinear, RowParallelLinear))]
    if not all(hasattr(linear, "_forward_impl") for linear in linears):
        patches.leave(_LINEARS, "they have no _forward_impl", _LINEARS_EFFECT)
        linears = []
    model.eval()
    for linear in linears:
        linear._forward_impl = _product(linear._forward_impl)
    try:
        with torch.inference_mode():
            yield
    finally:
        for linear in linears:
            del linear._forward_impl
        model.train(training)


def _product(own: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The plain product of the linear whose `_forward_impl` is `own`; with unknown arguments `own` is called."""

    def product(
        input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if args or not kwargs.keys() <= _TRAINING:
            patches.leave(_LINEARS, f"unknown arguments: {[*args, *kwargs.keys() - _TRAINING]}", _LINEARS_EFFECT)
            return own(input, weight, bias, *args, **kwargs)
        return F.linear(input, weight, bias)

    return product


def to_device(values: np.ndarray | Sequence[int], device: torch.device) -> torch.Tensor:
    """Send numbers to the device without waiting for its pending work."""
    return torch.as_tensor(values).to(device, non_blocking=True)


class Decoder:
    """This rank's stage of a language model, with a cache of `slots` independent rows.

    A slot's tokens begin at position 0, so a row that joins or leaves moves no other. Keys are cached after RoPE: a
    step rotates one position, not the past. The positions of one head are contiguous, as a step reads little else.
    Memory is `slots` times the longest row, in blocks: on CUDA it is allocated at once, so that the room found by
    `slots_that_fit` suffices; on a CPU it grows with the rows.

    Use it under `serving(model)`.

    Attributes:
        lengths: tokens in each slot `[slots]`; the same on all ranks.
        capacity: positions there is memory for.
    """

    def __init__(self, model: LanguageModel, slots: int, vocab_size: int, longest: int) -> None:
        """Make an empty cache.

        Args:
            model: without sequence parallelism and virtual stages.
            longest: most tokens of a row.
            vocab_size: the true vocabulary; logits beyond it are cut off.
        """
        config = model.config
        assert not config.sequence_parallel, "inference models are built without sequence parallelism"
        self.model, self.vocab_size = model, vocab_size
        self.lengths, self.capacity = np.zeros(slots, np.int64), 0
        like: Any = dict(dtype=config.params_dtype, device=next(model.parameters()).device)
        groups = config.num_query_groups // parallel_state.get_tensor_model_parallel_world_size()
        shape = (slots, groups, 0, config.kv_channels)
        self._keys = [torch.zeros(shape, **like) for _ in model.decoder.layers]  # [slots, g, capacity, d]
        self._values = [torch.zeros(shape, **like) for _ in model.decoder.layers]
        self._bias = torch.zeros(slots, 0, **like)  # [slots, capacity], -inf where a slot holds nothing
        if self._bias.is_cuda:
            self._reserve(longest)

    def prefill(self, prompts: Sequence[Sequence[int]], slots: np.ndarray, sources: np.ndarray) -> torch.Tensor | None:
        """Read `prompts` into free slots: `slots[i]` holds `prompts[sources[i]]` afterwards.

        The shorter ones are padded on the right; attention is causal, so that no token sees padding.

        Returns:
            Logits `[len(slots), vocab_size]`, fp32, after each slot's last token; None before the last stage.
        """
        lengths = np.array([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        padded = np.zeros((len(prompts), width), np.int64)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        self._reserve(width)
        self.lengths[slots] = lengths[sources]
        tokens, rows, copies, last = map(self.on_device, (padded, slots, sources, lengths - 1))
        hidden_ahead = torch.arange(self.capacity, device=last.device) > last[copies][:, None]
        self._bias[rows] = torch.zeros_like(self._bias[rows]).masked_fill_(hidden_ahead, -torch.inf)

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            self._keys[layer][rows, :, :width] = key.permute(1, 2, 0, 3)[copies]
            self._values[layer][rows, :, :width] = value.permute(1, 2, 0, 3)[copies]
            return self.model.decoder.layers[layer].self_attention.core_attention(query, key, value, None)

        hidden = forward(self.model, tokens, self._cos[:width], self._sin[:width], attend)
        return None if hidden is None else self._logits(hidden[last[copies], copies])

    def decode(self, tokens: np.ndarray, live: np.ndarray) -> torch.Tensor | None:
        """Add one token to each slot of `live`; the others are computed along and stay as they are.

        Args:
            tokens: `[slots]`, any token where a slot is not live.
            live: slot numbers, ascending.

        Returns:
            Logits `[len(live), vocab_size]`, fp32; None before the last stage.
        """
        slots, longest = len(self.lengths), int(self.lengths.max()) + 1
        self._reserve(longest)
        ids, positions = self.on_device(np.stack((tokens, self.lengths)))
        self.lengths[live] += 1
        rows = torch.arange(slots, device=ids.device)
        self._bias[rows, positions] = 0
        width = min(_STRIDE * -(-longest // _STRIDE), self.capacity)
        bias = self._bias[:, None, None, :width]
        groups, head = self._keys[0].shape[1], self._keys[0].shape[3]
        # The place of each slot's key of each group in the cache as one long list of heads: one copy of rows.
        starts = (rows[:, None] * groups + torch.arange(groups, device=ids.device)) * self.capacity
        places = (starts + positions[:, None]).flatten()

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            keys, values = self._keys[layer], self._values[layer]
            keys.view(-1, head).index_copy_(0, places, key.reshape(-1, head))
            values.view(-1, head).index_copy_(0, places, value.reshape(-1, head))
            # The queries of a group take the sequence dimension: no kernel has to repeat a key.
            out = F.scaled_dot_product_attention(
                query.reshape(slots, groups, -1, head), keys[:, :, :width], values[:, :, :width], attn_mask=bias,
                scale=self.model.decoder.layers[layer].self_attention.core_attention.scale,
            )  # fmt: skip
            return out.reshape(1, slots, -1)

        hidden = forward(
            self.model, ids[:, None], self._cos[positions, 0][None], self._sin[positions, 0][None], attend
        )
        if hidden is None:
            return None
        return self._logits(hidden[0] if len(live) == slots else hidden[0, self.on_device(live)])

    def free(self, slots: np.ndarray) -> None:
        """Empty the slots."""
        self.lengths[slots] = 0

    def keep(self, slots: np.ndarray) -> None:
        """Keep these slots only, in this order."""
        rows = self.on_device(slots)
        self.lengths, self._bias = self.lengths[slots], self._bias[rows]
        for caches in (self._keys, self._values):
            for layer, cache in enumerate(caches):
                caches[layer] = cache[rows]

    def on_device(self, array: np.ndarray | Sequence[int]) -> torch.Tensor:
        """The array as a tensor beside the model."""
        return to_device(array, self._bias.device)

    def _reserve(self, length: int) -> None:
        """Allocate memory for `length` positions in every slot."""
        if length <= self.capacity:
            return
        extra = max(length - self.capacity, self.capacity // 4)
        extra = _in_blocks(extra)
        self.capacity += extra
        for caches in (self._keys, self._values):
            for layer, cache in enumerate(caches):  # zeros: the bias hides finite values only
                caches[layer] = F.pad(cache, (0, 0, 0, extra))
        self._bias = F.pad(self._bias, (0, extra), value=-torch.inf)
        self._cos, self._sin = self.model.rotation(torch.arange(self.capacity, device=self._bias.device))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[rows, vocab_size]` in fp32 of the last layer's output `[rows, hidden]`."""
        logits = project(self.model, self.model.decoder.final_layernorm(hidden))
        group = parallel_state.get_tensor_model_parallel_group()
        return gather_from_tensor_model_parallel_region(logits, group=group)[:, : self.vocab_size].float()


def project(model: LanguageModel, hidden: torch.Tensor) -> torch.Tensor:
    """This tensor-parallel rank's logits `[rows, padded vocabulary / tp]` after the final norm's `[rows, hidden]`."""
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    logits, _ = model.output_layer(hidden[None], weight=weight)
    return logits[0]


def slots_that_fit(model: LanguageModel, wanted: int, longest: int, prefill: int, vocab_size: int) -> int:
    """The number of a `Decoder`'s slots that fit into memory, at most `wanted`; the same on all ranks of the model.

    A slot takes its part of the cache and, while a token is drawn, its logits. The activations of the prompts that are
    prefilled together come on top. On a CPU it is always `wanted`.

    Args:
        longest: most tokens of a row.
        prefill: most tokens that are prefilled together.
        vocab_size: the true vocabulary.

    Raises:
        ConfigError: none fits.
    """
    device = next(model.parameters()).device
    free = _free_memory(device)
    if free is None:
        return wanted
    fixed, slot = activation_bytes(model, prefill), slot_bytes(model, longest, vocab_size)
    found = to_device([min(wanted, max(0, free - fixed) // slot)], device)
    dist.all_reduce(found, op=dist.ReduceOp.MIN, group=parallel_state.get_model_parallel_group())
    slots = int(found)
    if not slots:
        raise ConfigError(
            f"no memory to generate: a response of {longest:,} tokens, its prompt included, takes "
            f"{(fixed + slot) / 2**30:.1f} GiB on each GPU and {free / 2**30:.1f} GiB are free; lower max_new_tokens, "
            "or spread the model over more GPUs with parallel.tensor"
        )
    return slots


def _free_memory(device: torch.device) -> int | None:
    """Bytes that new tensors may take on a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()  # so that memory kept by the allocator counts as free
    free, total = torch.cuda.mem_get_info(device)
    return free - int(_KEPT_FREE * total)


def slot_bytes(model: LanguageModel, longest: int, vocab_size: int) -> int:
    """Memory of a `Decoder`'s slot on this rank: keys and values of this stage, its bias, and its logits."""
    config, layers = model.config, len(model.decoder.layers)
    groups = config.num_query_groups // parallel_state.get_tensor_model_parallel_world_size()
    # and keys or values of one layer twice: `keep` copies them, one after another
    position = (2 * layers + 1) * groups * config.kv_channels + 1
    return _in_blocks(longest) * position * config.params_dtype.itemsize + vocab_size * _DRAW_BYTES


def activation_bytes(model: LanguageModel, tokens: int) -> int:
    """Bytes of the widest activations in a layer, of its MLP or its attention, for so many tokens."""
    config, ranks = model.config, parallel_state.get_tensor_model_parallel_world_size()
    heads = (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels
    widest = 5 * config.hidden_size + 4 * max(config.ffn_hidden_size, heads) // ranks
    return tokens * widest * config.params_dtype.itemsize


def _in_blocks(length: int) -> int:
    return _BLOCK * -(-length // _BLOCK)


def forward(
    model: LanguageModel,
    tokens: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    attend: Attend,
    chosen: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Run `tokens` `[b, s]` through this stage of a model that is `serving`.

    Args:
        cos, sin: of `model.rotation`, `[s, 1, 1, r / 2]` or one position for each row, `[1, b, 1, r / 2]`.
        attend: gets the rotated queries and keys.
        chosen: the places along `s` at which the output is needed, all by default; the last layer computes queries and
            MLP there only.

    Returns:
        The last layer's output `[s or chosen, b, hidden]`, before the final norm; None before the last stage.
    """
    if model.pre_process:
        hidden = model.embedding(tokens, None)
    else:
        shape = (*reversed(tokens.shape), model.config.hidden_size)
        hidden = torch.empty(shape, dtype=model.config.params_dtype, device=tokens.device)
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank(), group=group)
    for number, layer in enumerate(model.decoder.layers):
        attention = layer.self_attention
        query, key, value = attention.get_query_key_value_tensors(layer.input_layernorm(hidden), None)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if chosen is not None and model.post_process and layer is model.decoder.layers[-1]:
            query, hidden = query[chosen], hidden[chosen]
        hidden = _add(hidden, *attention.linear_proj(attend(number, query, key, value)))
        hidden = _add(hidden, *layer.mlp(layer.pre_mlp_layernorm(hidden)))
    if model.post_process:
        return hidden
    group = parallel_state.get_pipeline_model_parallel_group()
    dist.send(hidden.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group=group)
    return None


def _add(hidden: torch.Tensor, output: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The residual connection around a projection whose bias the caller adds."""
    return hidden + (output if bias is None else output + bias)
