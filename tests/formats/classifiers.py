"""Regressors and sequence classifiers of transformers, and what each computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend

from nemo_steerlm import config as configs
from nemo_steerlm.attributes import Attribute, AttributeSchema
from nemo_steerlm.conversation import Conversation
from nemo_steerlm.formats import model_folder
from nemo_steerlm.formats.model_folder import ModelCard
from nemo_steerlm.megatron import gpt, parallel
from nemo_steerlm.models.regressor import AttributeRegressor
from nemo_steerlm.tokenizer import load_tokenizer
from nemo_steerlm.verbs import convert
from tests import tokenizers
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
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "nemotron": "Nemotron"}


def make_tokenizer(folder: Path, kind: str) -> Path:
    """A tokenizer of one kind; `bos` would begin every text with a token of its own, as Llama 3's does."""
    if kind == "sentencepiece":
        return tokenizers.sentencepiece_model(folder)
    if kind == "sentencepiece_symbols":
        return tokenizers.sentencepiece_model(folder, user_symbols=True)
    if kind == "sentencepiece_nfkc":
        return tokenizers.sentencepiece_model(
            folder, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True
        )
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
