"""The families of networks: what sets each apart from Llama, and what its Hugging Face `config.json` says.

A new family is one entry of `FAMILIES` as long as these traits describe it. A new trait is a field of `Family`, read
where it matters: `gpt.transformer_config` and `layers.layer_spec` build it, `hf_config.tensor_shapes` lists its
tensors, and `hf` knows where they belong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nemo_steerlm.errors import ConfigError

if TYPE_CHECKING:
    from nemo_steerlm.config.model import Architecture


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family; the defaults are Llama's.

    Attributes:
        hf_class: the language model's class in transformers.
        layernorm1p: norms are LayerNorm with a bias, whose stored weight is the factor minus 1; else RMSNorm.
        gated: the feed-forward block is SwiGLU; else a squared ReLU without a gate ("Primer", arXiv 2109.08668).
        qkv_bias: queries, keys and values have a bias.
        qk_norm: the norm is applied to each head of queries and keys too, before they are rotated.
        partial_rotary: `rotary_percent` may be less than 1.
        constants: keys of `config.json` that can have this value only.
        left_out: values of keys missing in `config.json`, where transformers' default differs from Llama's.
    """

    hf_class: str
    layernorm1p: bool = False
    gated: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    partial_rotary: bool = False
    constants: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "llama": Family(hf_class="LlamaForCausalLM", constants={"attention_bias": False, "mlp_bias": False}),
    "mistral": Family(
        hf_class="MistralForCausalLM",
        constants={"sliding_window": None},
        left_out={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        hf_class="Qwen2ForCausalLM",
        qkv_bias=True,
        constants={"use_sliding_window": False},
        left_out={"max_position_embeddings": 32768, "num_key_value_heads": 32},
    ),
    "qwen3": Family(
        hf_class="Qwen3ForCausalLM",
        qk_norm=True,
        constants={"attention_bias": False, "use_sliding_window": False},
        left_out={"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    ),
    "nemotron": Family(
        hf_class="NemotronForCausalLM",
        layernorm1p=True,
        gated=False,
        partial_rotary=True,
        constants={"attention_bias": False, "mlp_bias": False},
        left_out={
            "max_position_embeddings": 4096, "norm_eps": 1e-5, "initializer_range": 0.0134,
            "partial_rotary_factor": 0.5,
        },
    ),
}  # fmt: skip


def family_of(architecture: Architecture) -> Family:
    """The family an architecture belongs to.

    Raises:
        ConfigError: no such family, or `rotary_percent` where the family has none.
    """
    family = FAMILIES.get(architecture.family)
    if family is None:
        raise ConfigError(f"family={architecture.family}: unknown; expected one of {', '.join(FAMILIES)}")
    if architecture.rotary_percent != 1.0 and not family.partial_rotary:
        raise ConfigError(
            f"rotary_percent={architecture.rotary_percent}: {architecture.family} rotates whole heads (1.0)"
        )
    return family
