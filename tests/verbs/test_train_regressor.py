"""`train-regressor` on files: several of them, preference pairs, rows that teach nothing, a second stage, mistakes."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_steerlm.config import AnnotateConfig, DataConfig, LossConfig, OptimizerConfig, RegressorModelConfig
from nemo_steerlm.conversation import Pair, Turn, read_conversations, write_conversations
from nemo_steerlm.errors import SteerLMError
from tests.distributed import run_distributed
from tests.verbs.helpers import make_world, regressor_config, weights_of

SCALED = dict(preference="scaled", preference_attribute="helpfulness")
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no pairs": (SCALED, "loss.preference needs pairs: none of the 60 conversations is in a complete one (0"),
    "no pairs alone": ({**SCALED, "kind": "none"}, "none of the 60 conversations is in a complete one"),
    "no attribute": ({"preference": "margin"}, "loss.preference=margin needs loss.preference_attribute=one of"),
    "unknown attribute": (
        {"preference": "regular", "preference_attribute": "helpfullness"}, "did you mean 'helpfulness'?"
    ),
    "unknown weight": ({"weights": {"humour": 2.0}}, "loss.weights.humour: no such attribute; did you mean 'humor'?"),
    "nothing to learn": ({"kind": "none"}, "loss.kind=none leaves nothing to train on"),
}  # fmt: skip


def _pairs(world: Path, output: str) -> int:
    """Preference pairs of neighbouring training rows whose helpfulness differs, all chosen rows first."""
    rows = list(read_conversations(world / "data/train.jsonl"))
    chosen, rejected = [], []
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        labels = [(row.turns[-1].label or {}).get("helpfulness", 0.0) for row in (one, two)]
        if labels[0] != labels[1]:
            better, worse = (one, two) if labels[0] > labels[1] else (two, one)
            better.pair = Pair(one.id or "", "chosen", abs(labels[0] - labels[1]))
            worse.pair, worse.extra["dataset"] = Pair(one.id or "", "rejected"), "losers"
            worse.turns[-1].label = None
            chosen.append(better)
            rejected.append(worse)
    write_conversations(world / output, [*chosen, *rejected])
    return len(chosen)


def _silent(world: Path, output: str) -> None:
    """The pairs and four rows that teach nothing: too long, unlabelled, and two halves without their other."""
    rows = list(read_conversations(world / "data/pairs.jsonl"))
    extra = list(read_conversations(world / "data/train.jsonl"))[:4]
    extra[0].turns[-1].text += " and so on" * 300
    for row in extra[1:]:
        row.turns = [Turn(turn.speaker, turn.text) for turn in row.turns]
    extra[2].pair, extra[3].pair = Pair("lone", "chosen", 3.0), Pair("other", "rejected")
    write_conversations(world / output, [*rows[:20], extra[0], extra[2], *rows[20:], extra[1], extra[3]])


def _annotated(world: Path, name: str) -> dict[str, Any]:
    """What `annotate` writes with a model folder, against the model itself."""
    from nemo_steerlm.models.regressor import AttributeRegressor
    from nemo_steerlm.verbs import annotate

    source, output = world / "data/test.jsonl", world / f"{name}.jsonl"
    checkpoint = world / name / "model"
    annotate.main(AnnotateConfig(checkpoint=str(checkpoint), input=str(source), output=str(output)))
    model = AttributeRegressor.from_pretrained(checkpoint)
    values = [row.turns[-1].label_predicted or {} for row in read_conversations(output)]
    scores = model.score(list(read_conversations(source)))
    errors = [abs(one[key] - two[key]) for one, two in zip(values, scores, strict=True) for key in two]
    return {"class": type(model).__name__, "head": model.card.head, "error": max(errors), "values": len(errors)}


def _old_folder(world: Path) -> list[str]:
    """Head and pooling of a model folder that names neither."""
    from nemo_steerlm.formats import model_folder

    shutil.copytree(world / "plain/model", world / "old")
    (world / "old/SHA256SUMS").unlink()  # as in folders of that time
    path = world / "old/model_config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    assert "head: regression\n" in lines and "pooling: last\n" in lines
    path.write_text("".join(line for line in lines if not line.startswith(("head:", "pooling:"))))
    card = model_folder.read(world / "old")
    return [card.head, card.pooling]


def train_all(folder: str) -> dict[str, Any]:
    """In one process: every run of this module."""
    from nemo_steerlm.verbs import train_regressor

    world = Path(folder)
    make_world(world)
    found: dict[str, Any] = {"pairs": _pairs(world, "data/pairs.jsonl")}
    _silent(world, "data/silent.jsonl")
    train, pairs = str(world / "data/train.jsonl"), str(world / "data/pairs.jsonl")
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("nemo_steerlm.models.regressor").addHandler(handler)

    def run(name: str, data: Any, loss: dict, steps: int = 2, lr: float = 1e-3, **settings: Any) -> None:
        rows = DataConfig(train=data, val=pairs, max_length=400, **settings.pop("rows", {}))
        config = regressor_config(world, name, steps=steps, data=rows, loss=LossConfig(**loss))
        if config.model.architecture is not None:  # packing drops nothing
            plain = dataclasses.replace(config.model.architecture, hidden_dropout=0.0, attention_dropout=0.0)
            config.model.architecture = plain
        config.optimizer = OptimizerConfig(lr=lr, warmup_steps=0)
        for key, value in settings.items():
            setattr(config, key, value)
        train_regressor.main(config)
        lines = [json.loads(line) for line in (world / name / "metrics.jsonl").read_text().splitlines()]
        report = json.loads((world / name / "run.json").read_text())["data"]["train"]
        found[name] = {"lines": lines, "report": report}

    run("plain", train, {})
    run("whole", pairs, SCALED)
    run("silent", str(world / "data/silent.jsonl"), SCALED, rows={"overlong": "drop"})
    files = {"weights": [1.0, 2.5], "packing": True}
    run("mixed", [train, pairs], {**SCALED, "balance": "inverse_frequency"}, rows=files)
    start = RegressorModelConfig(init=str(world / "plain/model"))
    run("second stage", pairs, {**SCALED, "kind": "none"}, lr=0.0, model=start)
    one, two = (weights_of(world / name / "model") for name in ("plain", "second stage"))
    found["kept"] = one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    run("trained on", pairs, {**SCALED, "kind": "none"}, steps=12, lr=3e-3, model=start)
    found["before"] = list(messages)
    run("other head", train, {}, steps=1, head="ordinal", model=start)
    found["after"] = list(messages)
    run("written", train, {}, head="generative")
    found["annotated"] = {name: _annotated(world, name) for name in ("second stage", "other head", "written")}
    found["old folder"] = _old_folder(world)
    for name, (loss, _) in MISTAKES.items():
        try:
            run(name, train, loss)
        except SteerLMError as error:
            found[name] = str(error)
    for name, settings in {"few": {"weights": [1.0]}, "short": {"packing": True, "pack_length": 400}}.items():
        try:
            run(name, [train, pairs], SCALED, rows=settings)
        except SteerLMError as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_distributed(train_all, 1, folder=str(tmp_path_factory.mktemp("regressors")))


def test_rows_that_teach_nothing_change_nothing(found: dict) -> None:
    keys = ("train/loss", "train/grad_norm", "train/labels", "val/loss")
    curves = [[{k: r[k] for k in keys if k in r} for r in found[name]["lines"]] for name in ("whole", "silent")]
    assert curves[0] == curves[1]
    report = found["silent"]["report"]
    assert (report["dropped_overlong"], report["incomplete_pairs"], report["pairs"]) == (1, 2, found["pairs"])
    assert report["kept"] == found["pairs"] * 2


def test_files_are_mixed_as_asked_and_pairs_are_terms(found: dict) -> None:
    report, pairs = found["mixed"]["report"], found["pairs"]
    one, two = report.values()
    assert one["datasets"] == {"train": one["kept"]} and one["pairs"] == 0
    assert two["pairs"] == pairs > 10 and two["incomplete_pairs"] == 0
    assert two["datasets"] == {"pairs": pairs, "losers": pairs}
    losses = [line["val/preference/loss"] for line in found["mixed"]["lines"] if "val/preference/loss" in line]
    assert losses and all(math.isfinite(loss) for loss in losses)


def test_the_second_stage_keeps_the_head_and_orders_the_pairs(found: dict) -> None:
    assert found["kept"] and not found["before"]
    before = [line for line in found["second stage"]["lines"] if "val/loss" in line][-1]
    after = [line for line in found["trained on"]["lines"] if "val/loss" in line][-1]
    assert found["second stage"]["report"]["kept"] == 2 * found["pairs"]
    assert after["val/preference/loss"] < before["val/preference/loss"]
    assert after["val/preference/accuracy"] > before["val/preference/accuracy"]


def test_another_head_starts_anew_and_says_so(found: dict) -> None:
    assert len(found["after"]) == 1
    assert "the head starts anew: it is head=ordinal" in found["after"][0] and "head=regression" in found["after"][0]


def test_annotation_uses_every_head(found: dict) -> None:
    classes = {name: (row["class"], row["head"]) for name, row in found["annotated"].items()}
    assert classes == {
        "second stage": ("AttributeRegressor", "regression"), "other head": ("AttributeRegressor", "ordinal"),
        "written": ("GenerativeRegressor", "generative"),
    }  # fmt: skip
    assert all(row["error"] < 1e-3 and row["values"] == 100 for row in found["annotated"].values())
    assert found["old folder"] == ["regression", "last"]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_by_its_key(found: dict, name: str) -> None:
    assert MISTAKES[name][1] in found[name] and "\n" not in found[name]


def test_files_and_rows_that_do_not_fit(found: dict) -> None:
    assert "data.weights=[1.0]: expected one number above 0 for each of the 2 files of data.train" in found["few"]
    assert "data.pack_length=400 does not hold the longest preference pair" in found["short"]
