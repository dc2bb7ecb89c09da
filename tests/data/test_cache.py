"""The cache of tokenised data: same items, one writer, rebuilt when damaged, never needed."""

from __future__ import annotations

import os

import numpy as np
import pytest

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import read_conversations, write_conversations
from nemo_steerlm.data.cache import FOLDER, TokenCache
from nemo_steerlm.data.policy_dataset import PolicyDataset
from nemo_steerlm.data.regression_dataset import RegressionDataset
from nemo_steerlm.errors import DataError
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import load_tokenizer
from tests import tokenizers
from tests.data.test_dataset import row

SCHEMA = AttributeSchema.load("helpsteer2")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tokenizers.bpe(tmp_path_factory.mktemp("tokenizer"), markers=True))


@pytest.fixture
def source(tmp_path):
    rows = [row("a " * 15 * n, "b " * 15 * n, "c", "d", id=f"row {n}", extra={"kept": n}) for n in range(1, 8)]
    write_conversations(tmp_path / "data.jsonl", rows)
    return tmp_path / "data.jsonl"


def build(kind, source, tokenizer, cache=True, max_length=200, **settings):
    calls = []
    place = TokenCache(source, None, wait=lambda: calls.append("wait")) if cache is True else cache or None
    rows = read_conversations(source, SCHEMA)
    data = kind.build(
        rows, SCHEMA, PromptTemplate(), tokenizer, max_length, "truncate_history", cache=place, **settings
    )
    return data, next(rows, None) is not None  # whether the text was left unread


@pytest.mark.parametrize("kind", [RegressionDataset, PolicyDataset])
def test_the_order_of_the_attributes_decides_the_tokens_too(kind, source, tokenizer):
    turned = AttributeSchema.load(dict(reversed(SCHEMA.to_dict().items())))
    arguments = (PromptTemplate(), tokenizer, 200, "truncate_history")
    place = TokenCache(source, None, wait=lambda: None)
    kind.build(read_conversations(source, SCHEMA), SCHEMA, *arguments, cache=place)
    cached = kind.build(read_conversations(source, turned), turned, *arguments, cache=place)
    assert repr(items(cached)) == repr(items(kind.build(read_conversations(source, turned), turned, *arguments)))


def items(data):
    return [{k: v.tolist() for k, v in data.item(i, epoch).items()} for epoch in (0, 3) for i in range(len(data))]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(RegressionDataset, {}), (PolicyDataset, {}), (PolicyDataset, {"attribute_dropout": 0.5, "label_dropout": 0.2})],
)
def test_the_second_run_reads_the_first_ones_tokens(kind, settings, source, tokenizer):
    plain, _ = build(kind, source, tokenizer, cache=None, **settings)
    first, unread = build(kind, source, tokenizer, **settings)
    assert not unread
    second, unread = build(kind, source, tokenizer, **settings)
    assert unread
    for data in (first, second):
        assert repr(items(data)) == repr(items(plain))
        assert data.report == plain.report and data.lengths.tolist() == plain.lengths.tolist()
        assert isinstance(data._tokens._flat, np.memmap)
    assert plain.report["truncated"] > 0  # so that shortened rows went through too


def test_whatever_decides_the_tokens_decides_the_entry(source, tokenizer):
    def entries():
        return {path.name for path in (source.parent / FOLDER).iterdir()}

    build(RegressionDataset, source, tokenizer)
    build(RegressionDataset, source, tokenizer)
    assert len(entries()) == 1
    build(RegressionDataset, source, tokenizer, max_length=201)
    build(PolicyDataset, source, tokenizer)
    assert len(entries()) == 3
    build(PolicyDataset, source, tokenizer, label_dropout=0.5)  # needs the text as well
    build(PolicyDataset, source, tokenizer, label_dropout=0.3, seed=4)
    assert len(entries()) == 4
    with source.open("a") as file:
        file.write(source.read_text().splitlines()[0] + "\n")
    build(PolicyDataset, source, tokenizer)
    assert len(entries()) == 5


@pytest.mark.parametrize("damage", ["byte", "short", "missing", "about", "foreign"])
def test_a_damaged_entry_is_made_again_with_a_warning(damage, source, tokenizer, caplog):
    expected = repr(items(build(RegressionDataset, source, tokenizer)[0]))  # read before the file is damaged
    entry = next((source.parent / FOLDER).iterdir())
    tokens, about = entry / "tokens.npy", entry / "entry.json"
    content = tokens.read_bytes()
    if damage == "byte":
        tokens.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif damage == "short":
        tokens.write_bytes(content[:-40])
    elif damage == "missing":
        tokens.unlink()
    elif damage == "about":
        about.write_text('{"key": ')
    else:
        about.write_text(about.read_text().replace('"regression"', '"policy"'))
    again, unread = build(RegressionDataset, source, tokenizer)
    assert not unread and repr(items(again)) == expected
    assert f"{entry.name}: damaged, tokenising again" in caplog.text
    caplog.clear()
    assert build(RegressionDataset, source, tokenizer)[1] and not caplog.text


def test_readers_wait_for_the_writer(source, tokenizer):
    def writer_comes():
        build(RegressionDataset, source, tokenizer)

    reader = TokenCache(source, None, writer=False, wait=writer_comes)
    data, unread = build(RegressionDataset, source, tokenizer, cache=reader)
    assert unread and len(data)
    alone = TokenCache(source, source.parent / "elsewhere", writer=False, wait=lambda: None)
    other, unread = build(RegressionDataset, source, tokenizer, cache=alone)  # it does not see the writer's disk
    assert not unread and repr(items(other)) == repr(items(data)) and not (source.parent / "elsewhere").exists()


def test_where_nothing_can_be_written_training_goes_on(source, tokenizer, caplog):
    blocked = source.parent / "file"
    blocked.write_text("not a folder")
    data, _ = build(RegressionDataset, source, tokenizer, cache=TokenCache(source, blocked, wait=lambda: None))
    assert len(data) and "tokenised data cannot be kept here" in caplog.text


def test_an_error_reaches_everyone_and_leaves_nothing(source, tokenizer):
    waited = []
    cache = TokenCache(source, None, wait=lambda: waited.append(True))
    with pytest.raises(DataError, match="too long"):
        build(RegressionDataset, source, tokenizer, cache=cache, max_length=3)
    assert waited == [True] and not os.path.exists(source.parent / FOLDER)
    with pytest.raises(DataError, match="no such file"):
        missing = source.with_name("missing.jsonl")
        build(RegressionDataset, missing, tokenizer, cache=TokenCache(missing, None, wait=lambda: None))
