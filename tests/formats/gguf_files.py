"""Small GGUF files, written as llama.cpp's converter does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tokenizers

gguf = pytest.importorskip("gguf")

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
CHAT = "{% for m in messages %}{{ '<|end|>' + m['role'] + '\n' + m['content'] }}{% endfor %}"


def make_model(vocabulary: int, *, tied: bool = True, heads: int = 4, **config: Any) -> Any:
    """A random Llama whose rows can be quantised, with grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = dict(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(initializer_range=0.12, **sizes, **config)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model


def write_gguf(path: Path, model: Any, tokenizer: dict[str, Any], kind: str = "F32", **keys: Any) -> Path:
    """Write a model as llama.cpp's converter does: its names, neighbouring elements of a head beside each other.

    Args:
        tokenizer: keys below `tokenizer.`.
        kind: how matrices are stored.
        keys: more metadata, or other values (None leaves a key out); dots are written as two underscores.
    """
    c = model.config
    fields: dict[str, Any] = {
        "general.architecture": "llama", "general.name": "tiny", "llama.block_count": c.num_hidden_layers,
        "llama.context_length": c.max_position_embeddings, "llama.embedding_length": c.hidden_size,
        "llama.feed_forward_length": c.intermediate_size, "llama.attention.head_count": c.num_attention_heads,
        "llama.attention.head_count_kv": c.num_key_value_heads, "llama.rope.dimension_count": c.head_dim,
        "llama.attention.key_length": c.head_dim, "llama.rope.freq_base": float(c.rope_parameters["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": c.rms_norm_eps, "llama.vocab_size": c.vocab_size,
        **{f"tokenizer.{key}": value for key, value in tokenizer.items()},
        **{key.replace("__", "."): value for key, value in keys.items()},
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture"))
    for key, value in fields.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        parts = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
        plain = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}.get(parts[0])
        values = tensor.numpy()
        if parts[-1] in ("self_attn.q_proj", "self_attn.k_proj"):
            values = values.reshape(-1, 2, c.head_dim // 2, c.hidden_size).swapaxes(1, 2).reshape(values.shape)
        stored = gguf.GGMLQuantizationType["F32" if values.ndim == 1 else kind]
        writer.add_tensor(
            f"{plain or f'blk.{parts[1]}.{NAMES[parts[-1]]}'}.weight", gguf.quantize(values, stored), raw_dtype=stored
        )
    if scaling := c.rope_parameters.get("factor"):
        low, high, old = (c.rope_parameters[k] for k in (
            "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
        ))  # fmt: skip
        factors = []
        for k in range(0, c.head_dim, 2):
            length = 2 * np.pi * c.rope_parameters["rope_theta"] ** (k / c.head_dim)
            smooth = (old / length - low) / (high - low)
            blend = 1 / ((1 - smooth) / scaling + smooth)
            factors.append(1.0 if length < old / high else scaling if length > old / low else blend)
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return path


def bpe_fields(folder: Path, pre: str = "smollm", cut: Any = None) -> dict[str, Any]:
    """A byte-level BPE as GGUF has it; the folder is the original, which cuts words by `cut` (None: each digit)."""
    from tokenizers import pre_tokenizers

    tokenizers.bpe(folder, markers=True)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cut = cut or pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    state = json.loads((folder / "tokenizer.json").read_text())
    state["pre_tokenizer"] = json.loads(cut.__getstate__())
    (folder / "tokenizer.json").write_text(json.dumps(state))
    vocabulary = state["model"]["vocab"] | {token["content"]: token["id"] for token in state["added_tokens"]}
    special = {token["content"] for token in state["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return {
        "ggml.model": "gpt2", "ggml.pre": pre, "ggml.tokens": tokens,
        "ggml.token_type": [3 if token in special else 1 for token in tokens],
        "ggml.merges": [" ".join(pair) for pair in state["model"]["merges"]],
        "ggml.eos_token_id": vocabulary["<|end|>"], "ggml.padding_token_id": vocabulary["<|pad|>"],
        "ggml.add_bos_token": False, "chat_template": CHAT,
    }  # fmt: skip
