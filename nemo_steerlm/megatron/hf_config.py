"""The `config.json` of a Llama model <-> `Architecture`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_steerlm.config import Architecture, RopeScaling
from nemo_steerlm.errors import CheckpointError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
_ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(path: Path) -> dict[str, Any]:
    """Read a `config.json`.

    Raises:
        CheckpointError: it is missing or not a JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no config.json here; expected a Hugging Face model folder") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def architecture_from_config(config: dict[str, Any], where: Path | str) -> Architecture:
    """Translate a Llama `config.json`; keys that are left out have the defaults of transformers' LlamaConfig.

    RoPE is read in both notations: `rope_theta` beside `rope_scaling` (transformers 4), and `rope_parameters` (5).

    Args:
        where: the file, for messages.

    Raises:
        CheckpointError: another model type, or an option that this package has no counterpart for.
    """
    if config.get("model_type") != "llama":
        raise CheckpointError(
            f"{where}: model_type is {config.get('model_type')!r}; only 'llama' (Llama 2, 3, 3.1 and models of that "
            f"shape) can be imported"
        )
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    options = {**rope, **config}
    for key, plain in (
        ("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu"), ("quantization_config", None),
        ("partial_rotary_factor", 1.0),
    ):  # fmt: skip
        if options.get(key, plain) not in (plain, None):
            raise CheckpointError(f"{where}: {key} is {options[key]!r}; only {plain!r} is supported")
    for key in _SIZES:
        if key not in config:
            raise CheckpointError(f"{where}: key {key!r} is missing")
        if not isinstance(config[key], int) or config[key] < 1:
            raise CheckpointError(f"{where}: {key} is {config[key]!r}; expected a positive integer")
    heads = config["num_attention_heads"]
    return Architecture(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(rope, where),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        init_std=config.get("initializer_range", 0.02),
        attention_dropout=config.get("attention_dropout") or 0.0,
    )


def _rope_scaling(rope: dict[str, Any], where: Path | str) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f"{where}: RoPE scaling of type {kind!r}; only 'llama3' (Llama 3.1) is supported")
    missing = [key for key in _ROPE_SCALING if key not in rope]
    if missing:
        raise CheckpointError(f"{where}: RoPE scaling of type 'llama3' lacks {', '.join(missing)}")
    return RopeScaling(**{key: rope[key] for key in _ROPE_SCALING})


def config_from_architecture(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """The `config.json` of an architecture, in the notation that transformers 4 and 5 both read.

    Args:
        dtype: the type the weights are stored in ("float32", "bfloat16", "float16").
    """
    scaling = architecture.rope_scaling
    rope = {"rope_type": "llama3", **{key: getattr(scaling, key) for key in _ROPE_SCALING}} if scaling else None
    heads = architecture.num_attention_heads
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": architecture.num_query_groups or heads,
        "head_dim": head_size(architecture),
        "hidden_act": "silu",
        "max_position_embeddings": architecture.max_position_embeddings,
        "initializer_range": architecture.init_std,
        "rms_norm_eps": architecture.norm_epsilon,
        "rope_theta": architecture.rope_theta,
        "rope_scaling": rope,
        "tie_word_embeddings": architecture.tie_word_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": architecture.attention_dropout,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def head_size(architecture: Architecture) -> int:
    """Width of one attention head."""
    return architecture.head_dim or architecture.hidden_size // architecture.num_attention_heads


def tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face model, in the order in which they are written."""
    hidden, ffn, head = architecture.hidden_size, architecture.ffn_hidden_size, head_size(architecture)
    queries = architecture.num_attention_heads * head
    keys = (architecture.num_query_groups or architecture.num_attention_heads) * head
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (architecture.vocab_size, hidden)}
    for i in range(architecture.num_layers):
        shapes.update({f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()})
    shapes["model.norm.weight"] = (hidden,)
    if not architecture.tie_word_embeddings:
        shapes[HEAD] = (architecture.vocab_size, hidden)
    return shapes
