"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the frozen linears of a model, and frozen backbones.

An adapter adds `alpha / rank * B A x` to its linear's output for `x`. A is random, B starts at zero: before the first
step the model equals the base. Where the linear's weight is split over tensor-parallel ranks, so is the adapter:

* column-parallel (linear_qkv, linear_fc1): A is replicated, B split along the output;
* row-parallel (linear_proj, linear_fc2): A is split along the input, B replicated.

Only `rank` numbers a token are communicated. Adapters exist during training only: `merged_state` gives the merged
weights.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.layers import (
    param_is_not_tensor_parallel_duplicate,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from nemo_steerlm.config import LoRAConfig
from nemo_steerlm.megatron import checkpoint, token_adapter

_COLUMN_PARALLEL = ("linear_qkv", "linear_fc1")
_SUFFIX = "_adapter"


class Adapter(torch.nn.Module):
    """The adapter of one linear; shapes are those of this rank's part.

    Attributes:
        a: `[rank, input]`.
        b: `[output, rank]`; for a gated linear_fc1 `[2, output / 2, rank]`, whose gate and up halves are each split
            over the ranks, like those of the linear.
    """

    def __init__(
        self, linear: torch.nn.Module, name: str, layer: int, lora: LoRAConfig, config: TransformerConfig, seed: int
    ) -> None:
        super().__init__()
        self.config, self.scale, self.dropout = config, lora.alpha / lora.rank, lora.dropout
        self.column = name in _COLUMN_PARALLEL
        weight: torch.Tensor = linear.weight  # type: ignore[assignment]
        output, width = weight.shape
        initial = _initial(lora.rank, width, self.column, seed=zlib.crc32(f"{seed} {layer} {name}".encode()))
        self.a = torch.nn.Parameter(initial.to(weight))
        halves = (2, output // 2) if name == "linear_fc1" and config.gated_linear_unit else (output,)
        self.b = torch.nn.Parameter(weight.new_zeros(*halves, lora.rank))
        split, copied = (self.b, self.a) if self.column else (self.a, self.b)
        set_tensor_model_parallel_attributes(split, True, self._split_axis, 1)
        # Each rank has a part of the sequence: finalize_model_grads sums the gradient of replicated parameters.
        copied.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._linear = (linear,)  # a tuple hides it from torch's registry

    @property
    def _split_axis(self) -> int:
        return self.b.dim() - 2 if self.column else 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The addition to the linear's output for its input `x`, both `[seq, batch, features]`."""
        low = F.linear(self._dropped(_normalised(self._linear[0], x, self.config)), self.a)
        return F.linear(self._across_ranks(low), self.b.flatten(0, -2)) * self.scale

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.dropout):
            return x
        if self.column or self.config.sequence_parallel:  # the block has chosen the right stream already
            return F.dropout(x, self.dropout)
        with tensor_parallel.get_cuda_rng_tracker().fork():  # each rank holds other features
            return F.dropout(x, self.dropout)

    def _across_ranks(self, low: torch.Tensor) -> torch.Tensor:
        """From A's output on this rank to B's input on it, `[seq, batch, rank]`."""
        if self.config.sequence_parallel:
            if self.column:
                return tensor_parallel.gather_from_sequence_parallel_region(low)
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(low)
        if self.column:
            return tensor_parallel.copy_to_tensor_model_parallel_region(low)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(low)

    @torch.no_grad()
    def merged(self) -> torch.Tensor:
        """This rank's part of the linear's weight with the adapter merged, computed in fp32."""
        weight: torch.Tensor = self._linear[0].weight  # type: ignore[assignment]
        return (weight.float() + self.scale * self.b.flatten(0, -2).float() @ self.a.float()).to(weight.dtype)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """Both matrices in the distributed format, so that they follow their linear to any layout."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"b" if self.column else "a": self._split_axis},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )


def _initial(rank: int, width: int, column: bool, seed: int) -> torch.Tensor:
    """A, uniform within 1 / sqrt(input) (Kaiming, as the reference implementation): the same for every layout."""
    generator = torch.Generator().manual_seed(seed)
    parts = 1 if column else parallel_state.get_tensor_model_parallel_world_size()
    whole = torch.empty(rank, width * parts).uniform_(-1, 1, generator=generator) * (width * parts) ** -0.5
    return whole if column else whole.chunk(parts, dim=1)[parallel_state.get_tensor_model_parallel_rank()]


def _normalised(linear: torch.nn.Module, x: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    """The linear's actual input: Transformer Engine's fused linears normalise theirs themselves."""
    weight: Any = getattr(linear, "layer_norm_weight", None)
    if weight is None:
        return x
    weight = weight + 1 if config.layernorm_zero_centered_gamma else weight
    if config.normalization == "RMSNorm":
        return F.rms_norm(x, x.shape[-1:], weight, config.layernorm_epsilon)
    return F.layer_norm(x, x.shape[-1:], weight, linear.layer_norm_bias, config.layernorm_epsilon)  # type: ignore


def freeze_trunk(chunks: list[Any]) -> None:
    """Freeze everything but a regression head, which language models do not have."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(name.startswith("score."))
        if chunk.post_process and getattr(chunk, "output_layer", None) is not None:
            chunk.output_layer.register_forward_hook(lambda _, __, output: (_in_order(output[0]), *output[1:]))


def add(chunks: list[Any], lora: LoRAConfig, seed: int) -> None:
    """Give every target of every layer of a frozen backbone an adapter; a second call changes nothing."""
    if any(isinstance(module, Adapter) for chunk in chunks for module in chunk.modules()):
        return
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            owners = {name: owner for owner in (layer.self_attention, layer.mlp) for name, _ in owner.named_children()}
            for name in lora.targets:
                assert name in owners, f"{name}: LoRAConfig.validate takes the names of these layers only"
                linear = getattr(owners[name], name)
                adapter = Adapter(linear, name, layer.layer_number, lora, chunk.config, seed)
                owners[name].add_module(name + _SUFFIX, adapter)
                linear.register_forward_hook(
                    lambda _, inputs, output, adapter=adapter: (output[0] + adapter(inputs[0]), output[1])
                )
        if chunk.pre_process and chunk.config.recompute_granularity == "full":
            # A recomputed layer gets gradients only if its input requires one, which a frozen embedding's does not.
            chunk.embedding.register_forward_hook(
                lambda _, __, output: output.requires_grad_() if torch.is_grad_enabled() else None
            )


def _in_order(logits: torch.Tensor) -> torch.Tensor:
    """Give the gradient of logits `[seq, batch, vocab]` their memory order.

    In bf16 it comes transposed. `[n, 1, vocab]` is then the same memory under other strides, at which torch multiplies
    it with a frozen weight token by token (`matmul` becomes `bmm` over copies of the weight).
    """
    if logits.requires_grad:
        logits.register_hook(lambda gradient: gradient.reshape(-1, gradient.shape[-1]).view(gradient.shape))
    return logits


def merged_state(chunks: list[Any]) -> dict[str, Any]:
    """`checkpoint.model_state` with the adapters merged into the weights."""
    state = checkpoint.model_state(chunks)
    for chunk, part in zip(chunks, state.values(), strict=True):
        for name, module in chunk.named_modules():
            if isinstance(module, Adapter):
                for own in ("a", "b"):
                    del part[f"{name}.{own}"]
                key = name.removesuffix(_SUFFIX) + ".weight"
                part[key] = dataclasses.replace(part[key], data=module.merged())
        token_adapter.merge(chunk, part)
    return state


def count_parameters(chunks: list[Any]) -> tuple[int, int]:
    """Trained and all parameters of the whole model, each counted once, whatever the layout."""
    trained = total = 0
    for chunk in chunks:
        for parameter in chunk.parameters():
            if param_is_not_tensor_parallel_duplicate(parameter) and not getattr(parameter, "shared", False):
                total += parameter.numel()
                trained += parameter.numel() * parameter.requires_grad
    counts = torch.tensor([trained, total], device=torch.cuda.current_device())
    dist.all_reduce(counts, group=parallel_state.get_model_parallel_group())
    return int(counts[0]), int(counts[1])
