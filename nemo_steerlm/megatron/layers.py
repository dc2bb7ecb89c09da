"""The transformer layer that megatron-core builds: Transformer Engine where it can be imported, plain torch elsewhere.

Shapes follow megatron-core: `s` sequence, `b` batch, `n` heads, `g` key/value groups, `d` head size.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig


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

    megatron-core's own wrapper refuses sequence parallelism; all that is missing is the mark that makes
    ``finalize_model_grads`` sum this weight's gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


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
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend causally.

        Args:
            query: `[s, b, n, d]`; key, value: `[s, b, g, d]`.
            attention_mask: None for plain causal attention, or `[b, 1, s, keys]` with True where attention is
                forbidden (megatron-core's convention).
            attn_mask_type: ignored; this decoder is always causal.
            attention_bias: not supported.
            packed_seq_params: not supported.

        Returns:
            `[s, b, n * d]`.
        """
        assert attention_bias is None and packed_seq_params is None, "neither a bias nor packing is supported"
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        length = query.shape[2]
        mask = None if attention_mask is None else ~attention_mask
        dropout = self.dropout if self.training else 0.0
        with get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(
                query, key, value,
                attn_mask=mask, is_causal=mask is None and length > 1, dropout_p=dropout, scale=self.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )  # fmt: skip
        return out.permute(2, 0, 1, 3).reshape(length, query.shape[0], -1)


class RotaryTable(RotaryEmbedding):
    """RoPE angles computed once."""

    def __init__(self, inverse_frequencies: torch.Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.inv_freq = inverse_frequencies
        self._table = torch.empty(0)

    def forward(self, max_seq_len: int, *_: Any, **__: Any) -> torch.Tensor:
        """Angles `[max_seq_len, 1, 1, d]` of positions 0, 1, ..."""
        self.reserve(max_seq_len)
        return self._table[:max_seq_len]

    def reserve(self, length: int) -> None:
        """Compute the angles of all positions below `length`."""
        if len(self._table) < length:
            size = max(length, 2 * len(self._table))
            with torch.inference_mode(False):  # the table outlives generation, and autograd refuses inference tensors
                positions = torch.arange(size, dtype=torch.float32, device=torch.cuda.current_device())
                angles = torch.outer(positions, self.inv_freq.to(positions.device))
                self._table = torch.cat((angles, angles), dim=-1)[:, None, None, :]


def layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage: Transformer Engine's with TE and CUDA, else torch with SDPA attention."""
    if transformer_engine_available():
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = get_gpt_layer_with_transformer_engine_spec(), TENorm
    else:
        layer, norm = get_gpt_layer_local_spec(normalization="RMSNorm"), TorchRMSNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = TorchRMSNorm
    # Our own core attention in both: TE's has no cache of rotated keys, and torch's SDPA is flash attention on CUDA.
    layer.submodules.self_attention.submodules.core_attention = SDPACoreAttention
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)
