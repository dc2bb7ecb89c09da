"""What the benchmarks work on: real conversations where they are at hand, one tokenizer, one random Llama."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
REAL_DATA = Path(os.environ.get("STEERLM_REAL_DATA", ROOT.parent / "shared" / "data"))
TREES = REAL_DATA / "oasst1_en_val.dev.trees.jsonl.gz"
VOCABULARY = 4096
SHAPE = {  # small enough for a CPU, deep enough that a layer and not the interpreter sets the pace
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def source() -> str:
    """Where the conversations come from, for the record."""
    return f"OASST1 ({TREES.name})" if TREES.is_file() else "the synthetic world (no real data at hand)"


def preset() -> str:
    """The attribute schema of the conversations."""
    return "helpsteer" if TREES.is_file() else "synthetic"


def prepare(folder: Path) -> Path:
    """Fill `folder` once: `conversations.jsonl`, `llama/` (a Hugging Face folder with its tokenizer); returns it."""
    if (folder / "llama" / "tokenizer.json").is_file():
        return folder
    from nemo_steerlm.config import AttributesConfig, PrepareConfig
    from nemo_steerlm.data import prepare as data

    real = TREES.is_file()
    config = PrepareConfig(
        source="oasst" if real else "synthetic", input=str(TREES) if real else None, output=str(folder / "data"),
        attributes=AttributesConfig(preset=preset()), val_fraction=0.02,
    )  # fmt: skip
    data.main(config)
    (folder / "data" / "train.jsonl").rename(folder / "conversations.jsonl")
    _llama(folder / "llama", folder / "conversations.jsonl")
    return folder


def _llama(folder: Path, conversations: Path) -> None:
    """A random Llama with a byte-level BPE of `VOCABULARY` entries trained on the conversations."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from nemo_steerlm.conversation import read_conversations

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    texts = (turn.text for row in read_conversations(conversations) for turn in row.turns)
    tokenizer.train_from_iterator(texts, trainer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SHAPE))
    model.save_pretrained(folder)
    names = dict(eos_token="<|end|>", pad_token="<|end|>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def dense_items(count: int, length: int) -> list[dict[str, np.ndarray]]:
    """Random sequences of one length, every token a target."""
    random = np.random.default_rng(0)
    mask = np.ones(length, dtype=bool)
    return [{"tokens": random.integers(1, VOCABULARY, length), "loss_mask": mask} for _ in range(count)]
