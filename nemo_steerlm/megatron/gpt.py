"""Build megatron-core's GPTModel from an `Architecture`; the one place that names its class and its options."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_steerlm.config import Architecture, ParallelConfig, TrainerConfig, choices
from nemo_steerlm.config.families import family_of
from nemo_steerlm.config.layout import check_layout, last_stage_layers, padded_vocabulary
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.megatron import patches
from nemo_steerlm.megatron.layers import (
    Segments,
    layer_spec,
    squared_relu,
    transformer_engine_available,
)

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
}
assert tuple(RECOMPUTE) == choices(TrainerConfig, "recompute")


def transformer_config(
    architecture: Architecture,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    fp8: bool = False,
    recompute: str = "none",
    initialise: bool = True,
) -> TransformerConfig:
    """Translate our configuration into megatron-core's.

    Args:
        fp8: the linears' products in fp8 (e4m3 forward, e5m2 backward); everything else in `dtype`.
        recompute: a key of `RECOMPUTE`.
        initialise: draw random weights; else they are uninitialised, for the caller to fill. On a CPU each rank draws
            a whole matrix and keeps its part.

    Raises:
        ConfigError: the layout does not divide the model, or fp8 without Transformer Engine.
    """
    assert parallel.context == 1, "ParallelConfig.validate refuses more"
    check_layout(architecture, parallel)
    engine = transformer_engine_available()
    if fp8 and not engine:
        raise ConfigError("trainer.precision=fp8 needs Transformer Engine and a GPU; use trainer.precision=bf16")
    family = family_of(architecture)
    interleaved = parallel.virtual_pipeline is not None
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.key_value_heads,
        kv_channels=architecture.head_size,
        normalization="LayerNorm" if family.layernorm1p else "RMSNorm",
        layernorm_zero_centered_gamma=family.layernorm1p,
        layernorm_epsilon=architecture.norm_epsilon,
        qk_layernorm=family.qk_norm,
        gated_linear_unit=family.gated,
        activation_func=F.silu if family.gated else squared_relu,
        # SwiGLU: megatron-core's compiled kernel beside Transformer Engine's layers, elsewhere `layers.SwiGLU`.
        bias_activation_fusion=family.gated and engine,
        use_te_activation_func=family.gated and not engine,
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias,
        hidden_dropout=architecture.hidden_dropout,
        attention_dropout=architecture.attention_dropout,
        init_method_std=architecture.init_std,
        perform_initialization=initialise,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        num_layers_in_last_pipeline_stage=last_stage_layers(architecture, parallel),
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        calculate_per_token_loss=True,  # one sum and one count over the whole global batch, not a mean of means
        # Batched sends cross when both pipeline neighbours are one rank, which interleaving on two stages makes
        # them (silently wrong gradients); separate sends are right everywhere. megatron-core 0.16.1 to 0.19.2,
        # pipeline_parallel/p2p_communication.py: `_batched_p2p_ops`. Remove when it tells the two apart.
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,  # `optim.wrap` turns it on, which makes the buffers it needs
        fp8="hybrid" if fp8 else None,
        **RECOMPUTE[recompute],
    )


def row_multiple(config: TransformerConfig) -> int:
    """The length of a training row is a multiple of this.

    Sequence parallelism cuts rows into equal parts, and fp8 products take the tokens of a part by 16, as mxfp8 by 32.
    """
    tensor = config.tensor_model_parallel_size
    return math.lcm(8, tensor) if config.fp8 is None else get_fp8_align_size(config.fp8_recipe) * tensor


def inverse_frequencies(architecture: Architecture) -> torch.Tensor:
    """RoPE's inverse frequencies `[r / 2]`, with Llama 3.1's scaling where `rope_scaling` asks for it.

    The first `r = rotary_percent * d` elements of a head are rotated, the others are not (megatron-core takes r from
    the width of the angles).

    The scaling leaves short wavelengths, divides long ones by `factor` and blends between them ("The Llama 3 Herd of
    Models", as configured by `rope_scaling` in Hugging Face's Llama configuration). megatron-core's own version
    knows one set of bounds only.
    """
    rotated = int(architecture.head_size * architecture.rotary_percent)
    frequencies = 1.0 / architecture.rope_theta ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    scaling = architecture.rope_scaling
    if scaling is None:
        return frequencies
    rotations = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # turns within the old context
    blend = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return frequencies * (blend + (1 - blend) / scaling.factor)


class LanguageModel(GPTModel):
    """GPTModel with RoPE of our own; returns vocabulary-parallel logits `[batch, seq, padded vocabulary / tp]`.

    Called with `places` `[n]` in the flattened batch it returns the logits there only, `[n, padded vocabulary / tp]`:
    prompts never go through the vocabulary projection.
    """

    def __init__(self, config: TransformerConfig, architecture: Architecture, **kwargs: Any) -> None:
        super().__init__(
            config=config,
            vocab_size=padded_vocabulary(architecture),
            max_sequence_length=architecture.max_position_embeddings,
            position_embedding_type="none",  # core attention rotates: `Segments.rotation`
            parallel_output=True,
            **kwargs,
        )
        self.inverse_frequencies = inverse_frequencies(architecture).to(torch.cuda.current_device())

    def forward(
        self,
        input_ids: torch.Tensor,
        *args: Any,
        packed_seq_params: Segments | None = None,
        places: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As GPTModel's; `packed_seq_params` gives the samples' places, without it there is one sample a row."""
        segments = packed_seq_params or Segments([input_ids.shape[1]], input_ids.device)
        if segments.rotation is None:  # the first chunk of the model that sees this batch
            segments.rotation = self.rotation(segments.positions)
        # GPTModel hands `loss_mask` through to `_postprocess` and has no other use for it.
        return super().forward(input_ids, *args, packed_seq_params=segments, loss_mask=places, **kwargs)

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """RoPE's cosines and sines `[s, 1, 1, r / 2]` of `positions` `[s]`, in the model's type."""
        angles = torch.outer(positions.float(), self.inverse_frequencies)[:, None, None]
        return angles.cos().to(self.config.params_dtype), angles.sin().to(self.config.params_dtype)

    def _postprocess(
        self, hidden_states: torch.Tensor, *args: Any, loss_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Choose the positions before the vocabulary projection.

        A private hook of GPTModel (megatron-core 0.16.1 to 0.19.2, models/gpt/gpt_model.py, line 559 of 0.16.1).
        Remove when its `forward` takes the positions.
        """
        if not self.post_process:
            return hidden_states
        places = loss_mask
        if places is None:
            return super()._postprocess(hidden_states, *args, **kwargs)
        if self.config.sequence_parallel:  # this rank holds a part of the sequence: choose after the projection
            return super()._postprocess(hidden_states, *args, **kwargs).flatten(0, 1).index_select(0, places)
        length, rows, _ = hidden_states.shape
        places = places % length * rows + places // length  # tokens of all rows lie side by side
        chosen = hidden_states.flatten(0, 1).index_select(0, places)[:, None]
        return super()._postprocess(chosen, *args, **kwargs).squeeze(0)  # not [0], whose gradient is a copy


class RegressionModel(LanguageModel):
    """The same backbone with one linear head in fp32; the last pipeline stage returns `[batch, seq, outputs]`.

    The head has no bias, as transformers' sequence classifiers have none: an exported regressor is the same function.
    """

    def __init__(self, config: TransformerConfig, architecture: Architecture, outputs: int, **kwargs: Any) -> None:
        super().__init__(config, architecture, share_embeddings_and_output_weights=False, **kwargs)
        if self.post_process:
            del self.output_layer  # no vocabulary projection
            device = torch.cuda.current_device()
            self.score = torch.nn.Linear(config.hidden_size, outputs, bias=False, dtype=torch.float32, device=device)
            with torch.random.fork_rng(devices=[]):  # the head starts equal on every tensor-parallel rank
                torch.manual_seed(0)
                weight = torch.empty(outputs, config.hidden_size).normal_(std=config.init_method_std)
            self.score.weight.data.copy_(weight)

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Apply the head instead of the vocabulary projection, in the hook of `LanguageModel._postprocess`."""
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # The head is replicated: every rank computes the full gradient, so it must not be summed again.
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
        return self.score(hidden_states.float()).transpose(0, 1).contiguous()

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict:
        """As any module's: GPTModel's own version insists on a vocabulary projection."""
        return MegatronModule.sharded_state_dict(self, *args, **kwargs)


def build(
    architecture: Architecture,
    parallel: ParallelConfig,
    dtype: torch.dtype = torch.float32,
    outputs: int | None = None,
    **engine: Any,
) -> list[LanguageModel]:
    """Build this rank's model chunks, one without virtual pipeline stages.

    Args:
        outputs: None for a language model, else the number of outputs of a regression model's head.
        engine: `fp8`, `recompute` and `initialise` of `transformer_config`.

    Raises:
        ConfigError: as `transformer_config`, or a megatron-core without the hook that our models need.
    """
    config = transformer_config(architecture, parallel, dtype, **engine)
    if not hasattr(GPTModel, "_postprocess"):
        raise ConfigError(
            f"{patches.release('megatron')} has no GPTModel._postprocess, where these models choose "
            "positions and add their heads (0.16.1 to 0.19.2 have it); install one of those"
        )
    chunks: list[LanguageModel] = []
    for index in range(parallel.virtual_pipeline or 1):
        stage = index if parallel.virtual_pipeline else None
        place = dict(ignore_virtual=stage is None, vp_stage=stage)
        kwargs: dict[str, Any] = dict(
            transformer_layer_spec=layer_spec(config, vp_stage=stage),
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            vp_stage=stage,
        )
        if outputs is None:
            kwargs["share_embeddings_and_output_weights"] = architecture.tie_word_embeddings
            model = LanguageModel(config, architecture, **kwargs)
        else:
            model = RegressionModel(config, architecture, outputs, **kwargs)
        model = model.to(torch.cuda.current_device())
        chunks.append(model if dtype == torch.float32 else _to_dtype(model, dtype))
    return chunks


def _to_dtype(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """Cast everything but a regression head, which stays in fp32."""
    head = getattr(model, "score", None)
    model.to(dtype)
    if head is not None:
        head.to(torch.float32)
    return model
