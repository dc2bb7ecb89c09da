"""What annotation writes into a row, and the figures that it streams for its report."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import AnnotateConfig
from nemo_steerlm.conversation import Conversation, Turn, write_conversations
from nemo_steerlm.progress import Progress
from nemo_steerlm.report.annotation_page import annotation_page
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import load_tokenizer
from nemo_steerlm.verbs.annotate import _Annotator, _Moments, _report
from tests.tokenizers import bpe


def test_streamed_moments_are_numpys_and_a_constant_correlates_with_nothing() -> None:
    random = np.random.default_rng(0)
    x = 2 + 1e-3 * random.normal(size=5000)
    y = x + 1e-3 * random.normal(size=5000)
    moments, constant = _Moments(), _Moments()
    for one, two in zip(x, y):
        moments.add(one, two)
        constant.add(2.0001, two)
    assert moments.pearson() == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-9)
    assert (moments.x, moments.xx / moments.n) == pytest.approx((x.mean(), x.var()), rel=1e-9)
    assert constant.pearson() is None and constant.xx == 0.0 and constant.x == 2.0001
    assert _Moments().pearson() is None


def test_rows_of_plain_fine_tuning_show_the_labels_they_get(tmp_path: Path) -> None:
    """A row without type and labels, as ShareGPT's, is to be conditioned on the labels it gets here."""
    tokenizer = load_tokenizer(bpe(tmp_path, markers=True))
    card = SimpleNamespace(template=PromptTemplate(), architecture=SimpleNamespace(max_position_embeddings=400))
    schema = AttributeSchema.load({"quality": None})
    model = SimpleNamespace(
        card=card, tokenizer=tokenizer, schema=schema, predict=lambda texts, *_: np.full((len(texts), 1), 2.6)
    )
    rows = [
        Conversation.from_record({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": text}]})
        for text in ("b", "long " * 400)
    ]
    assert [row.type for row in rows] == [None, None]
    annotator = _Annotator(model, AnnotateConfig(overlong="drop"), "m")  # type: ignore[arg-type]
    records = annotator.part(0, rows, Progress("rows", None, "conversations", shown=False))
    assert [row["type"] for row in records] == ["VALUE_TO_TEXT", None]
    assert records[0]["conversations"][1]["label"] == "quality:3"


def test_histograms_of_labels_before_and_after(tmp_path: Path) -> None:
    turns = [
        Turn("Assistant", "a", label_human={"quality": 2.4, "mood": 1.0}, label_predicted={"quality": 4.7}),
        Turn("Assistant", "b", label_human={"quality": 3.0}),  # too long to be read
        Turn("Assistant", "c", label_predicted={"quality": 2.6}),
    ]
    rows = [Conversation([Turn("User", "<b>"), turn], mask="User") for turn in turns]
    write_conversations(tmp_path / "rows.jsonl", rows)
    model = SimpleNamespace(schema=AttributeSchema.load({"quality": None, "humor": None}))
    report = _report(tmp_path / "rows.jsonl", model)  # type: ignore[arg-type]
    assert report["labels"] == {
        "quality": {"human": {"2": 1, "3": 1}, "predicted": {"3": 1, "4": 1}}, "humor": {"human": {}, "predicted": {}}
    }  # fmt: skip
    assert (report["responses"], report["labelled"], report["unlabelled"]) == (3, 2, 1)
    html = annotation_page({"file": "rows.report.json", **report})
    assert "<code>rows.report.json</code>" in html and "2 of 3 responses in 3 conversations" in html
    cells = re.findall(r'<tr><th scope="row">quality</th><td>(\w+)</td>(.*?)</tr>', html)
    assert [(side, re.findall(r">(\d+)<", counts)) for side, counts in cells] == [
        ("annotators", ["2", "1", "1", "0"]), ("regressor", ["2", "0", "1", "1"])
    ]  # fmt: skip
