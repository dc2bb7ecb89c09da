"""The `config.json` of a Hugging Face language model or sequence classifier <-> `Architecture`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_steerlm.config import Architecture, RopeScaling
from nemo_steerlm.config.families import FAMILIES, Family, family_of
from nemo_steerlm.errors import CheckpointError

EMBEDDING, HEAD, SCORE = "model.embed_tokens.weight", "lm_head.weight", "score.weight"
_CAUSAL, _CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
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
    """Translate a `config.json`; missing keys have the defaults of transformers' configuration classes.

    RoPE is read in both notations: `rope_theta` beside `rope_scaling` (transformers 4), and `rope_parameters` (5).

    Args:
        where: the file, for messages.

    Raises:
        CheckpointError: another model type, or an option that this package has no counterpart for.
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        raise CheckpointError(
            f"{where}: model_type is {name!r}; expected one of {', '.join(FAMILIES)} (mixtures of experts and "
            f"multimodal models are not supported)"
        )
    family = FAMILIES[name]
    _check_class(config, family, where)
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    settings = {**family.left_out, **rope, **config}
    _check_constants(family, settings, where)
    for key in _SIZES:
        if key not in config:
            raise CheckpointError(f"{where}: key {key!r} is missing")
        if not isinstance(config[key], int) or config[key] < 1:
            raise CheckpointError(f"{where}: {key} is {config[key]!r}; expected a positive integer")
    heads = config["num_attention_heads"]
    return Architecture(
        family=name,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=settings.get("num_key_value_heads") or heads,
        head_dim=settings.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_position_embeddings=settings.get("max_position_embeddings", 2048),
        norm_epsilon=settings.get(_epsilon(family), 1e-6),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rotary_percent=settings.get("partial_rotary_factor") or 1.0,
        rope_scaling=_rope_scaling(rope, where),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        init_std=settings.get("initializer_range", 0.02),
        attention_dropout=config.get("attention_dropout") or 0.0,
    )


def _check_class(config: dict[str, Any], family: Family, where: Path | str) -> None:
    """Refuse models of other tasks and quantised ones, with the kind found."""
    for name in config.get("architectures") or ():
        if not str(name).endswith((_CAUSAL, _CLASSIFIER)):
            backbone, tagger = (family.hf_class.replace(_CAUSAL, end) for end in ("Model", "ForTokenClassification"))
            kinds = {backbone: "a backbone without a head", tagger: "a token classifier"}
            kind = kinds.get(str(name), "a model of another task")
            raise CheckpointError(
                f"{where}: architectures names {name}, {kind}; expected {family.hf_class} or "
                f"{family.hf_class.replace(_CAUSAL, _CLASSIFIER)}"
            )
    quantised = config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method", "unknown method") if isinstance(quantised, dict) else quantised
        raise CheckpointError(
            f"{where}: quantization_config: quantised weights ({method}) are not read; dequantise the model with "
            f"transformers and save it, or use the original one"
        )


def _check_constants(family: Family, settings: dict[str, Any], where: Path | str) -> None:
    """Refuse options that this package has no counterpart for."""
    window, length = settings.get("sliding_window"), settings.get("max_position_embeddings")
    if "sliding_window" in family.constants and window is not None:
        if window < length:
            raise CheckpointError(
                f"{where}: sliding_window is {window}, less than max_position_embeddings {length}, and attention "
                f"through a window is not supported; to use the model up to the window only, set "
                f"max_position_embeddings to {window} there"
            )
        settings["sliding_window"] = None  # as wide as the longest text
    constants = {**family.constants, "hidden_act": _activation(family)}
    if not family.partial_rotary:
        constants["partial_rotary_factor"] = 1.0
    for key, value in constants.items():
        if settings.get(key, value) not in (value, None):
            raise CheckpointError(f"{where}: {key} is {settings[key]!r}; only {value!r} is supported")


def _activation(family: Family) -> str:
    return "silu" if family.gated else "relu2"


def _epsilon(family: Family) -> str:
    return "norm_eps" if family.layernorm1p else "rms_norm_eps"


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


