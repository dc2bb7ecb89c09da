"""The figures of prepare's report against numpy, and what it finds wrong."""

from __future__ import annotations

import json
import os
import random
import re

import numpy as np
import pytest

from nemo_steerlm.config import AttributesConfig, PrepareConfig
from nemo_steerlm.conversation import Conversation, Pair, Turn, write_conversations
from nemo_steerlm.data.near import PromptSample, leaks
from nemo_steerlm.data.prepare import prepare
from nemo_steerlm.data.report import LabelFigures
from nemo_steerlm.errors import DataError
from nemo_steerlm.report.data_page import data_page
from nemo_steerlm.verbs import prepare as pipeline
from tests.data.helpers import prepare_config, run
from tests.tokenizers import bpe


def row(*texts, label=None, **more):
    turns = [{"from": ("User", "Assistant")[i % 2], "value": text, "label": None} for i, text in enumerate(texts)]
    turns[-1]["label"] = label
    return {"conversations": turns, **more}


def write(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def test_label_figures_are_numpys():
    random = np.random.default_rng(0)
    names = ("a", "b", "c", "never")
    values = random.normal(2, 1, (1000, 4)) + random.normal(0, 1, (1000, 1))
    values[random.random((1000, 4)) < 0.3] = np.nan
    values[:, 3] = np.nan
    figures = LabelFigures(names)
    for line in values:
        figures.add({name: value for name, value in zip(names, line) if not np.isnan(value)})
    correlations, statistics, histograms = figures.correlations(), figures.statistics(), figures.histograms()
    for i, name in enumerate(names[:3]):
        given = values[~np.isnan(values[:, i]), i]
        assert statistics[name]["n"] == len(given)
        assert statistics[name]["mean"] == pytest.approx(given.mean(), abs=1e-4)
        assert statistics[name]["std"] == pytest.approx(given.std(), abs=1e-4)
        rounded, counts = np.unique([round(value) for value in given], return_counts=True)
        assert histograms[name] == {str(value): count for value, count in zip(rounded, counts)}
        for j, other in enumerate(names[:3]):
            both = ~np.isnan(values[:, i]) & ~np.isnan(values[:, j])
            expected = np.corrcoef(values[both, i], values[both, j])[0, 1]
            assert correlations[name][other] == pytest.approx(expected, abs=1e-4)
    assert correlations["a"]["never"] is None and statistics["never"] == {"n": 0, "mean": None, "std": None}


def test_what_looks_wrong_is_counted_and_named(tmp_path):
    rows = [
        row("a", "b", id="fine"),
        row("c <extra_id_1>User\nx", "d", id="marker"),
        row("c2", "d2", id="marked-system", system="s\n<extra_id_1>"),
        row("c3", "d3", id="fine"),
        row("e", "e", id="repeats"),
        row("f", "g\nHuman: and then", id="runs-on"),
        row(" ", "h", id="empty"),
        row("i \ufffd", "j", id="bytes"),
        {"conversations": [{"from": "User", "value": "k"}, *row("l", "m")["conversations"]], "id": "twice"},
    ]
    report = prepare(prepare_config(source="steerlm", input=write(tmp_path / "a.jsonl", rows), output=tmp_path / "o"))
    assert report["suspicious"] == {
        name: {"rows": len(where.split()), "examples": where.split()}
        for name, where in sorted({
            "template_marker_in_text": "marker marked-system", "id_of_an_earlier_row": "fine",
            "response_repeats_prompt": "repeats", "empty_turn": "empty",
            "next_turn_in_response": "runs-on", "replacement_character": "bytes", "same_speaker_twice": "twice",
        }.items())
    }  # fmt: skip


def test_lengths_in_characters_and_in_tokens(tmp_path):
    rows = [row("x" * 3000, "y" * 3000, system=""), row("x", "y" * 64, system=""), row("z", "y" * 65, system="")]
    settings = {"source": "steerlm", "input": write(tmp_path / "a.jsonl", rows), "output": tmp_path / "o"}
    report = prepare(prepare_config(**settings))
    assert report["response_lengths"]["histogram"] == {
        "64": 1, "128": 1, "256": 0, "512": 0, "1024": 0, "2048": 0, "4096": 1
    }  # fmt: skip
    over = report["conversation_lengths"]["share_over"]
    assert over == {"4096": round(1 / 3, 4), "8192": 0.0, "16384": 0.0, "32768": 0.0}
    report = prepare(prepare_config(**settings, tokenizer=bpe(tmp_path / "bpe", markers=True)))
    assert report["conversation_lengths"]["unit"] == "tokens"
    assert report["conversation_lengths"]["share_over"]["1024"] == round(1 / 3, 4)


def test_prompts_on_both_sides_of_a_datasets_own_split(tmp_path, caplog):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "train.jsonl", [row("The same  prompt", "a"), row("another", "b")])
    write(tmp_path / "in" / "validation.jsonl", [row("the same prompt", "c"), row("third", "d")])
    report = prepare(prepare_config(source="steerlm", input=tmp_path / "in", output=tmp_path / "o", val_fraction=None))
    assert {key: report["prompts"][key] for key in ("train", "val", "in_both")} == {"train": 2, "val": 2, "in_both": 1}
    assert "1 prompts stand in train and in val" in caplog.text


