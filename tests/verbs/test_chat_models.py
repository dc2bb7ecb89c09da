"""Chat models of others, from `import` to a policy: which prompt they are given, where their answers end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_steerlm.cli import main
from nemo_steerlm.conversation import Conversation, Turn, write_conversations
from nemo_steerlm.formats import model_folder
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import load_tokenizer
from tests.test_chat_template import MISTRAL, OWN, SMOLLM2, TOKENS, make

QUESTIONS = [f"{word}, how are you? {n}" for n, word in enumerate("Hello There Good Bye Fine Quick Brown Fox".split())]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with SmolLM2's chat template, whose generation ends at two tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("chat") / "hf"
    tokenizer = make(folder, SMOLLM2, [*TOKENS, "<other_end>"], eos_token="<|im_end|>", bos_token="<|end|>")
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=tokenizer.vocab_size, max_position_embeddings=256, initializer_range=0.3,
        eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ends = [tokenizer.eos_id, tokenizer.token_id("<other_end>")]
    model.generation_config.eos_token_id = ends
    with torch.no_grad():
        model.lm_head.weight[ends] *= 2  # or no answer would end
    model.save_pretrained(folder)
    return folder


def run(*words: Any) -> None:
    assert main([str(word) for word in words]) == 0


def test_an_imported_chat_model_is_prompted_in_its_own_format(chat_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run("import", f"input={chat_model}", f"output={tmp_path}/base")
    tokenizer = load_tokenizer(chat_model)
    card = model_folder.read(tmp_path / "base")
    expected = OWN.build(tokenizer).to_dict() | {"label_start": "<extra_id_2>"}  # of no use to a plain language model
    assert card.template.to_dict() == expected and card.template.turn_start == "<|im_start|>"
    assert card.ends == (tokenizer.token_id("<other_end>"),)

    policy = AttributeConditionedGPT.from_pretrained(tmp_path / "base")
    answers = policy.generate(QUESTIONS, max_new_tokens=24)
    theirs, model = AutoTokenizer.from_pretrained(chat_model), AutoModelForCausalLM.from_pretrained(chat_model).eval()
    finishes = []
    for question, answer in zip(QUESTIONS, answers, strict=True):
        ids = theirs.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            whole = model.generate(ids["input_ids"], max_new_tokens=24, do_sample=False)[0]
        whole = whole[ids["input_ids"].shape[1] :].tolist()
        ends = [at for at, token in enumerate(whole) if token in model.generation_config.eos_token_id]
        finishes += [whole[ends[0]]] if ends else [None]
        assert answer == tokenizer.decode_continuation(whole[: ends[0]] if ends else whole), question
    assert set(finishes) >= set(model.generation_config.eos_token_id), "both ends are to be seen"

    run("export", f"checkpoint={tmp_path}/base", f"output={tmp_path}/hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["eos_token_id"] == [tokenizer.eos_id, *card.ends]
    run("import", f"input={tmp_path}/hf", f"output={tmp_path}/again")
    assert model_folder.read(tmp_path / "again") == card


def test_where_the_format_cannot_be_written_one_line_says_so(
    chat_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    caplog.set_level("INFO")
    mistral = shutil.copytree(chat_model, tmp_path / "mistral")
    (mistral / "chat_template.jinja").write_text(MISTRAL)
    run("import", f"input={mistral}", f"output={tmp_path}/base")
    assert model_folder.read(tmp_path / "base").template == PromptTemplate()
    [line] = [line for line in caplog.messages if "SteerLM's markers" in line]
    assert str(mistral) in line and "Only user and assistant roles" in line and "\n" not in line
    assert main(["import", f"input={mistral}", f"output={tmp_path}/no", "template=own"]) == 2
    assert "cannot be written" in capsys.readouterr().err and not (tmp_path / "no").exists()
    run("import", f"input={mistral}", f"output={tmp_path}/chatml", "template=chatml")
    assert model_folder.read(tmp_path / "chatml").template.label_start == "<repo_name>"
    run("import", f"input={chat_model}", f"output={tmp_path}/steerlm", "template=steerlm")
    assert model_folder.read(tmp_path / "steerlm").template == PromptTemplate()


def make_rows(file: Path) -> Path:
    label = {"quality": 4.0, "humor": 1.0}
    turns = [(Turn("User", question), Turn("Assistant", f"I am fine, thank you. {n}", label))
             for n, question in enumerate(QUESTIONS)]  # fmt: skip
    write_conversations(file, [Conversation(list(pair)) for pair in turns])
    return file


TRAINED = {
    "own": ("You are a helpful AI assistant named SmolLM", "<|im_start|>assistant\n<repo_name>quality:4,humor:1\n"),
    "chatml": ("<|im_start|>user\nHello", "<|im_start|>assistant\n<repo_name>quality:4,humor:1\n"),
    "steerlm": ("<extra_id_0>System\nA chat between", "<extra_id_1>Assistant\n<extra_id_2>quality:4,humor:1\n"),
}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("from_import", [True, False])
def test_trainings_write_the_prompt_they_are_told(
    name: str, from_import: bool, chat_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rows, source = make_rows(tmp_path / "rows.jsonl"), chat_model
    if from_import:
        source = tmp_path / "base"
        run("import", f"input={chat_model}", f"output={source}")
    common = [
        "attributes=helpsteer", f"data.train={rows}", "data.max_length=200", f"model.init={source}", "trainer=cpu",
        "trainer.max_steps=2", "trainer.global_batch_size=8", "optimizer.lr=1e-3", "logging.tensorboard=false",
    ]  # fmt: skip
    chosen = [] if name == "steerlm" else [f"template={name}"]
    run("train-sft", *common, *chosen, f"output={tmp_path}/sft")
    told = [line for line in caplog.messages if "has a chat template of its own" in line]
    assert len(told) == (name != "own") and all("template=own keeps to it" in line for line in told)

    policy = AttributeConditionedGPT.from_pretrained(tmp_path / "sft" / "model")
    start, before = TRAINED[name]
    row = Conversation([Turn("User", QUESTIONS[0])])
    asked = policy.tokenizer.decode(policy.prompt_tokens(row, {"quality": 4, "humor": 1}))
    assert start in asked[:80] and asked.endswith(before)
    assert policy.card.ends == (policy.tokenizer.token_id("<other_end>"),)
    ids, mask = policy.card.template.encode_policy(
        Conversation([*row.turns, Turn("Assistant", "I am fine", {"quality": 4, "humor": 1})]), policy.schema,
        policy.tokenizer,
    )  # fmt: skip
    closing = "\n<extra_id_1>" if name == "steerlm" else "<|im_end|>"
    learnt = [token for token, one in zip(ids, mask, strict=True) if one]
    assert policy.tokenizer.decode_continuation(learnt) == f"I am fine{closing}"
    if name != "steerlm":
        assert learnt[-1] == policy.tokenizer.eos_id
    run("generate", f"checkpoint={tmp_path}/sft/model", "prompt=Hello", "attributes.humor=0", "max_new_tokens=4")

    if from_import:  # the policy's own template goes on, whatever is asked for then
        again = ["trainer.max_steps=1", f"model.init={tmp_path}/sft/model", "template=own", f"output={tmp_path}/again"]
        run("train-sft", *[word for word in common if "max_steps" not in word and "init" not in word], *again)
        assert model_folder.read(tmp_path / "again" / "model").template == policy.card.template


def test_a_regressor_reads_the_models_own_format(chat_model: Path, tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "rows.jsonl")
    run(
        "train-regressor", "attributes=helpsteer", "template=own", f"data.train={rows}", "data.max_length=200",
        f"model.init={chat_model}", "trainer=cpu", "trainer.max_steps=1", "trainer.global_batch_size=8",
        "optimizer.lr=1e-3", "logging.tensorboard=false", f"output={tmp_path}/run",
    )  # fmt: skip
    run("annotate", f"checkpoint={tmp_path}/run/model", f"input={rows}", f"output={tmp_path}/labelled.jsonl")
    run("export", f"checkpoint={tmp_path}/run/model", f"output={tmp_path}/hf")
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "Hi <|im_start|>"}, {"role": "assistant", "content": "Ho"}]
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").apply_chat_template(chat, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi < |im_start|><|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<repo_name>"
    )