def labels_from_config(config: dict[str, Any]) -> tuple[str, ...] | None:
    """Names of a sequence classifier's outputs in order, None for a language model.

    Unnamed outputs have transformers' default names LABEL_0, LABEL_1 and so on, two if no number is given.
    """
    if not any(name.endswith(_CLASSIFIER) for name in config.get("architectures") or ()):
        return None
    names = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(config.get("num_labels", 2))}
    return tuple(str(names[key]) for key in sorted(names, key=int))


def config_from_architecture(
    architecture: Architecture, dtype: str, labels: Sequence[str] | None = None
) -> dict[str, Any]:
    """The `config.json` of an architecture, in the notation that transformers 4 and 5 both read.

    Args:
        dtype: the type the weights are stored in ("float32", "bfloat16", "float16").
        labels: the outputs' names of a regressor, None for a language model.
    """
    family, scaling = family_of(architecture), architecture.rope_scaling
    rope = {"rope_type": "llama3", **{key: getattr(scaling, key) for key in _ROPE_SCALING}} if scaling else None
    heads = architecture.num_attention_heads
    partial = {"partial_rotary_factor": architecture.rotary_percent} if family.partial_rotary else {}
    classifier = {
        "architectures": [family.hf_class.replace(_CAUSAL, _CLASSIFIER)],
        "problem_type": "regression",  # transformers' pipeline and vLLM put no softmax on the values
        "id2label": {str(i): name for i, name in enumerate(labels or ())},
        "label2id": {name: i for i, name in enumerate(labels or ())},
    }
    return {
        "architectures": [family.hf_class],
        "model_type": architecture.family,
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": architecture.key_value_heads,
        "head_dim": architecture.head_size,
        "hidden_act": _activation(family),
        "max_position_embeddings": architecture.max_position_embeddings,
        "initializer_range": architecture.init_std,
        _epsilon(family): architecture.norm_epsilon,
        "rope_theta": architecture.rope_theta,
        "rope_scaling": rope,
        **partial,
        "tie_word_embeddings": architecture.tie_word_embeddings,
        **family.constants,
        "attention_dropout": architecture.attention_dropout,
        "torch_dtype": dtype,
        "use_cache": True,
        **(classifier if labels is not None else {}),
    }


def tensor_shapes(architecture: Architecture, outputs: int | None = None) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face model, in the order in which they are written.

    Args:
        outputs: None for a language model, K for a sequence classifier with K outputs.
    """
    family = family_of(architecture)
    hidden, ffn, head = architecture.hidden_size, architecture.ffn_hidden_size, architecture.head_size
    queries = architecture.num_attention_heads * head
    keys = architecture.key_value_heads * head
    norm = ("weight", "bias") if family.layernorm1p else ("weight",)
    layer: dict[str, tuple[int, ...]] = {f"input_layernorm.{kind}": (hidden,) for kind in norm}
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        layer[f"self_attn.{name}.weight"] = (rows, hidden)
        if family.qkv_bias:
            layer[f"self_attn.{name}.bias"] = (rows,)
    if family.qk_norm:
        layer |= {f"self_attn.{name}.{kind}": (head,) for name in ("q_norm", "k_norm") for kind in norm}
    layer["self_attn.o_proj.weight"] = (hidden, queries)
    layer |= {f"post_attention_layernorm.{kind}": (hidden,) for kind in norm}
    if family.gated:
        layer["mlp.gate_proj.weight"] = (ffn, hidden)
    layer |= {"mlp.up_proj.weight": (ffn, hidden), "mlp.down_proj.weight": (hidden, ffn)}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (architecture.vocab_size, hidden)}
    for i in range(architecture.num_layers):
        shapes.update({f"model.layers.{i}.{name}": shape for name, shape in layer.items()})
    shapes |= {f"model.norm.{kind}": (hidden,) for kind in norm}
    if outputs is not None:
        shapes[SCORE] = (outputs, hidden)
    elif not architecture.tie_word_embeddings:
        shapes[HEAD] = (architecture.vocab_size, hidden)
    return shapes
