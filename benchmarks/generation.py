"""Answers of mixed lengths to prompts of mixed lengths, beside transformers' `generate` in batches of arrival order.

Both sides have the same weights, prompts and ids that end an answer; greedy answers are the same tokens. A rate counts
the tokens of the answers, the ones that end them included, and not what a batch computes for rows that have ended.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Row, compare

PROMPTS, NEW = 64, 64
LENGTHS = (5, 200)  # of the prompts, uniform
VOCABULARY = 4096
SHAPE = {  # untied and with large weights: a small tied Llama that was never trained repeats itself
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.1,
}  # fmt: skip
STOPS = 1 / 40  # share of the vocabulary that ends an answer of the random Llama
STORIES = Path(os.environ.get("STEERLM_REAL_DATA", Path(__file__).parents[2] / "shared" / "data")) / "stories260K"


def rows(folder: Path, runs: int) -> Iterator[Row]:
    """Measure everything here; `folder` takes the models."""
    cases = {"6 layers of 256": _random_llama(folder / "generation-llama")}
    if STORIES.is_dir():
        cases["stories260K"] = _stories(folder / "generation-stories")
    for name, model in cases.items():
        for batch, top_k in ((8, 0), (32, 50)):
            how = f"sampled, top_k={top_k}" if top_k else "greedy"
            yield from compare(
                ours, {f"generate vs transformers, {name}, batch {batch}, {how}": (transformers, 1.0)},
                unit="tokens", runs=runs, model=model, batch=batch, top_k=top_k,
            )  # fmt: skip


def ours(model: Path, batch: int, top_k: int) -> Iterator[float]:
    """Tokens a second of `nemo_steerlm.megatron.generation.generate`."""
    from nemo_steerlm.config import ParallelConfig
    from nemo_steerlm.formats import hf, hf_config
    from nemo_steerlm.formats.safetensors_files import SafetensorsFolder
    from nemo_steerlm.megatron import gpt, parallel
    from nemo_steerlm.megatron.drawing import SamplingSettings
    from nemo_steerlm.megatron.generation import generate

    parallel.initialize()
    architecture = hf_config.architecture_from_config(hf_config.read_config(model / "config.json"), model)
    chunks = gpt.build(architecture, ParallelConfig())
    hf.load(SafetensorsFolder(model), chunks, architecture)
    work = json.loads((model / "work.json").read_text())
    settings = SamplingSettings(
        max_new_tokens=NEW, temperature=float(top_k > 0), top_k=top_k, stop=tuple(map(_Numbers.text, work["stops"]))
    )
    tokenizer: Any = _Numbers()
    while True:
        started = time.perf_counter()
        answers = generate(
            chunks[0], tokenizer, work["prompts"], settings, vocab_size=architecture.vocab_size, batch_size=batch
        )
        seconds = time.perf_counter() - started
        yield sum(len(answer.tokens) + (answer.finish != "length") for answer in answers) / seconds


def transformers(model: Path, batch: int, top_k: int) -> Iterator[float]:
    """Tokens a second of `LlamaForCausalLM.generate` over left-padded batches."""
    import torch
    from transformers import AutoModelForCausalLM

    reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    work = json.loads((model / "work.json").read_text())
    how = dict(do_sample=True, top_k=top_k, temperature=1.0) if top_k else dict(do_sample=False)
    while True:
        count, started = 0, time.perf_counter()
        for start in range(0, PROMPTS, batch):
            prompts = work["prompts"][start : start + batch]
            width = max(map(len, prompts))
            ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            with torch.inference_mode():
                new = reference.generate(
                    ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=work["stops"], pad_token_id=0, **how
                )[:, width:]
            ends = np.isin(new.numpy(), work["stops"])
            count += int(np.where(ends.any(1), ends.argmax(1) + 1, NEW).sum())
        yield count / (time.perf_counter() - started)


class _Numbers:
    """A tokenizer for ids that spell nothing: each is its own text."""

    eos_id = None

    @staticmethod
    def text(token: int) -> str:
        return f"<{token}>"

    def token_id(self, text: str) -> int:
        return int(text[1:-1])

    def decode_continuation(self, tokens: list[int]) -> str:
        return "".join(map(self.text, tokens))


def _random_llama(folder: Path) -> Path:
    """A Llama that was never trained, random prompts, and random ids that end an answer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    random = np.random.default_rng(0)
    prompts = [random.integers(0, VOCABULARY, length).tolist() for length in _lengths()]
    stops = random.choice(VOCABULARY, int(STOPS * VOCABULARY), replace=False).tolist()
    return _write(folder, prompts, stops)


def _stories(folder: Path) -> Path:
    """The stories260K model; prompts are beginnings of stories it told, an answer is the rest of the sentence."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nemo_steerlm.formats.hf_config import config_from_architecture
    from nemo_steerlm.formats.llama2c import Llama2cFile
    from nemo_steerlm.tokenizer import load_tokenizer

    source = Llama2cFile(STORIES / "stories260K.bin")
    model: Any = LlamaForCausalLM(LlamaConfig(**config_from_architecture(source.architecture, "float32")))
    model.load_state_dict({name: source.read(name) for name in source.shapes()}, strict=False)
    model.tie_weights()
    model.save_pretrained(folder)
    torch.manual_seed(0)
    begin, longest = torch.ones(PROMPTS, 1, dtype=torch.int64), LENGTHS[1]
    told = model.generate(begin, do_sample=True, max_new_tokens=longest, min_new_tokens=longest, pad_token_id=0)
    prompts = [story[:length] for story, length in zip(told.tolist(), _lengths(), strict=True)]
    stop = load_tokenizer(STORIES / "tok512.model").token_id(".")
    return _write(folder, prompts, [stop])


def _lengths() -> list[int]:
    return np.random.default_rng(1).integers(LENGTHS[0], LENGTHS[1] + 1, PROMPTS).tolist()


def _write(folder: Path, prompts: list[list[int]], stops: list[Any]) -> Path:
    (folder / "work.json").write_text(json.dumps({"prompts": prompts, "stops": stops}))
    return folder