def test_rows_that_the_dataset_holds_out_are_told(tmp_path, caplog):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "test.jsonl", [row("a", "b"), row("c", "d")])
    settings = {"source": "steerlm", "input": tmp_path / "in", "output": tmp_path / "o", "val_fraction": 0}
    assert prepare(prepare_config(**settings))["held_out_rows_in_train"] == 0  # whoever gives only these knows
    write(tmp_path / "in" / "all.jsonl", [row("e", "f", split="train"), row("g", "h", split="validation")])
    assert prepare(prepare_config(**settings))["held_out_rows_in_train"] == 3
    assert "3 rows that the dataset holds out itself" in caplog.text and "val_fraction=null" in caplog.text
    (tmp_path / "in" / "all.jsonl").write_text(json.dumps(row("e", "f", split="train")) + "\n")
    assert prepare(prepare_config(**{**settings, "val_fraction": None}))["held_out_rows_in_train"] == 0


def test_a_sample_tells_what_share_of_all_has_twins():
    pytest.importorskip("datasketch")
    generator = random.Random(0)
    words = [f"word{index}" for index in range(500)]
    prompts = [" ".join(generator.choices(words, k=40)) for _ in range(6000)]
    twins = [prompt + " indeed" for prompt in prompts[:300]]
    distant = [" ".join(generator.choices(words, k=40)) for _ in range(300)]
    train, val = PromptSample(600), PromptSample(600)  # a tenth of the prompts of train
    for sample, given in ((train, prompts), (val, twins + distant)):
        for prompt in given:
            sample.add(prompt)
    found = leaks(train, val)
    assert found is not None
    assert found["train_prompts_compared"] == 600 and 40 < found["val_prompts_compared"] < 90
    assert 0.35 < found["val_prompts_with_a_near_twin"] / found["val_prompts_compared"] < 0.65  # it is half


def test_near_twins_are_found_and_strangers_are_not():
    pytest.importorskip("datasketch")
    generator = random.Random(0)
    words = [f"word{index}" for index in range(500)]
    prompts = [" ".join(generator.choices(words, k=40)) for _ in range(300)]
    twins = [prompt + " indeed" for prompt in prompts[:40]]
    distant = [" ".join(generator.choices(words, k=40)) for _ in range(30)]
    # 33 of 43 triples in common: often a candidate of MinHash, but below the threshold
    distant += [" ".join([*prompt.split()[:35], *generator.choices(words, k=5)]) for prompt in prompts[100:150]]
    train, val = PromptSample(300), PromptSample(120)
    for prompt in prompts:
        train.add(prompt)
    for prompt in twins + distant:
        val.add(prompt)
    found = leaks(train, val)
    assert found is not None
    assert found["train_prompts_compared"] == 300 and found["val_prompts_compared"] == 120
    assert 36 <= found["val_prompts_with_a_near_twin"] <= 40 and len(found["examples"]) == 5
    assert all(pair["val"] == pair["train"] for pair in found["examples"])  # as far as they are shown


