"""Regressors as sequence classifiers of transformers, which computes everything again: values, files, refusals."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_steerlm.conversation import Conversation
from nemo_steerlm.errors import CheckpointError
from nemo_steerlm.formats import hf_folder, model_folder
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import load_tokenizer
from tests import tokenizers
from tests.formats.classifiers import (
    CHAT_FORMATS,
    CHATS,
    FAMILIES,
    SCHEMA,
    export,
    import_,
    make_classifier,
    make_regressor,
    make_tokenizer,
    ours,
    stock,
)
from tests.formats.helpers import all_tensors, differing

KINDS: list[Any] = ["markers", "plain", "bos", "llama_like", "chatml", "llama3"]
KINDS += ["sentencepiece", "sentencepiece_symbols", "sentencepiece_nfkc"]
KINDS += [pytest.param("tok512", marks=pytest.mark.real_data)]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_alone_computes_the_same(tmp_path: Path, kind: str) -> None:
    others = {"plain": PromptTemplate(label_start="<|value|>", user="Human"), **CHAT_FORMATS}
    custom: dict[str, Any] = {"template": others[kind]} if kind in others else {}
    folder = make_regressor(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer", kind), **custom)
    said = export(folder, tmp_path / "hf")
    assert "Hugging Face regressor" in said
    assert said.endswith("; what reads one output, as RewardBench does, takes quality alone: use scalar=")
    values = ours(folder)
    assert values.std(0).min() > 0.05, "values so alike that any model would pass"
    torch.testing.assert_close(stock(tmp_path / "hf"), values, rtol=0, atol=1e-5)

    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.num_labels, config.problem_type) == (3, "regression")
    assert config.id2label == dict(enumerate(SCHEMA.names)) and config.label2id["verbosity"] == 2
    assert config.architectures == ["LlamaForSequenceClassification"] and config.pad_token_id is not None
    assert list(all_tensors(tmp_path / "hf"))[-1] == "score.weight"

    assert "regressor" in import_(tmp_path / "hf", tmp_path / "again")
    assert model_folder.read(tmp_path / "again") == model_folder.read(folder)
    export(tmp_path / "again", tmp_path / "hf again")
    assert differing(tmp_path / "hf", tmp_path / "hf again") == []


def test_a_head_stays_in_fp32_beside_a_bf16_trunk(tmp_path: Path) -> None:
    folder = make_regressor(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer", "markers"), torch.bfloat16)
    export(folder, tmp_path / "hf")
    tensors = all_tensors(tmp_path / "hf")
    assert tensors["score.weight"].dtype == torch.float32 and tensors["model.norm.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(stock(tmp_path / "hf"), ours(folder), rtol=0, atol=1e-5)
    import_(tmp_path / "hf", tmp_path / "again")
    export(tmp_path / "again", tmp_path / "hf again")
    assert differing(tmp_path / "hf", tmp_path / "hf again") == []


SPACES = {"normalization_rule_name": "nmt_nfkc_cf", "remove_extra_whitespaces": True}


@pytest.mark.parametrize("settings", [{}, SPACES, {"user_symbols": True}, {"user_symbols": True, **SPACES}])
def test_a_converted_sentencepiece_model_reads_alike(tmp_path: Path, settings: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    from nemo_steerlm.formats.hf_folder import _convert_sentencepiece

    reference = load_tokenizer(tokenizers.sentencepiece_model(tmp_path, **settings))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False}))
    _convert_sentencepiece(tmp_path)
    converted = AutoTokenizer.from_pretrained(tmp_path)
    draw = random.Random(1)
    pieces = [" ", "  ", "\n", "\t", "a", "The quick", "assistant", "É", "ﬁ", "１", "你好", "🙂", "e\u0301", "\u3000"]
    pieces += ["▁", "\x00", "\u200b", "\u2028", "quality:4", "<extra_id_1>", "<extra_id_2>"]
    if "user_symbols" not in settings:  # beside those, a special token's name may be taken for the token
        pieces += ["<s>", "</s>", "<unk>", "<0x0A>"]
    texts = ["", " ", *("".join(draw.choices(pieces, k=draw.randint(1, 9))) for _ in range(500))]
    theirs = converted(texts, add_special_tokens=False)["input_ids"]
    assert [(t, ids) for t, ids in zip(texts, theirs, strict=True) if ids != reference.encode(t)] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_of_others_is_a_regressor(tmp_path: Path, family: str) -> None:
    names = {"id2label": dict(enumerate(SCHEMA.names))}
    model = make_classifier(tmp_path / "theirs", family, **names)
    said = import_(tmp_path / "theirs", tmp_path / "model")
    assert "regressor of quality 0 to 4, humor 0 to 4" in said  # nothing says so: whoever imports has to see it
    card = model_folder.read(tmp_path / "model")
    assert card.kind == "regressor" and card.schema is not None and card.schema.names == SCHEMA.names
    conversations = [Conversation.from_record({"messages": chat}) for chat in CHATS]
    tokenizer = load_tokenizer(tmp_path / "theirs")
    for conversation, values in zip(conversations, ours(tmp_path / "model"), strict=True):
        ids = card.template.encode_regression(conversation, len(conversation.turns) - 1, tokenizer)
        with torch.no_grad():
            torch.testing.assert_close(model(torch.tensor([ids])).logits[0], values, rtol=0, atol=2e-5)
    export(tmp_path / "model", tmp_path / "hf")
    assert differing(tmp_path / "theirs", tmp_path / "hf") == []


def _change(folder: Path, case: str) -> None:
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    if case == "no head":
        del tensors["score.weight"]
    elif case == "a bias":
        tensors["score.bias"] = torch.zeros(3)
    elif case == "other size":
        tensors["score.weight"] = torch.zeros(2, 32)
    elif case == "called a language model":
        config["architectures"] = ["LlamaForCausalLM"]
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no head", "1 tensors are missing: score.weight"),
        ("a bias", "does not have: score.bias"),
        ("other size", "score.weight has shape [2, 32], its configuration asks for [3, 32]"),
        ("called a language model", "tensors are missing: lm_head.weight"),
    ],
)
def test_a_wrong_head_is_refused(tmp_path: Path, case: str, message: str) -> None:
    make_classifier(tmp_path / "theirs", id2label=dict(enumerate(SCHEMA.names)))
    _change(tmp_path / "theirs", case)
    with pytest.raises(CheckpointError) as caught:
        import_(tmp_path / "theirs", tmp_path / "model")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_an_export_that_reads_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", "plain")
    markers = PromptTemplate(label_start="<|pad|>", turn_start="<|end|>")  # all special tokens that there are
    folder = make_regressor(tmp_path / "padded", tokenizer, template=markers)
    with pytest.raises(CheckpointError, match="ends with the padding token '<.pad.>'"):
        export(folder, tmp_path / "hf")
    folder = make_regressor(tmp_path / "model", tokenizer)
    monkeypatch.setattr(hf_folder, "chat_template", lambda template: "{{ messages[0].content }}")
    with pytest.raises(CheckpointError, match="chat template renders 'Hello, .* was trained on .<extra_id_0>"):
        export(folder, tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer", "padded", "model"}
