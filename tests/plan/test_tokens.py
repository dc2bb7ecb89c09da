"""Lengths counted in a prepared file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation, Turn, read_conversations, write_conversations
from nemo_steerlm.plan.tokens import count, padded_share
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import load_tokenizer
from tests.tokenizers import of_kind

SETTINGS: dict[str, Any] = dict(
    schema=AttributeSchema.load("helpsteer"), template=PromptTemplate(), max_length=4096, overlong="drop", batch=2,
    micro_batch=2, equal_lengths=False,
)  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [
        Conversation(
            turns=[Turn("User", "a" * size), Turn("Assistant", "b" * size, label={"quality": 4.0})], system="s"
        )
        for size in (40, 120)
    ]
    write_conversations(tmp_path / "train.jsonl", rows)
    return tmp_path / "train.jsonl"


def test_without_a_tokenizer_four_characters_are_a_token(file: Path) -> None:
    found = count(file, regressor=False, tokenizer=None, **SETTINGS)
    assert (found.samples, found.tokens, found.loss_share) == (2, 21 + 61, 1.0)
    assert found.padding == pytest.approx(1 - (21 + 61) / (2 * 61))
    assert "no tokenizer" in found.source


def test_with_a_tokenizer_samples_are_those_of_a_training(file: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(of_kind(tmp_path, "bpe_markers"))
    template, rows = SETTINGS["template"], list(read_conversations(file))
    texts = [template.encode_regression(row, 1, tokenizer) for row in rows]
    found = count(file, regressor=True, tokenizer=tokenizer, **SETTINGS)
    assert (found.samples, found.tokens, found.loss_share) == (2, sum(map(len, texts)), 1.0)
    found = count(file, regressor=False, tokenizer=tokenizer, **SETTINGS)
    pairs = [template.encode_policy(row, SETTINGS["schema"], tokenizer) for row in rows]
    ends = [
        max(place for place, on in enumerate(mask) if on) + 1 for _, mask in pairs
    ]  # nothing follows the last loss
    assert (found.samples, found.tokens) == (2, sum(ends))
    assert found.loss_share == pytest.approx(sum(sum(mask) for _, mask in pairs) / sum(ends))
    assert found.source == "counted with the tokenizer"


def test_padding_goes_up_to_the_longest_of_a_group() -> None:
    lengths = np.array([10, 20, 30, 40])
    assert padded_share(lengths, 4, 4) == pytest.approx(60 / 160)
    assert padded_share(lengths, 4, 2) == pytest.approx(20 / 120)
    assert padded_share(lengths, 4, 1) == 0