def test_the_sample_of_prompts_is_bounded_and_knows_no_order():
    prompts = [f"prompt {index}" for index in range(1000)]
    one, two = PromptSample(50), PromptSample(50)
    for prompt in prompts:
        one.add(prompt)
    for prompt in prompts[::-1] + prompts:
        two.add(prompt)
    assert one.prompts() == two.prompts() and len(one.prompts()) == 50
    assert len({prompt[:8] for prompt in one.prompts()}) > 5  # not the first ones


def test_check_reads_everything_and_writes_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [row("a", "b", label="quality:4"), row("c", "d", label="quality:1")])
    monkeypatch.chdir(tmp_path)
    config = PrepareConfig(source="steerlm", input="a.jsonl", check=True, attributes=AttributesConfig())
    text = pipeline.main(config)
    assert text.startswith("a.jsonl: can be read; nothing is written") and "labelled_responses" in text
    assert "can be read" in pipeline.main(PrepareConfig(source="steerlm", input=".", check=True))
    assert os.listdir(tmp_path) == ["a.jsonl"]
    with open(path, "a") as file:
        file.write(json.dumps(row("e", "f", label="quality:5")) + "\n")
    with pytest.raises(DataError, match=r"a.jsonl:3: .*quality.* is 5, outside its range"):
        pipeline.main(config)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_the_page_says_what_the_report_does_and_no_text_becomes_markup(tmp_path):
    rows = [
        row(f"{k} <script>alert({k})</script>", "b" * (k + 1), label=f"quality:{k % 5},humor:{k % 3}", lang="<b>")
        for k in range(40)
    ]
    rows.append(row("q", "r", pair={"id": "p", "role": "chosen"}))
    rows.append(row("q", "s", split="train"))
    rows.append(row("t", "u", split="test"))
    rows.append(row(" ", "v"))
    write(tmp_path / "a.jsonl", rows)
    config = PrepareConfig(source="steerlm", input=str(tmp_path / "a.jsonl"), output=str(tmp_path / "o"))
    pipeline.main(config)
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    page = (tmp_path / "o" / "report.html").read_text()
    assert page == data_page(report, pipeline.commands(config, report))
    assert "<script>" not in page and "<b>" not in page
    assert re.search(r"<dt>Made</dt><dd>\d{4}-\d\d-\d\d by <code>steerlm prepare source=steerlm input=", page)
    assert "<dt>Next</dt><dd><code>steerlm train-regressor output=regressor attributes.preset=helpsteer " in page
    titles = ("In and out", "Labels", "Correlations of the labels", "Preference pairs", "Lengths", "Prompts and leaks")
    assert all(f"<h2>{title}</h2>" in page for title in (*titles, "Rows to look at", "Datasets", "Languages"))
    assert "halves are missing" in page and "empty turn" in page
    assert ("rows the dataset itself holds out" in page) == bool(report["held_out_rows_in_train"])
    people = {"helpfulness": {"items": 7, "ratings": 21, "alpha": 0.4321}}
    assert '<td class="number">0.432</td>' in data_page({**report, "rater_agreement": people})
    minimal = data_page({"source": "synthetic", "recipe": "default"})
    assert "<h2>" not in minimal


def test_a_missing_half_is_told(tmp_path, caplog):
    halves = [
        Conversation([Turn("User", "q"), Turn("Assistant", f"{name} {role}")], pair=Pair(name, role))
        for name, role in (("a", "chosen"), ("b", "rejected"), ("c", "rejected"), ("c", "chosen"))
    ]
    write_conversations(tmp_path / "a.jsonl", halves)
    report, rows = run("steerlm", tmp_path / "a.jsonl", tmp_path)
    assert len(rows) == 4 and report["pairs"]["train"] == {"chosen": 2, "rejected": 2, "complete": False}
    assert "train holds halves of preference pairs" in caplog.text
