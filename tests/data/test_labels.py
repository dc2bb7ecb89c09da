"""What is found in the labels of a verb's files before anything heavy is imported."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from nemo_steerlm import config as c
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import read_conversations
from nemo_steerlm.data import labels
from nemo_steerlm.errors import DataError
from nemo_steerlm.provenance import write_run_json

TWO = AttributeSchema.load({"quality": None, "humor": None})


def _write(path: Path, *texts: str | None, key: str = "label", **more: Any) -> Path:
    lines = []
    for text in texts:
        answer = {"from": "Assistant", "value": "ho", key: text, **more}
        lines.append(json.dumps({"conversations": [{"from": "User", "value": "hi"}, answer]}) + "\n")
    path.write_text("".join(lines))
    return path


def _training(train: Any, val: Any = None, schema: AttributeSchema = TWO) -> c.TrainSftConfig:
    options = {a.name: c.AttributeOptions(low=a.low, high=a.high) for a in schema}
    return c.TrainSftConfig(
        output="", attributes=c.AttributesConfig(schema=options), model=c.ModelConfig(),
        data=c.PolicyDataConfig(train=train if isinstance(train, list) else str(train), val=val and str(val)),
        trainer=c.TrainerConfig(global_batch_size=1, micro_batch_size=1), optimizer=c.OptimizerConfig(lr=1.0),
    )  # fmt: skip


def _said(caplog: pytest.LogCaptureFixture, config: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        labels.check(config)
    return [record.getMessage() for record in caplog.records]


def test_more_attributes_are_left_out_and_named_once(tmp_path, caplog):
    rows = ["quality:4,humor:1,toxicity:0"] * 3 + ["quality:1,toxicity:4,Humour:2", None, ""]
    train = _write(tmp_path / "a.jsonl", *rows)
    val = _write(tmp_path / "b.jsonl", "humor:1,toxicity:0")
    assert _said(caplog, _training(train, val)) == [
        "data.train: labels have more attributes, which are left out: toxicity (4), Humour (1); Humour: did you mean "
        "'humor'?"
    ]
    found = [row.turns[1].label for row in read_conversations(train, TWO)]
    assert found == [{"quality": 4.0, "humor": 1.0}] * 3 + [{"quality": 1.0}, None, None]
    assert _said(caplog, _training(_write(tmp_path / "c.jsonl", "quality:4,humor:1"))) == []


def test_what_has_no_label_is_named_and_one_file_may_lack_what_another_has(tmp_path, caplog):
    one, two = _write(tmp_path / "a.jsonl", "quality:4"), _write(tmp_path / "b.jsonl", "humor:4")
    assert _said(caplog, _training([str(one), str(two)])) == []
    assert _said(caplog, _training(one)) == ["no label for humor in data.train: nothing is learnt about them"]
    assert _said(caplog, _training(_write(tmp_path / "c.jsonl", None))) == []  # unlabelled: for others to say


MISTAKES = {
    "misspelt": (
        ("quality:4", "humour:1", "humour:2"),
        "a.jsonl:2: unknown attribute 'humour'; did you mean 'humor'? 2 labels of data.train have 'humour', none has "
        "'humor': rename it in the data or in attributes",
    ),
    "foreign": (
        ("helpfulness:4,verbosity:1",),
        "a.jsonl: no label has an attribute of quality, humor; labels have helpfulness (1), verbosity (1)",
    ),
    "out of range": (
        ("quality:4,humor:1", "quality:5"),
        "a.jsonl:2: conversations[1]: attribute 'quality' is 5, outside its range 0 to 4",
    ),
    "malformed": (("quality=4",), "a.jsonl:1: conversations[1]: label 'quality=4' is malformed"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_its_place(name, tmp_path):
    texts, message = MISTAKES[name]
    with pytest.raises(DataError) as caught:
        labels.check(_training(_write(tmp_path / "a.jsonl", *texts)))
    assert message in str(caught.value) and str(tmp_path / "a.jsonl") in str(caught.value)


@pytest.mark.parametrize("text", ['{"conversations": [}', '{"conversations": [{"from": "User"}]}', '[{"a": 1}]', "3"])
def test_what_is_no_row_is_said_as_the_reader_says_it(text, tmp_path):
    path = _write(tmp_path / "a.jsonl", "quality:4,humor:1")
    path.write_text(path.read_text() + text + "\n")
    with pytest.raises(DataError) as theirs:
        list(read_conversations(path))
    try:
        labels.check(_training(path))
    except DataError as ours:
        assert str(ours) == str(theirs.value)
    else:  # what has no label is left to the reader
        assert "no 'value'" in str(theirs.value)


def test_rows_that_only_json_takes_are_counted_too(tmp_path, caplog):
    path = _write(tmp_path / "a.jsonl", "quality:4,humor:1")
    text = path.read_text().replace('"ho"', '"\\ud800", "weight": NaN').replace("humor", "toxicity")
    path.write_text("\ufeff" + text)
    assert "toxicity (1)" in _said(caplog, _training(path))[0]


def test_a_names_range_must_be_that_of_the_file(tmp_path):
    path = _write(tmp_path / "a.jsonl", "quality:4,humor:1")
    write_run_json(tmp_path, "prepare", {}, schema=AttributeSchema.load({"quality": {"high": 9}}))
    with pytest.raises(DataError, match=r"made with quality from 0 to 9 .*, but the attributes asked for say 0 to 4"):
        labels.check(_training(path))


def test_a_models_attributes_decide_where_a_model_is_used(tmp_path, caplog):
    (tmp_path / "model").mkdir()
    TWO.save(tmp_path / "model/attributes.yaml")
    with tarfile.open(tmp_path / "packed.nemo", "w") as archive:
        archive.add(tmp_path / "model", arcname=".")
    train = str(_write(tmp_path / "a.jsonl", "quality:4,humor:1,toxicity:0"))
    people = str(_write(tmp_path / "b.jsonl", "quality:4,toxicity:0", key="label_human", label="creativity:1"))
    write_run_json(tmp_path, "annotate", {}, schema=TWO, name="b.run.json")
    left = "labels have more attributes, which are left out: toxicity (1)"
    for model in (str(tmp_path / "model"), str(tmp_path / "packed.nemo")):
        for key, config in (
            ("input", c.EvaluateConfig(task="regressor", checkpoint=model, input=people, output="out")),
            ("annotated", c.SampleConfig(checkpoint=model, prompts="", annotated=train, target=[], output="out")),
            ("data.train", c.BootstrapConfig(
                policy=model, regressor="", data=c.BootstrapDataConfig(train=train), target=[], output="out",
                trainer=c.TrainerConfig(global_batch_size=1, micro_batch_size=1),
                optimizer=c.OptimizerConfig(lr=1.0))),
        ):  # fmt: skip
            assert _said(caplog, config) == [f"{key}: {left}"]
    assert _said(caplog, c.EvaluateConfig(task="label_noise", input=people, output="out")) == [f"input: {left}"]
    assert _said(caplog, c.EvaluateConfig(task="preference", checkpoint="x", input="nowhere", output="out")) == []
    nowhere = c.EvaluateConfig(task="regressor", checkpoint=str(tmp_path / "no"), input=people, output="out")
    assert _said(caplog, nowhere) == []  # loading it says what is wrong


def test_a_mistake_is_found_before_torch_is_imported(tmp_path):
    path = _write(tmp_path / "a.jsonl", "quality:4,humour:1")
    words = (
        f"train-sft attributes.schema.quality.high=4 attributes.schema.humor.high=4 data.train={path} output=out "
        "model.init=nowhere trainer.max_steps=1 optimizer.lr=1e-3"
    )
    code = f"import sys; from nemo_steerlm import cli; cli.main({words.split()!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "False\n" and "did you mean 'humor'?" in done.stderr, done
