"""Small Llama models of transformers and what the tests of every format do with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_steerlm.config import ExportConfig, ImportConfig, ParallelConfig
from nemo_steerlm.config.layout import padded_vocabulary
from nemo_steerlm.formats import model_folder
from nemo_steerlm.megatron import gpt, inference, parallel
from nemo_steerlm.verbs import convert
from tests.megatron.reference import forward

SHAPES: dict[str, dict[str, Any]] = {
    # Llama 2: as many key heads as query heads, a head of its own, a vocabulary that needs padding (250 -> 256)
    "llama2": dict(
        vocab_size=250, hidden_size=64, intermediate_size=88, num_hidden_layers=4, num_attention_heads=4,
        tie_word_embeddings=False, rms_norm_eps=1e-6,
    ),
    # Llama 3.1 and 3.2: grouped queries, tied, scaled RoPE whose blend lies inside the tested length, head_dim apart
    # from hidden / heads, and so few words that the second tensor-parallel rank holds padding only (60 -> 128)
    "llama3": dict(
        vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=12, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_parameters=dict(
            rope_theta=500000.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
}  # fmt: skip


def make_model(folder: Path, shape: str, **save: Any) -> Any:
    """A random Llama with its tokenizer, written by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, initializer_range=0.12, **SHAPES[shape])).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # not all ones, or exchanging two of them would go unseen
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder, **save)
    make_tokenizer(folder)
    return model


def make_tokenizer(folder: Path, words: int = 60) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def sample_tokens(shape: str) -> torch.Tensor:
    return torch.randint(0, SHAPES[shape]["vocab_size"], (2, 48), generator=torch.Generator().manual_seed(5))


def to_folder(source: Path, output: Path, layout: ParallelConfig | None = None) -> str:
    layout = layout or ParallelConfig()
    return convert.import_main(ImportConfig(input=str(source), output=str(output), parallel=layout))


def to_hf(folder: Path, output: Path, layout: ParallelConfig | None = None, **settings: Any) -> str:
    layout = layout or ParallelConfig()
    return convert.export_main(ExportConfig(checkpoint=str(folder), output=str(output), parallel=layout, **settings))


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face folder."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def differing(a: Path, b: Path) -> list[str]:
    """Names of the tensors that are not the same bits in both folders."""
    left, right = all_tensors(a), all_tensors(b)
    return sorted(
        name
        for name in left.keys() | right.keys()
        if name not in left or name not in right or not torch.equal(left[name], right[name])
    )


@torch.no_grad()
def megatron_logits(folder: Path, tokens: torch.Tensor, layout: ParallelConfig) -> torch.Tensor:
    """Logits `[batch, seq, padded vocabulary]` of a model folder at a layout, on every rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    parallel.initialize(layout)
    architecture = model_folder.read(folder).architecture
    chunks = gpt.build(architecture, layout)
    model_folder.load_weights(folder, chunks)
    output = forward(chunks[0].eval(), tokens)
    logits = torch.empty(*tokens.shape, padded_vocabulary(architecture))
    if parallel_state.is_pipeline_last_stage():
        logits = gather_from_tensor_model_parallel_region(output).contiguous()
    return inference.broadcast_from_last_stage(logits)
