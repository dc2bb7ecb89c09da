"""The transformer layer that megatron-core builds: Transformer Engine where it can be imported, plain torch elsewhere.

Shapes follow megatron-core: `s` sequence, `b` batch, `n` heads, `g` key/value groups, `d` head size.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import once_differentiable

from nemo_steerlm.megatron import patches


def transformer_engine_available() -> bool:
    """Whether the Transformer Engine layers can be used: they need both the package and a GPU."""
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True


class TorchRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, usable under sequence parallelism.

    megatron-core's own wrapper refuses sequence parallelism; it only lacks the attribute that makes
    ``finalize_model_grads`` sum this weight's gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the last dimension."""
        return _RMSNorm.apply(x, self.weight, self.eps) if x.is_cpu else super().forward(x)


class _RMSNorm(torch.autograd.Function):
    """`x / sqrt(mean(x^2) + eps) * weight` in fp32 at least; on a CPU torch composes it of ten operations.

    It saves its input and one number a token for the backward pass: a quarter of torch's memory in bf16, half in fp32.
    With `h = x / sqrt(...)` and the gradient `g` of the result, that of `x` is `(g w - h mean(g w h)) / sqrt(...)`.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = _wide(x)
        root = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, root)
        return (wide * root).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        x, weight, root = ctx.saved_tensors
        grad, normalised = _wide(grad), _wide(x) * root
        product = grad * normalised
        to_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        mean = product.mul_(weight).mean(-1, keepdim=True)
        to_x = (grad * weight).addcmul_(normalised, mean, value=-1).mul_(root)
        return to_x.to(x.dtype), to_weight, None


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class TorchLayerNorm1P(torch.nn.LayerNorm):
    """torch's LayerNorm with a weight stored as the factor minus 1, so that weight decay pulls the factor to 1.

    Marked for sequence parallelism as `TorchRMSNorm`; Transformer Engine calls it zero-centred gamma.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        """Start as the identity."""
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the last dimension."""
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """`max(x, 0) ** 2`; megatron-core's own is compiled at its first call, which is slow on a CPU."""
    return F.relu(x).square()


class SwiGLU(MegatronModule):
    """`silu(gate) * up` of adjacent gate and up halves, `[..., 2 f]` to `[..., f]`.

    The gradient is written into one tensor; autograd would concatenate the gradients of both halves.
    megatron-core takes a module for this place as `use_te_activation_func`; it need not be Transformer Engine's.
    """

    def forward(self, pair: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        return _SwiGLU.apply(pair)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pair: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(pair)
        gate, up = pair.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (pair,) = ctx.saved_tensors
        gate, up = pair.chunk(2, dim=-1)
        result = torch.empty_like(pair)
        to_gate, to_up = result.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=to_up).mul_(grad)
        torch.mul(grad, up, out=to_gate)
        torch.ops.aten.silu_backward.grad_input(to_gate, gate, grad_input=to_gate)
        return result


class Segments(PackedSeqParams):
    """The places of samples in a batch: one sample in each row of `s` tokens, or several in its only row.

    megatron-core passes it as `packed_seq_params` to every layer, recomputed ones too. Its format is "sbhd": under
    "thd" every layer would read the lengths back from the device.

    Attributes:
        lengths: tokens of each segment, their sum is `s`; kept on the host, so that no layer waits for the device.
        positions: `[s]`, from 0 in every segment.
        bounds: int32 `[segments + 1]`, where the segments start, and `s`.
        rotation: None, or RoPE's cosines and sines of `positions`, for core attention to apply.
    """

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        longest = max(lengths)
        super().__init__(qkv_format="sbhd", max_seqlen_q=longest, max_seqlen_kv=longest)
        self.lengths = lengths
        total, bounds = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
        self.bounds = bounds.to(device, torch.int32, non_blocking=True)
        starts = self.bounds[:-1].repeat_interleave(self.bounds.diff(), output_size=total)
        self.positions = torch.arange(total, device=device) - starts
        self.rotation: tuple[torch.Tensor, torch.Tensor] | None = None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on `x` `[s, b, n, d]`: element i of the first half is rotated with element i of the second.

    Only the first `r` elements of a head are rotated, twice as many as there are angles. The result's memory is
    `[b, n, s, d]`: attention on a CPU is faster where a head's tokens are contiguous.

    Args:
        cos, sin: `[s, 1, 1, r / 2]`.
    """
    half, (s, b, n, d) = cos.shape[-1], x.shape
    result = torch.empty(b, n, s, d, dtype=x.dtype, device=x.device).permute(2, 0, 1, 3)
    first, second, rest = x.split((half, half, d - 2 * half), dim=-1)
    to_first, to_second, to_rest = result.split((half, half, d - 2 * half), dim=-1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin)
    to_rest.copy_(rest)
    return result


class Rotate(torch.autograd.Function):
    """`rotate` with its gradient, the inverse rotation: nothing of `x` is saved.

    megatron-core's own computes the cosines in every layer and concatenates each tensor twice.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate."""
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Rotate back."""
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin), None, None


@functools.cache
def _with_groups(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`varlen_attn` for any number of key/value heads: by its flag, or repeated where it has none.

    Remove when torch 2.11, which has no flag, is not supported.
    """
    has_flag = "enable_gqa" in inspect.signature(kernel).parameters

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and has_flag:
            kwargs["enable_gqa"] = True
        elif groups > 1:
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        return kernel(query, key, value, *args, **kwargs)

    return attention


