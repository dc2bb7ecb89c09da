"""Prompt templates, dialogues, and what stands under a loss mask, for the tests of prompts."""

from __future__ import annotations

import dataclasses

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation, Turn
from nemo_steerlm.template import PromptTemplate

SCHEMA = AttributeSchema.load("helpsteer")
TEMPLATE = PromptTemplate()
CHATML = PromptTemplate(
    system_start="<|im_start|>", turn_start="<|im_start|>", label_start="<|label|>", end_of_turn="<|im_end|>\n",
    system_name="system", user="user", assistant="assistant", system="You are Q.",
)  # fmt: skip
LLAMA3 = PromptTemplate(
    system_start="<|begin|><|head|>", turn_start="<|head|>", label_start="<|label|>", end_of_name="<|/head|>\n\n",
    end_of_turn="<|eot|>", system_name="system", user="user", assistant="assistant", system="",
)  # fmt: skip
CHAT_MARKERS = ("<|im_start|>", "<|im_end|>", "<|label|>", "<|begin|>", "<|head|>", "<|/head|>", "<|eot|>")


def chatml(**strings):
    return dataclasses.replace(CHATML, **strings)


def dialogue(*texts, labels=({"quality": 4, "toxicity": 0},), **settings):
    turns = [Turn(("User", "Assistant")[i % 2], text) for i, text in enumerate(texts)]
    for i, turn in enumerate(turns[1::2]):
        turn.label = labels[i % len(labels)]
    return Conversation(turns, **{"system": "Be kind.", **settings})


def spans(ids, mask, tokenizer):
    """Decoded text of each run of ones."""
    found, run = [], []
    for token, one in [*zip(ids, mask, strict=True), (0, 0)]:
        if one:
            run.append(token)
        elif run:
            found.append(tokenizer.decode_continuation(run))
            run = []
    return found
