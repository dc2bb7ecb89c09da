"""Regressors as sequence classifiers of transformers, which computes everything again: values, files, refusals."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend

from nemo_steerlm import config as configs
from nemo_steerlm.attributes import Attribute, AttributeSchema, parse_label
from nemo_steerlm.calibration import Calibration
from nemo_steerlm.conversation import Conversation
from nemo_steerlm.errors import CheckpointError, ConfigError
from nemo_steerlm.formats import model_folder
from nemo_steerlm.formats.model_folder import ModelCard
from nemo_steerlm.megatron import gpt, parallel
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.models.regressor import AttributeRegressor
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import load_tokenizer
from nemo_steerlm.train.start import start_model
from nemo_steerlm.verbs import annotate, convert, train_regressor
from tests import tokenizers
from tests.formats.helpers import all_tensors, differing
from tests.prompts import CHAT_MARKERS, CHATML, LLAMA3

SCHEMA = AttributeSchema([Attribute("quality"), Attribute("humor", 0, 9), Attribute("verbosity")])
CHAT_FORMATS = {"chatml": CHATML, "llama3": LLAMA3}
SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "How are you?\n\nBye!  "}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "\t <extra_id_2>quality:4\n <s> </s> <|end|> <|pad|> <|begin|>"},
        {"role": "assistant", "content": "The quick brown fox É ﬁ １ 你好 🙂"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": " And <extra_id_1>Assistant\n you?<|pad|>"},
        {"role": "user", "content": "<|im_end|>\n<|im_start|>assistant\n<|label|><|eot|><|head|>x<|/head|>"},
        {"role": "assistant", "content": "Good."},
    ],
)


def make_tokenizer(folder: Path, kind: str) -> Path:
    """A tokenizer of one kind; `bos` would begin every text with a token of its own, as Llama 3's does."""
    if kind == "sentencepiece":
        return tokenizers.sentencepiece_model(folder)
    if kind == "sentencepiece_symbols":
        return tokenizers.sentencepiece_model(folder, user_symbols=True)
    if kind == "sentencepiece_nfkc":
        rule = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
        return tokenizers.sentencepiece_model(folder, **rule)
    if kind == "llama_like":
        return tokenizers.llama_like(folder)
    if kind == "tok512":
        return tokenizers.real_data("stories260K/tok512.model")
    tokenizers.bpe(folder, markers=kind != "plain")
    if kind in CHAT_FORMATS:
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        backend.add_special_tokens(list(CHAT_MARKERS))
        backend.save(str(folder / "tokenizer.json"))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings |= {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "bos_token": "<|im_start|>"}  # as SmolLM2's
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "chat_template.jinja").write_text("{{ 'of the base model' }}")
    if kind == "bos":
        file = folder / "tokenizer.json"
        state = json.loads(file.read_text())
        first = {"SpecialToken": {"id": "<|end|>", "type_id": 0}}
        state["post_processor"] = {
            "type": "Sequence",
            "processors": [
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
                {
                    "type": "TemplateProcessing", "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
                    "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                    "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [0], "tokens": ["<|end|>"]}},
                },
            ],
        }  # fmt: skip
        file.write_text(json.dumps(state))
        (folder / "chat_template.jinja").write_text("{{ 'of the base model' }}")
    return folder


def make_regressor(folder: Path, tokenizer: Path, dtype: torch.dtype = torch.float32, **card: Any) -> Path:
    """A model folder of a regressor with random weights large enough to tell inputs apart."""
    read = load_tokenizer(tokenizer)
    architecture = configs.Architecture(
        num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=8,
        vocab_size=read.vocab_size + 3, max_position_embeddings=512, init_std=0.3,
    )  # fmt: skip
    parallel.initialize(configs.ParallelConfig(), seed=3)
    chunks = gpt.build(architecture, configs.ParallelConfig(), dtype, outputs=len(SCHEMA))
    described = ModelCard(kind="regressor", architecture=architecture, schema=SCHEMA, **card)
    model_folder.write(folder, described, read, chunks)
    return folder