def _varlen_attention(*args: Any, **kwargs: Any) -> Any:
    from torch.nn.attention.varlen import varlen_attn  # and with it torch's compiler, which a CPU does without

    return _with_groups(varlen_attn)(*args, **kwargs)


def has_flash_attention(x: torch.Tensor) -> bool:
    """Whether `packed_attention` supports tensors like this one."""
    return x.is_cuda and x.dtype != torch.float32


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    longest: tuple[int, int],
    scale: float | None,
) -> torch.Tensor:
    """Causal flash attention within each of several texts, all at once; where `has_flash_attention`.

    The last query of a text is aligned with its last key, so a text may have fewer queries than keys.

    Args:
        query: `[queries, 1, n, d]`, text after text.
        key, value: `[keys, 1, g, d]`, text after text.
        query_bounds, key_bounds: int32 `[texts + 1]`, where the texts start, and their end.
        longest: most queries and most keys of a text.

    Returns:
        `[queries, 1, n * d]`.
    """
    out = _varlen_attention(
        query[:, 0], key[:, 0], value[:, 0], query_bounds, key_bounds, *longest, scale=scale, window_size=(-1, 0)
    )
    assert isinstance(out, torch.Tensor)  # and no statistics beside it
    return out.flatten(1)[:, None]


class SDPACoreAttention(MegatronModule):
    """Core attention through ``torch.nn.functional.scaled_dot_product_attention``."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert config.context_parallel_size == 1, "context parallelism needs Transformer Engine"
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Segments | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """Attend causally.

        Args:
            query: `[s, b, n, d]`; key, value: `[s, b, g, d]`.
            attention_mask, attn_mask_type, attention_bias: megatron-core's arguments; this decoder is always causal.
            others: arguments of a newer megatron-core; if one is set, it is logged once.
            packed_seq_params: the samples' places; no token attends to another sample. None: one sample a row.

        Returns:
            `[s, b, n * d]`.
        """
        assert attention_mask is None and attention_bias is None, "attention is causal and nothing else"
        if unknown := [name for name, value in others.items() if value is not None]:
            patches.leave("megatron.core.transformer.attention", f"it sets {unknown}", "core attention ignores that")
        if packed_seq_params is not None:
            if packed_seq_params.rotation is not None:
                query, key = (Rotate.apply(x, *packed_seq_params.rotation) for x in (query, key))
            if len(packed_seq_params.lengths) > 1:
                assert not self.dropout
                return self._packed(query, key, value, packed_seq_params)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        length = query.shape[2]
        dropout = self.dropout if self.training else 0.0
        with get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(
                query, key, value,
                is_causal=length > 1, dropout_p=dropout, scale=self.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )  # fmt: skip
        return out.permute(2, 0, 1, 3).reshape(length, query.shape[0], -1)

    def _packed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments) -> torch.Tensor:
        """Attend causally within each segment of `[s, 1, n or g, d]`; returns `[s, 1, n * d]`."""
        if has_flash_attention(query):
            bounds, longest = segments.bounds, segments.max_seqlen_q
            return packed_attention(query, key, value, bounds, bounds, (longest, longest), self.scale)
        grouped = query.shape[2] != key.shape[2]
        parts = (x.permute(1, 2, 0, 3).split(segments.lengths, dim=2) for x in (query, key, value))
        outs = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
            for q, k, v in zip(*parts, strict=True)
        ]
        return torch.cat(outs, dim=2).permute(2, 0, 1, 3).flatten(2)


def _use_swiglu(mlp: Any, config: TransformerConfig) -> None:
    """Put `SwiGLU` into the MLP's spec (a ModuleSpec, in megatron-core 0.19 a partial), if it has a place for it."""
    place = mlp.keywords.get if isinstance(mlp, functools.partial) else functools.partial(getattr, mlp)
    parts: Any = place("submodules", None)
    if hasattr(parts, "activation_func"):
        parts.activation_func = SwiGLU
        return
    config.use_te_activation_func = False
    effect = "megatron-core's own gated MLP is used, which is slower"
    patches.leave("megatron.core.transformer.mlp", "its spec has no activation_func", effect)


def layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage: Transformer Engine's with TE and CUDA, else torch with SDPA attention."""
    if transformer_engine_available():
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm), TENorm
        attention = layer.submodules.self_attention.submodules
    else:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        norm = TorchLayerNorm1P if config.layernorm_zero_centered_gamma else TorchRMSNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
        attention = layer.submodules.self_attention.submodules
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = norm
        if config.use_te_activation_func:
            _use_swiglu(layer.submodules.mlp, config)
    # Our own core attention in both: generation has its own cache, and torch's SDPA is flash attention on CUDA.
    attention.core_attention = SDPACoreAttention
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)
