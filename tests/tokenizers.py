"""Tokenizers for tests: small ones trained on the spot, and the real ones where the real data is at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

CORPUS = [
    "<extra_id_0>System\nA chat between a curious user and an assistant.\n<extra_id_1>User\nHello there, how are\n",
    "<extra_id_1>Assistant\n<extra_id_2>quality:4,toxicity:0,humor:2\nI am fine, thank you. And you?\n\nGood.  Bye!\n",
    "The quick brown fox jumps over the lazy dog. 0123456789 <x> extra id _ É ﬁ １ ＜ ＞ \t tabs, *stars* and #hashes",
]
KINDS = (
    "bpe", "bpe_markers", "bpe_nfkc", "bpe_lowercase", "sentencepiece", "sentencepiece_nfkc", "bpe_bert", "bpe_strip",
    "bpe_rewrite", "llama_like", "gpt2", "tok512",
)  # fmt: skip
FAITHFUL = ("bpe", "bpe_markers", "sentencepiece", "llama_like", "gpt2")  # decode(encode(text)) == text for any text


def real_data(name: str) -> Path:
    """Path of a real data file, or a skip that says where it was looked for."""
    folder = Path(os.environ.get("STEERLM_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / name).exists():
        pytest.skip(f"real data {folder / name} is not here (set STEERLM_REAL_DATA)")
    return folder / name


def kinds(names: Iterable[str]) -> list[Any]:
    """Parameters of a test, one a kind of tokenizer."""
    return [pytest.param(n, marks=pytest.mark.real_data if n in ("gpt2", "tok512") else ()) for n in names]


def of_kind(folder: Path, kind: str) -> Path:
    """A tokenizer of one of KINDS."""
    from tokenizers.normalizers import Replace

    if kind == "gpt2":
        return gpt2(folder)
    if kind == "llama_like":
        return llama_like(folder)
    if kind == "tok512":
        return real_data("stories260K/tok512.model")
    if kind == "sentencepiece":
        return sentencepiece_model(folder)
    if kind == "sentencepiece_nfkc":  # the markers are symbols of their own, matched in normalised text
        rule = {"normalization_rule_name": "nmt_nfkc_cf", "remove_extra_whitespaces": True}
        return sentencepiece_model(folder, user_symbols=True, **rule)
    named = {"bpe_nfkc": "NFKC", "bpe_lowercase": "Lowercase", "bpe_bert": "BertNormalizer"}
    normalizer = (named | {"bpe_strip": "StripAccents", "bpe_rewrite": Replace("@@", "")}).get(kind)
    return bpe(folder, markers=kind not in ("bpe", "bpe_strip"), normalizer=normalizer)


def bpe(folder: Path, *, markers: bool, normalizer: Any = None) -> Path:
    """A byte-level BPE folder trained on CORPUS; ``markers`` makes the three markers special tokens.

    ``normalizer`` is one, or the name of its class; the markers are then matched in normalised text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = getattr(normalizers, normalizer)() if isinstance(normalizer, str) else normalizer
    special = ["<|end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if markers:
        tokens = [AddedToken(f"<extra_id_{n}>", special=True, normalized=normalizer is not None) for n in range(3)]
        tokenizer.add_special_tokens(tokens)
    return _save(tokenizer, folder)


def llama_like(folder: Path) -> Path:
    """A folder as Llama 2's: BPE on characters, a dummy space before each text, unknown characters as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    scratch = Tokenizer(models.BPE())
    scratch.normalizer = normalizers.Replace(" ", "▁")
    letters = [line.replace(" ", "▁") for line in CORPUS]
    scratch.train_from_iterator(letters, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learnt = json.loads(scratch.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return _save(tokenizer, folder, end="</s>", pad=None)


def gpt2(folder: Path) -> Path:
    """The real GPT-2 BPE as a Hugging Face folder; the markers are ordinary text to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    files = [str(real_data(f"tok_gpt2/gpt2-{name}")) for name in ("vocab.json", "merges.txt")]
    tokenizer = Tokenizer(models.BPE.from_file(*files))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _save(tokenizer, folder, end="<|endoftext|>", pad=None)


def sentencepiece_model(folder: Path, *, user_symbols: bool = False, **settings: Any) -> Path:
    """A SentencePiece model trained on CORPUS, with byte fallback and its dummy prefix."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        user_defined_symbols=[f"<extra_id_{n}>" for n in range(3)] if user_symbols else [],
        minloglevel=2,
        **dict[str, Any]({"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **settings}),
    )
    return folder / "tokenizer.model"


def _save(tokenizer: object, folder: Path, end: str = "<|end|>", pad: str | None = "<|pad|>") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))  # type: ignore[attr-defined]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "clean_up_tokenization_spaces": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | ({"pad_token": pad} if pad else {})))
    return folder
