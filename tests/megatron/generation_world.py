"""What the tests of generation share: a random Llama and prompts for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_steerlm.config import Architecture, ParallelConfig
from nemo_steerlm.formats import hf
from nemo_steerlm.formats.safetensors_files import SafetensorsFolder
from nemo_steerlm.megatron import gpt, parallel
from nemo_steerlm.megatron.drawing import SamplingSettings
from nemo_steerlm.megatron.generation import Generation, generate
from nemo_steerlm.tokenizer import load_tokenizer
from tests import tokenizers

CONTEXT, NEW = 48, 24
# Ragged, and so near the model's limit that rows end at different steps: finished rows leave the batch.
LENGTHS = (3, 17, 1, 30, 30, 9, 40, 45, 2, 47)


def architecture(vocab_size: int) -> Architecture:
    return Architecture(
        num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2,
        vocab_size=vocab_size, max_position_embeddings=CONTEXT,
    )  # fmt: skip


def build(folder: str | Path, vocab_size: int, layout: ParallelConfig) -> gpt.LanguageModel:
    parallel.initialize(layout)
    chunks = gpt.build(architecture(vocab_size), layout)
    hf.load(SafetensorsFolder(Path(folder)), chunks, architecture(vocab_size))
    return chunks[0]


def make_prompts(vocab_size: int) -> list[list[int]]:
    random = np.random.default_rng(1)
    return [random.integers(0, vocab_size, length).tolist() for length in LENGTHS]


class World:
    """One random Llama as transformers and as megatron-core see it."""

    def __init__(self, folder: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.tokenizer = load_tokenizer(tokenizers.bpe(folder / "tokenizer", markers=True))
        self.vocab_size = self.tokenizer.vocab_size  # not a multiple of 128: padded logits exist
        plan = architecture(self.vocab_size)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5,
            initializer_range=0.2, rope_theta=plan.rope_theta, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        self.reference = LlamaForCausalLM(config).eval()
        self.folder = folder / "hf"
        self.reference.save_pretrained(self.folder)
        self.model = build(self.folder, self.vocab_size, ParallelConfig())
        self.prompts = make_prompts(self.vocab_size)

    def generate(self, prompts: list[list[int]] | None = None, **settings: Any) -> list[Generation]:
        kwargs = {name: settings.pop(name) for name in ("batch_size", "seeds", "progress") if name in settings}
        settings.setdefault("max_new_tokens", NEW)
        return generate(
            self.model, self.tokenizer, prompts or self.prompts, SamplingSettings(**settings),
            vocab_size=self.vocab_size, **kwargs,
        )  # fmt: skip

    @torch.no_grad()
    def expected(self, prompt: list[int]) -> tuple[list[int], float]:
        """transformers' greedy continuation up to the model's limit or EOS, and its log probability."""
        count = min(NEW, CONTEXT - len(prompt))
        given = torch.tensor([prompt])  # without a mask transformers takes tokens that equal its padding for padding
        mask = torch.ones_like(given)
        ids = self.reference.generate(given, attention_mask=mask, max_new_tokens=count, do_sample=False)
        new = ids[0, len(prompt) :].tolist()
        if self.tokenizer.eos_id in new:
            new = new[: new.index(self.tokenizer.eos_id) + 1]
        logits = self.reference(ids).logits[0, len(prompt) - 1 :].double().log_softmax(-1)
        return new, sum(float(logits[i, token]) for i, token in enumerate(new))
