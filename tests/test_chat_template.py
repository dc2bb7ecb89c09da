"""Chat templates of real models as our strings: the same text and tokens as transformers, or a reason why not."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.chat_template import own_strings, unused_token
from nemo_steerlm.config import TemplateConfig
from nemo_steerlm.conversation import DEFAULT_SYSTEM, Conversation, Turn
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import Tokenizer, load_tokenizer
from tests import tokenizers

SCHEMA = AttributeSchema.load("helpsteer")
OWN = TemplateConfig(**dict.fromkeys(PromptTemplate().to_dict()))
TOKENS = ["<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>"]
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|start_header_id|>",
                 "<|end_header_id|>", "<|eot_id|>"]  # fmt: skip

SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) or message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CHATML = """{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>' }}
{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}
{% endif %}""".replace("}}\n{%", "}}{%")
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
EXPRESSIBLE = {"smollm2": SMOLLM2, "qwen2.5": QWEN25, "chatml": CHATML, "llama3": LLAMA3}
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'system' %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
CUTTING = "('Cutting Knowledge Date: December 2023\n\n' if message.role == 'system' else '') + message.content"
REFUSED = {
    "none": (None, "has no chat template"),
    "mistral": (MISTRAL, "Only user and assistant roles are supported!"),
    "cutting": (LLAMA3.replace("bos_token +", "").replace("message['content'] | trim", CUTTING), "before a system"),
    "dated": (CHATML.replace("message.content", "strftime_now('%d') ~ message.content"), "it writes the date"),
    "thinking": (CHATML.replace("assistant\n'", "assistant\n<think>\n'"), "where they write"),
    "capitals": (CHATML.replace("message.content", "message.content | upper"), "for the texts Qsystemq"),
    "numbered": (CHATML.replace("message.role", "message.role ~ loop.index"), "it begins with"),
    "broken": ("{{ nothing.at.all }}", "chat template: "),
    "bare": ("{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}"
             "{% if add_generation_prompt %}assistant: {% endif %}", "turns of users begin with"),
}  # fmt: skip


def make(folder: Path, template: str | None, tokens: list[str] = TOKENS, **settings: str) -> Tokenizer:
    """A byte-level BPE with special tokens and a chat template."""
    tokenizers.bpe(folder, markers=False)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(tokens)
    backend.save(str(folder / "tokenizer.json"))
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    for key, value in settings.items():
        setattr(theirs, key, value)
    theirs.chat_template = template
    theirs.save_pretrained(folder)
    return load_tokenizer(folder)


def chat(system: str | None, *texts: str) -> tuple[list[dict[str, str]], Conversation]:
    """The same conversation as messages and as a row that its answer is to follow."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    head = [] if system is None else [{"role": "system", "content": system}]
    turns = [Turn(("User", "Assistant")[n % 2], text) for n, text in enumerate(texts)]
    return head + messages, Conversation(turns, system=DEFAULT_SYSTEM if system is None else system)


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_own_writes_what_transformers_writes(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokens = LLAMA3_TOKENS if name == "llama3" else TOKENS
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"} if name == "llama3" else {}
    tokenizer = make(tmp_path, EXPRESSIBLE[name], tokens, **named)
    theirs, template = AutoTokenizer.from_pretrained(tmp_path), OWN.build(tokenizer)
    for system, texts in (
        (None, ["Hello there"]),
        ("Be kind.\n\nAlways.", ["How are you?", "Good. Bye!\n 1.", "É ﬁ １ ＜ > {{ x }}"]),
        (None, ["a\n\n  b", "c", "d", "e  f", "g"]),
    ):
        messages, row = chat(system, *texts)
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert template.encode_prompt(row, SCHEMA, None, tokenizer) == expected
    messages, row = chat(None, "Hi", "Ho")
    labelled = template.encode_prompt(Conversation(row.turns[:1]), SCHEMA, {"quality": 4}, tokenizer)
    plain = theirs.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(labelled) == f"{plain}{template.label_start}quality:4{template.end_of_name}"
    assert tokenizer.token_id(template.label_start) in tokenizer.special_ids


def test_the_strings_of_real_formats(tmp_path: Path) -> None:
    found = own_strings(make(tmp_path / "qwen", QWEN25))
    assert found == {
        "system_start": "<|im_start|>", "turn_start": "<|im_start|>", "end_of_name": "\n", "user": "user",
        "end_of_turn": "<|im_end|>\n", "system_name": "system", "assistant": "assistant",
        "system": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    }  # fmt: skip
    assert own_strings(make(tmp_path / "chatml", CHATML)) == found | {"system": ""}
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    assert own_strings(make(tmp_path / "llama3", LLAMA3, LLAMA3_TOKENS, **named)) == found | {
        "system_start": "<|begin_of_text|><|start_header_id|>", "turn_start": "<|start_header_id|>",
        "end_of_name": "<|end_header_id|>\n\n", "end_of_turn": "<|eot_id|>", "system": "",
    }  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    source, reason = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        OWN.build(make(tmp_path, source))
    assert reason in str(caught.value) and "\n" not in str(caught.value) and "template=chatml" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_given_strings_win(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, QWEN25)
    own = OWN.build(tokenizer)
    config = TemplateConfig(**{**dict.fromkeys(own.to_dict()), "user": "Human", "label_start": "<file_sep>"})
    assert config.build(tokenizer).to_dict() == own.to_dict() | {"user": "Human", "label_start": "<file_sep>"}


def test_labels_stand_behind_the_first_unused_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tokenizer = make(tmp_path / "a", SMOLLM2)  # <|end|> and <|pad|> come first, and end a text and pad
    template = OWN.build(tokenizer)
    assert template.label_start == "<repo_name>"
    assert [line for line in caplog.messages if "template.label_start is '<repo_name>'" in line]
    repo = tokenizer.token_id("<repo_name>")
    assert repo is not None and OWN.build(tokenizer, (repo,)).label_start == "<file_sep>"
    assert unused_token(tokenizer, ["<repo_name> is taken"]) == "<file_sep>"
    chatml = {**template.to_dict(), "label_start": None}
    assert TemplateConfig(**chatml).build(make(tmp_path / "b", None)).label_start == "<repo_name>"
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    tokenizer = make(tmp_path / "c", LLAMA3, LLAMA3_TOKENS, **named)
    end = tokenizer.token_id("<|end|>")
    assert end is not None
    template = OWN.build(tokenizer, (end,))
    assert template.label_start == "<|reserved_special_token_0|>", "not <|end_of_text|>, which nothing else names"
    with pytest.raises(ConfigError, match="no special token that is not used yet.*template.label_start="):
        OWN.build(make(tmp_path / "d", SMOLLM2, TOKENS[:2]))
