"""The prompt: exact text, and exact masks for several tokenizers."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from nemo_steerlm.conversation import Conversation, Turn
from nemo_steerlm.errors import ConfigError, DataError
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import load_tokenizer
from tests import tokenizers
from tests.prompts import CHATML, LLAMA3, SCHEMA, TEMPLATE, chatml, dialogue, spans
from tests.tokenizers import FAITHFUL, KINDS, kinds


@pytest.fixture(scope="module")
def make_tokenizer(tmp_path_factory):
    return functools.cache(lambda kind: load_tokenizer(tokenizers.of_kind(tmp_path_factory.mktemp(kind), kind)))


# -- text -------------------------------------------------------------------------------------------------------------


def test_the_layout_is_the_references():
    conversation = dialogue("Hi", "Hello", "More?", "No.", labels=({"toxicity": 0.5, "quality": 3.5}, None))
    text = "".join(span.text for span in TEMPLATE.spans(conversation, SCHEMA))
    assert text == (
        "<extra_id_0>System\nBe kind.\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n<extra_id_2>quality:4,toxicity:0\n"
        "Hello\n<extra_id_1>User\nMore?\n<extra_id_1>Assistant\nNo.\n<extra_id_1>"
    )
    assert TEMPLATE.render_regression(conversation, 1) == (
        "<extra_id_0>System\nBe kind.\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nHello\n<extra_id_2>"
    )
    assert TEMPLATE.render_regression(conversation, 3).endswith(
        "Hello\n<extra_id_1>User\nMore?\n<extra_id_1>Assistant\nNo.\n<extra_id_2>"
    )


def trained(conversation, **settings):
    return [s.text for s in TEMPLATE.spans(conversation, SCHEMA, **settings) if s.loss]


def test_where_the_loss_lies():
    four = dialogue("a", "b", "c", "d")
    assert trained(four) == ["b\n<extra_id_1>", "d\n<extra_id_1>"]
    assert trained(four, with_labels=False) == trained(four)
    assert trained(dialogue("a", "b", "c", "d", labels=(None, {"quality": 1}))) == ["d\n<extra_id_1>"]
    four.turns[1].shared = True
    assert trained(four) == ["d\n<extra_id_1>"]
    assert trained(dialogue("a", "b", labels=(None,))) == []
    plain = dialogue("a", "b", "c", "d", labels=(None, {"quality": 1}), type=None)
    assert trained(plain) == ["b\n<extra_id_1>", "d\n<extra_id_1>"]
    assert not any("quality" in s.text for s in TEMPLATE.spans(plain, SCHEMA))
    assert trained(dialogue("a", "b", mask="User,Assistant")) == []
    assistant_first = Conversation([Turn("Assistant", "x", label={"quality": 1}), *dialogue("a", "b").turns])
    assert trained(assistant_first) == ["b\n<extra_id_1>"]
    ends_with_user = "".join(s.text for s in TEMPLATE.spans(dialogue("a", "b", "c"), SCHEMA))
    assert ends_with_user.endswith("b\n<extra_id_1>User\nc\n")


def test_strings_can_be_chosen_and_bad_ones_are_refused():
    other = PromptTemplate(system_start="\x00", turn_start="\x11", label_start="\x12", user="Human")
    assert PromptTemplate.from_dict(other.to_dict()) == other
    text = "".join(s.text for s in other.spans(dialogue("x\x11Assistant", "\x12y"), SCHEMA))
    assert text == "\x00System\nBe kind.\n\x11Human\nx Assistant\n\x11Assistant\n\x12quality:4,toxicity:0\n y\n\x11"
    with pytest.raises(ConfigError, match="did you mean 'turn_start'"):
        PromptTemplate.from_dict({"turn_star": "x"})
    for bad in (
        {"turn_start": ""}, {"turn_start": "extra_id_0>"}, {"turn_start": "a b"}, {"label_start": "_1>"},
        {"label_start": "<extra_id_0>"}, {"turn_start": "<extra_id_2>"}, {"system": None},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            PromptTemplate(**bad)


@pytest.mark.parametrize(
    ("generated", "response"),
    [
        ("Hello\n<extra_id_1>", "Hello"),
        ("Hello\n<extra_id_1>User\nmore", "Hello"),
        ("Hello\n\n<extra_id_1>", "Hello\n"),
        ("Hello\n<extra_", "Hello"),
        ("Hello\n", "Hello"),
        ("Hello", "Hello"),
        (" Hello <extra", " Hello <extra"),
        ("\n<extra_id_1>", ""),
        ("", ""),
    ],
)
def test_parse_response(generated, response):
    assert TEMPLATE.parse_response(generated) == response


# -- formats of chat models -------------------------------------------------------------------------------------------


def test_chat_formats_are_written_as_their_models_know_them():
    row = dialogue("Hi", "Ho", "So?", "No", labels=({"quality": 4}, None))
    assert "".join(s.text for s in CHATML.spans(row, SCHEMA)) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "<|label|>quality:4\nHo<|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>"
    )
    assert "".join(s.text for s in LLAMA3.spans(row, SCHEMA)) == (
        "<|begin|><|head|>system<|/head|>\n\nBe kind.<|eot|><|head|>user<|/head|>\n\nHi<|eot|>"
        "<|head|>assistant<|/head|>\n\n<|label|>quality:4<|/head|>\n\nHo<|eot|>"
        "<|head|>user<|/head|>\n\nSo?<|eot|><|head|>assistant<|/head|>\n\nNo<|eot|>"
    )
    assert CHATML.render_regression(row, 1).endswith("<|im_start|>assistant\nHo<|im_end|>\n<|label|>")
    open_end = dialogue("Hi", "Ho", "So?")
    assert "".join(s.text for s in CHATML.spans(open_end, SCHEMA)).endswith("<|im_start|>user\nSo?<|im_end|>\n")


def test_a_row_without_a_system_prompt_has_the_templates_own_or_none():
    row = Conversation.from_record({"messages": [{"role": "user", "content": "Hi"}]})
    start = {"<|im_start|>system\nYou are Q.<|im_end|>\n<|im_start|>user\nHi": CHATML}
    start |= {"<|begin|><|head|>user<|/head|>\n\nHi": LLAMA3, "<|im_start|>user\nHi": chatml(system="")}
    start["<extra_id_0>System\nA chat between"] = TEMPLATE
    for expected, template in start.items():
        assert template.render_regression(row, 0).startswith(expected)
        assert "".join(s.text for s in template.spans(row, SCHEMA)).startswith(expected)
    empty = dataclasses.replace(row, system="")
    assert CHATML.render_regression(empty, 0).startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user")
    assert LLAMA3.render_regression(empty, 0).startswith("<|begin|><|head|>user")
    assert TEMPLATE.render_regression(empty, 0).startswith("<extra_id_0>System\n\n<extra_id_1>User")


def test_generation_stops_where_the_loss_ends():
    assert (TEMPLATE.stops, TEMPLATE.closing) == (("<extra_id_1>",), "\n<extra_id_1>")
    assert (CHATML.stops, CHATML.closing) == (("<|im_end|>", "<|im_start|>"), "<|im_end|>")
    assert (LLAMA3.stops, LLAMA3.closing) == (("<|eot|>", "<|head|>"), "<|eot|>")
    spaced = chatml(end_of_turn=" <|im_end|>\n")
    assert (spaced.stops[0], spaced.closing) == ("<|im_end|>", " <|im_end|>")
    for template in (CHATML, LLAMA3, spaced):
        row = dialogue("a", "b <", "c", "d")
        trained = [s.text for s in template.spans(row, SCHEMA) if s.loss]
        assert trained == [f"b <{template.closing}", f"d{template.closing}"]
        for text in (trained[0], trained[0] + template.turn_start + "user\nmore"):
            assert template.parse_response(text) == "b <"
        assert template.parse_response("b <", cut=False) == "b <", "a text that ends like a marker begins"
        assert template.parse_response("b" + template.closing[:4]) == "b", "cut inside the marker"
    assert TEMPLATE.parse_response("b\n", cut=False) == "b" == spaced.parse_response("b ", cut=False)
    assert TEMPLATE.parse_response("b\n<ex", cut=False) == "b\n<ex"


# -- masks and prefixes -----------------------------------------------------------------------------------------------


RESPONSES = [
    "Fine.",
    "\nstarts with a line",
    "\n\n two lines",
    "  two spaces",
    "",
    "\n",
    " ",
    "ends in line\n",
    "É ﬁn 😀",
    "x\n\n",
]


@pytest.mark.parametrize("kind", kinds(FAITHFUL))
@pytest.mark.parametrize("response", RESPONSES)
def test_text_under_the_mask_is_each_response_and_its_closing_marker(kind, response, make_tokenizer):
    tokenizer = make_tokenizer(kind)
    conversation = dialogue("Hi\n", response, " and?\n\n", "Good.", "so", response)
    for shown in (True, False, [{"quality": 1}, {"toxicity": 2}, {}, None, None, {"quality": 3}]):
        ids, mask = TEMPLATE.encode_policy(conversation, SCHEMA, tokenizer, shown)
        assert spans(ids, mask, tokenizer) == [f"{t}\n<extra_id_1>" for t in (response, "Good.", response)]
        shown_spans = TEMPLATE.spans(conversation, SCHEMA, shown)
        assert tokenizer.decode(ids) == "".join(span.text for span in shown_spans)


@pytest.mark.parametrize("kind", kinds(("sentencepiece_nfkc", "tok512", "bpe_nfkc")))
def test_masks_with_tokenizers_that_rewrite_white_space(kind, make_tokenizer):
    tokenizer = make_tokenizer(kind)
    ids, mask = TEMPLATE.encode_policy(dialogue("Hi.", "I am fine.", "And?", "good"), SCHEMA, tokenizer)
    found = ["".join(span.split()) for span in spans(ids, mask, tokenizer)]
    assert found == [f"{'Iamfine.'}<extra_id_1>", "good<extra_id_1>"] or [f.casefold() for f in found] == [
        "iamfine.<extra_id_1>", "good<extra_id_1>",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", kinds(KINDS))
def test_the_prompt_is_an_exact_prefix_of_the_answered_conversation(kind, make_tokenizer):
    tokenizer = make_tokenizer(kind)
    for response in RESPONSES:
        for values in ({"quality": 4, "humor": 2}, {"humor": 0}, None):
            answered = dialogue("Hi", response, "and then?\n", response)
            answered.turns[3].label = values
            history = dataclasses.replace(answered, turns=answered.turns[:3])
            prompt = TEMPLATE.encode_prompt(history, SCHEMA, values, tokenizer)
            ids, mask = TEMPLATE.encode_policy(answered, SCHEMA, tokenizer)
            assert ids[: len(prompt)] == prompt
            if values:
                assert mask[len(prompt) - 1 :] == [0] + [1] * (len(ids) - len(prompt))


def test_requested_values_are_checked(make_tokenizer):
    for values, message in (({"humour": 1}, "did you mean 'humor'"), ({"humor": 5}, "outside its range 0 to 4")):
        with pytest.raises(DataError, match=message):
            TEMPLATE.encode_prompt(dialogue("a"), SCHEMA, values, make_tokenizer("bpe"))


def test_many_prompts_at_once_give_the_same_tokens(make_tokenizer):
    for kind in ("bpe_markers", "sentencepiece"):
        tokenizer = make_tokenizer(kind)
        rows = [dialogue("q", text, "r") for text in RESPONSES]
        policies = TEMPLATE.encode_policies([(row, True) for row in rows], SCHEMA, tokenizer)
        assert policies == [TEMPLATE.encode_policy(row, SCHEMA, tokenizer) for row in rows]
        regressions = TEMPLATE.encode_regressions([(row, 1) for row in rows], tokenizer)
        assert regressions == [tokenizer.encode(TEMPLATE.render_regression(row, 1)) for row in rows]
