"""The chat template of an exported regressor writes the prompt that the regressor reads, and refuses the same rows."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_steerlm.conversation import DEFAULT_SYSTEM, Conversation
from nemo_steerlm.errors import DataError
from nemo_steerlm.formats.exported_chat_template import chat_template
from nemo_steerlm.template import PromptTemplate
from tests.prompts import CHAT_MARKERS, CHATML, LLAMA3, TEMPLATE, chatml

CHAT_TEMPLATES = (
    TEMPLATE,
    CHATML,
    chatml(system=""),
    LLAMA3,
    dataclasses.replace(TEMPLATE, system="It's {{ 1 }}\n\"mine\" <|im_end|>"),
    PromptTemplate(system_start="\x00", turn_start="\x11", label_start="\x12"),
    PromptTemplate(
        system_start="«S»", turn_start='<|"start"|>', label_start="{{label}}", end_of_name=": ",
        end_of_turn="<|im_end|>\n", system_name="Sÿstem 🙂", user="Human {1}", assistant="A\\n'I'",
    ),
)  # fmt: skip
CHATS: tuple[list[dict], ...] = (
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    [
        {"role": "system", "content": " Be\n\nkind. "},
        {"role": "developer", "content": "Be <extra_id_1>brief."},
        {"role": "user", "content": "\n  {{ 7 * 7 }} {% raw %} \\n \u2028 你好\t"},
        {"role": "assistant", "content": '<extra_id_2>q:4\n <|im_end|> \x11\x12\x00 <|"start"|> {{label}} «S»'},
        {"role": "user", "content": "".join(CHAT_MARKERS)},
        {"role": "assistant", "content": "<|begin|><|head|><|head|>x<|im_start|><|im_start|>"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": [{"type": "text", "text": "in "}, {"type": "text", "text": "parts\n"}]},
    ],
    [{"role": "system", "content": DEFAULT_SYSTEM}, {"role": "user", "content": "Hi"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}],
)


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("trim", [True, False])
def test_the_chat_template_renders_what_a_regressor_reads(template, messages, trim):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    source = chat_template(template)
    assert "\n" not in source and source.isascii()
    turns = Conversation.from_record({"messages": messages})
    names = {"User": template.user, "Assistant": template.assistant}
    for turn in turns.turns:
        turn.speaker = names[turn.speaker]
    expected = template.render_regression(turns, len(turns.turns) - 1)
    jinja = ImmutableSandboxedEnvironment(trim_blocks=trim, lstrip_blocks=trim).from_string(source)
    assert jinja.render(messages=messages) == expected


@pytest.mark.parametrize("role", ["tool", "system"])
def test_the_chat_template_refuses_what_the_reader_refuses(role):
    from jinja2 import Environment

    class Refused(Exception):
        pass

    def raise_exception(message):
        raise Refused(message)

    messages = [*CHATS[0], {"role": role, "content": "?"}]
    jinja = Environment()
    jinja.globals["raise_exception"] = raise_exception
    with pytest.raises(Refused, match=f"the role {role}"):
        jinja.from_string(chat_template(TEMPLATE)).render(messages=messages)
    with pytest.raises(DataError, match=f"the role '{role}'"):
        Conversation.from_record({"messages": messages})