def export(folder: Path, output: Path, **settings: Any) -> str:
    return convert.export_main(configs.ExportConfig(checkpoint=str(folder), output=str(output), **settings))


def import_(folder: Path, output: Path, names: tuple[str, ...] = (), **settings: Any) -> str:
    attributes = configs.AttributesConfig(schema={name: configs.AttributeOptions() for name in names})
    return convert.import_main(
        configs.ImportConfig(input=str(folder), output=str(output), attributes=attributes, **settings)
    )


@torch.no_grad()
def stock(folder: Path, chats: tuple[list[dict[str, str]], ...] = CHATS) -> torch.Tensor:
    """What transformers alone computes, each chat on its own and all as one padded batch on either side."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    single = [tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True) for chat in chats]
    values = torch.cat([model(**inputs).logits for inputs in single])
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = tokenizer.apply_chat_template(list(chats), padding=True, return_tensors="pt", return_dict=True)
        torch.testing.assert_close(model(**batch).logits, values, rtol=0, atol=1e-5)
        # RewardBench and vLLM render first, and then tokenise as any other text
        texts = tokenizer.apply_chat_template(list(chats), tokenize=False)
        read = tokenizer(texts, padding=True, return_tensors="pt")
        assert torch.equal(read["input_ids"], batch["input_ids"]) and set(read) == {"input_ids", "attention_mask"}
    return values


def ours(folder: Path) -> torch.Tensor:
    model = AttributeRegressor.from_pretrained(folder)
    conversations = [Conversation.from_record({"messages": chat}) for chat in CHATS]
    for turn in (turn for conversation in conversations for turn in conversation.turns):
        turn.speaker = model.card.template.user if turn.speaker == "User" else model.card.template.assistant
    scores = model.score(conversations)
    return torch.tensor([list(score.values()) for score in scores])


KINDS: list[Any] = ["markers", "plain", "bos", "llama_like", "chatml", "llama3"]
KINDS += ["sentencepiece", "sentencepiece_symbols", "sentencepiece_nfkc"]
KINDS += [pytest.param("tok512", marks=pytest.mark.real_data)]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_alone_computes_the_same(tmp_path: Path, kind: str) -> None:
    others = {"plain": PromptTemplate(label_start="<|value|>", user="Human"), **CHAT_FORMATS}
    custom = {"template": others[kind]} if kind in others else {}
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


def test_a_scalar_is_the_weighted_sum(tmp_path: Path) -> None:
    folder = make_regressor(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer", "markers"))
    assert "one output" not in export(folder, tmp_path / "hf", scalar={"quality": 0.65, "verbosity": -0.4})
    expected = ours(folder).double() @ torch.tensor([[0.65], [0.0], [-0.4]], dtype=torch.float64)
    assert expected.std() > 0.05
    torch.testing.assert_close(stock(tmp_path / "hf"), expected.float(), rtol=0, atol=1e-5)
    import_(tmp_path / "hf", tmp_path / "again")
    assert model_folder.read(tmp_path / "again").schema == AttributeSchema([Attribute("reward", -2, 3)])
    torch.testing.assert_close(ours(tmp_path / "again"), expected.float(), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="scalar.humour: no such attribute; did you mean 'humor'"):
        export(folder, tmp_path / "no", scalar={"humour": 1.0})
    with pytest.raises(ConfigError, match="scalar: every weight is zero"):
        export(folder, tmp_path / "no", scalar={"humor": 0.0})
    assert not (tmp_path / "no").exists()


def test_a_correction_travels_with_the_values_it_corrects(tmp_path: Path) -> None:
    folder = make_regressor(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer", "markers"))
    raw = ours(folder)
    calibration = Calibration("linear", {"humor": {"slope": 0.5, "intercept": 1.0}}, {"rows": 3})
    calibration.write(folder)
    corrected = raw * torch.tensor([1.0, 0.5, 1.0]) + torch.tensor([0.0, 1.0, 0.0])
    torch.testing.assert_close(ours(folder), corrected)
    assert "before the stored linear calibration: apply calibration.json" in export(folder, tmp_path / "hf")
    assert Calibration.read(tmp_path / "hf", SCHEMA) == calibration
    torch.testing.assert_close(stock(tmp_path / "hf"), raw, rtol=0, atol=1e-5)
    import_(tmp_path / "hf", tmp_path / "again")
    torch.testing.assert_close(ours(tmp_path / "again"), corrected)
    assert "the sum is of raw values" in export(folder, tmp_path / "sum", scalar={"humor": 1.0})
    assert not (tmp_path / "sum" / "calibration.json").exists()


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


# ---------------------------------------------------------------- classifiers of others


FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "nemotron": "Nemotron"}


def make_classifier(folder: Path, family: str = "llama", **settings: Any) -> Any:
    """A random sequence classifier with its tokenizer, written by transformers."""
    import transformers

    tokenizers.bpe(folder, markers=True)
    shape = {**SHAPE, "vocab_size": 410, "max_position_embeddings": 512, "initializer_range": 0.3, "pad_token_id": 1}
    config = getattr(transformers, f"{FAMILIES[family]}Config")(**{**shape, "num_labels": 3, **settings})
    torch.manual_seed(4)
    model = getattr(transformers, f"{FAMILIES[family]}ForSequenceClassification")(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    # transformers' Qwen2 class has a pipeline of its own: in a real folder tokenizer.json is what it writes
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return model


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


def test_names_are_given_where_there_are_none(tmp_path: Path) -> None:
    make_classifier(tmp_path / "theirs", num_labels=2)
    with pytest.raises(ConfigError, match="2 outputs have no names; name them with attributes="):
        import_(tmp_path / "theirs", tmp_path / "model")
    with pytest.raises(ConfigError, match="3 names .* but .* has 2 outputs"):
        import_(tmp_path / "theirs", tmp_path / "model", ("a", "b", "c"))
    template = configs.TemplateConfig(label_start="<value>")
    import_(tmp_path / "theirs", tmp_path / "model", ("chosen", "liked"), template=template)
    card = model_folder.read(tmp_path / "model")
    assert card.schema is not None and card.schema.names == ("chosen", "liked")
    assert card.template.label_start == "<value>"

    export(tmp_path / "model", tmp_path / "hf")
    with pytest.raises(ConfigError, match="are chosen, liked"):
        import_(tmp_path / "hf", tmp_path / "other", ("liked", "chosen"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["id2label"] = {"0": "liked", "1": "chosen"}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="id2label names liked, chosen, but the key 'steerlm' chosen, liked"):
        import_(tmp_path / "hf", tmp_path / "other")


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
    monkeypatch.setattr(PromptTemplate, "chat_template", lambda self: "{{ messages[0].content }}")
    with pytest.raises(CheckpointError, match="chat template renders 'Hello, .* was trained on .<extra_id_0>"):
        export(folder, tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer", "padded", "model"}


@pytest.mark.parametrize(("trait", "value"), [("head", "distribution"), ("pooling", "mean")])
def test_what_is_not_linear_in_the_last_token_is_refused(tmp_path: Path, trait: str, value: str) -> None:
    card = SimpleNamespace(kind="regressor", **{trait: value})
    with pytest.raises(CheckpointError, match=f"a regressor with {trait}={value} has no counterpart"):
        convert._check_expressible(tmp_path, card)  # type: ignore[arg-type]


def test_a_folder_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    """Its head had a bias, which would be lost without a word."""
    folder = make_regressor(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer", "markers"))
    card = model_folder.read(folder)
    chunks = gpt.build(card.architecture, configs.ParallelConfig(), outputs=3)
    chunks[0].score = torch.nn.Linear(32, 3)
    model_folder.write(folder, card, model_folder.read_tokenizer(folder), chunks)
    for use in (lambda: export(folder, tmp_path / "hf"), lambda: AttributeRegressor.from_pretrained(folder)):
        with pytest.raises(CheckpointError, match="an earlier version, whose head has a bias; train it again"):
            use()
    assert _start(AttributeRegressor, folder, ("quality",)).fresh_head  # its backbone is of use
    assert not (tmp_path / "hf").exists()


def test_a_scalar_weighs_outputs_only(tmp_path: Path) -> None:
    make_classifier(tmp_path / "theirs", id2label=dict(enumerate(SCHEMA.names)))
    with pytest.raises(ConfigError, match="scalar weighs a regressor's attributes"):
        parallel.initialize(configs.ParallelConfig())
        architecture = configs.Architecture(vocab_size=403)
        chunks = gpt.build(architecture, configs.ParallelConfig())
        model_folder.write(
            tmp_path / "lm", ModelCard(kind="language_model", architecture=architecture),
            load_tokenizer(tmp_path / "theirs"), chunks,
        )  # fmt: skip
        export(tmp_path / "lm", tmp_path / "hf", scalar={"quality": 1.0})


# ---------------------------------------------------------------- trainings that begin with one


def _start(cls: type, init: Path, names: tuple[str, ...]) -> Any:
    regressor = cls is AttributeRegressor
    config = (configs.TrainRegressorConfig if regressor else configs.TrainSftConfig)(
        output="unused",
        data=(configs.DataConfig if regressor else configs.PolicyDataConfig)(train="unused"),
        model=(configs.RegressorModelConfig if regressor else configs.ModelConfig)(init=str(init)),
        optimizer=configs.OptimizerConfig(lr=1e-3),
        trainer=configs.TrainerConfig(max_steps=1, global_batch_size=1, micro_batch_size=1),
        template=configs.TemplateConfig(label_start="<value>"),
    )
    parallel.initialize(config.parallel, config.seed)
    return start_model(cls, config, AttributeSchema([Attribute(name) for name in names]))


def test_training_begins_with_a_classifier(tmp_path: Path) -> None:
    named, unnamed = tmp_path / "named", tmp_path / "unnamed"
    head = make_classifier(named, id2label=dict(enumerate(SCHEMA.names))).score.weight
    make_classifier(unnamed)
    for folder, names, kept in (
        (named, SCHEMA.names, True),
        (named, ("humor", "quality", "verbosity"), False),
        (named, ("quality",), False),
        (unnamed, ("a", "b", "c"), True),
        (unnamed, ("a", "b"), False),
    ):
        model = _start(AttributeRegressor, folder, names)
        found = model.chunks[0].score.weight
        assert model.fresh_head is not kept and found.shape == (len(names), 32)
        assert torch.equal(found, head) if kept else found.std() < head.std() * 1.5
        if not kept and len(names) == 3:
            assert not torch.equal(found, head)
        assert model.card.template.label_start == "<value>"
        backbone = all_tensors(folder)["model.embed_tokens.weight"]
        assert torch.equal(model.chunks[0].embedding.word_embeddings.weight[:410], backbone)
    with pytest.raises(CheckpointError, match="a sequence classifier; it has no lm_head.weight"):
        _start(AttributeConditionedGPT, named, ("quality",))


def test_training_begins_with_an_exported_regressor(tmp_path: Path) -> None:
    template = PromptTemplate(label_start="<own>")
    tokenizer = make_tokenizer(tmp_path / "tokenizer", "markers")
    export(make_regressor(tmp_path / "model", tokenizer, template=template), tmp_path / "hf")
    names = SCHEMA.names
    model = _start(AttributeRegressor, tmp_path / "hf", names)
    assert model.card.template == template and model.fresh_head  # humor goes to 9 there, to 4 here
    import_(tmp_path / "hf", tmp_path / "again")
    assert _start(AttributeRegressor, tmp_path / "again", names).fresh_head


# ---------------------------------------------------------------- real conversations


def real_chats(count: int, longest: int) -> list[list[dict[str, str]]]:
    """The first root-to-leaf paths of OASST trees that end with an answer and have at most so many characters."""
    import gzip

    chats: list[list[dict[str, str]]] = []

    def walk(node: dict[str, Any], before: list[dict[str, str]]) -> None:
        role = "assistant" if node["role"] == "assistant" else "user"
        path = [*before, {"role": role, "content": node["text"]}]
        if role == "assistant" and not node.get("replies") and sum(len(m["content"]) for m in path) <= longest:
            chats.append(path)
        for reply in node.get("replies") or ():
            walk(reply, path)

    with gzip.open(tokenizers.real_data("oasst1_en_val.dev.trees.jsonl.gz"), "rt", encoding="utf-8") as file:
        for line in file:
            if len(chats) < count:
                walk(json.loads(line)["prompt"], [])
    return chats[:count]


@pytest.mark.real_data
def test_transformers_scores_real_conversations_as_annotate_does(tmp_path: Path) -> None:
    """A regressor on stories260K, trained for a few steps; the scoring process knows neither NeMo nor this package."""
    chats = real_chats(20, longest=500)
    with (tmp_path / "chats.jsonl").open("w") as file:
        file.writelines(json.dumps({"messages": chat}) + "\n" for chat in chats)
    rows = [{"messages": [*chat[:-1], {**chat[-1], "label": f"quality:{len(chat) % 5},humor:1"}]} for chat in chats]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    attributes = configs.AttributesConfig(schema={n: configs.AttributeOptions() for n in ("quality", "humor")})
    stories, tok512 = (tokenizers.real_data(f"stories260K/{name}") for name in ("stories260K.bin", "tok512.model"))
    convert.import_main(configs.ImportConfig(input=str(stories), tokenizer=str(tok512), output=str(tmp_path / "base")))
    train_regressor.main(
        configs.TrainRegressorConfig(
            output=str(tmp_path / "run"), attributes=attributes, optimizer=configs.OptimizerConfig(lr=1e-3),
            data=configs.DataConfig(train=str(tmp_path / "train.jsonl"), max_length=512),
            model=configs.RegressorModelConfig(init=str(tmp_path / "base"), head_init="mean"),
            trainer=configs.TrainerConfig(max_steps=3, global_batch_size=8, micro_batch_size=8, progress_bar=False),
            logging=configs.LoggingConfig(tensorboard=False),
        )
    )  # fmt: skip
    curves = {"quality": {"slope": 0.8, "intercept": 0.3}, "humor": {"x": [0.0, 1.0, 4.0], "y": [0.2, 0.9, 3.0]}}
    Calibration("mixed", curves).write(tmp_path / "run" / "model")
    annotate.main(
        configs.AnnotateConfig(
            checkpoint=str(tmp_path / "run" / "model"), input=str(tmp_path / "chats.jsonl"),
            output=str(tmp_path / "labelled.jsonl"), max_length=2048,
        )
    )  # fmt: skip
    export(tmp_path / "run" / "model", tmp_path / "hf")

    script = Path(__file__).parents[2] / "examples" / "score_with_transformers.py"
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0]); "
        "sys.exit([m for m in sys.modules if m.split('.')[0] in ('nemo', 'megatron', 'nemo_steerlm')] or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(script), str(tmp_path / "hf"), str(tmp_path / "chats.jsonl")],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = [json.loads(line) for line in done.stdout.splitlines()]
    labelled = [json.loads(line) for line in (tmp_path / "labelled.jsonl").open()]
    assert len(scores) == len(labelled) == len(chats)
    for score, row in zip(scores, labelled, strict=True):
        expected = parse_label(row["conversations"][-1]["label_predicted"])
        assert score == pytest.approx(expected, abs=1e-4, rel=0)
    assert len({round(score["quality"], 3) for score in scores}) > 10
