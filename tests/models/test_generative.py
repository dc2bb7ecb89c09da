"""The generative regressor: loss on the attribute string alone, values read token by token, at every layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import LossConfig, ParallelConfig
from nemo_steerlm.data.label_string import LabelString
from nemo_steerlm.errors import CheckpointError, ConfigError
from nemo_steerlm.tokenizer import load_tokenizer
from tests import tokenizers
from tests.distributed import run_distributed
from tests.models.helpers import (
    ARCHITECTURE,
    GLOBAL_BATCH,
    NumberTokenizer,
    make_model,
    random_items,
    train,
    with_label_strings,
)

SMALL = dataclasses.replace(ARCHITECTURE, num_layers=2, hidden_size=32, ffn_hidden_size=48)
LAYOUTS: dict[str, dict] = {"dp2": {}, "tp2+sp packed": dict(tensor=2, sequence=True), "pp2": dict(pipeline=2)}


def _run(folder: str, name: str, parallel: ParallelConfig) -> list[dict]:
    lines = train(
        "regressor", Path(folder) / name, init=Path(folder) / "init", parallel=parallel, steps=2, head="generative",
        pack_length=96 if "packed" in name else None, architecture=SMALL,
    )  # fmt: skip
    keys = ("train/loss", "train/grad_norm", "val/loss", "val/humor/mae")
    return [{k: v for k, v in line.items() if k.startswith(keys)} for line in lines]


def _model(folder: str, layout: ParallelConfig) -> Any:
    from nemo_steerlm.megatron import checkpoint, parallel

    parallel.initialize(layout, seed=1)
    model = make_model("regressor", layout, head="generative", architecture=SMALL)
    model.build()
    init = Path(folder) / "init"
    if not init.exists():
        with torch.no_grad():
            for parameter in model.chunks[0].parameters():
                if parameter.dim() == 2:
                    parameter.mul_(8)  # so that texts matter
        checkpoint.save(init, checkpoint.model_state(model.chunks))
    checkpoint.load_model_state(model.chunks, checkpoint.load(init, checkpoint.model_state(model.chunks)))
    return model


def _texts() -> list[list[int]]:
    return [item["tokens"].tolist() for item in random_items("regressor", 7)]


def _logits(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model.chunks[0](torch.tensor([ids]), None, None)[0, :, :500].double().numpy()


def alone(folder: str) -> dict[str, Any]:
    """In one process: training, its first loss and its first predictions by hand."""
    model = _model(folder, ParallelConfig())
    total, count = 0.0, 0
    items = with_label_strings(model, random_items("regressor", 20))
    for item, plain in zip(items[:GLOBAL_BATCH], random_items("regressor", 20), strict=False):
        tokens, start = item["tokens"].tolist(), len(plain["tokens"])
        logits = _logits(model, tokens)
        for place in range(start, len(tokens)):
            row = logits[place - 1]
            total, count = total + float(np.log(np.exp(row).sum()) - row[tokens[place]]), count + 1
    by_hand = []
    for text in _texts():
        ids, shares = list(text), []
        for k, name in enumerate(("quality", "humor", "verbosity")):
            ids += NumberTokenizer().encode_continuations([f"{',' if k else ''}{name}:"])[0]
            levels = [300 + ord(str(level)) for level in range(5)]
            part = np.exp(_logits(model, ids)[-1][levels])
            shares.append((part / part.sum()).tolist())
            ids.append(levels[int(np.argmax(part))])
        by_hand.append(shares)
    refused = {}
    unusable: dict[str, dict[str, Any]] = {"pooling": {"pooling": "mean"}, "freeze": {"freeze": "trunk"}}
    for name, settings in unusable.items():
        try:
            make_model("regressor", ParallelConfig(), head="generative", **settings)
        except ConfigError as error:
            refused[name] = str(error)
    source = dataclasses.replace(model.card, head="ordinal")
    try:
        model.fresh_parameters(source)
    except CheckpointError as error:
        refused["source"] = str(error)
    return {
        "loss": total / count, "by hand": by_hand, "tp1 predicted": _predicted(model), "refused": refused,
        "tp1": _run(folder, "tp1", ParallelConfig()), "tp1 packed": _run(folder, "tp1 packed", ParallelConfig()),
    }  # fmt: skip


def _predicted(model: Any) -> dict[str, Any]:
    levels = model.distribution(_texts(), batch_tokens=90)
    return {"values": model.predict(_texts()).tolist(), "levels": [levels[n].tolist() for n in model.schema.names]}


def in_two(folder: str) -> dict[str, Any]:
    """In two processes: training and prediction at other layouts."""
    found: dict[str, Any] = {name: _run(folder, name, ParallelConfig(**layout)) for name, layout in LAYOUTS.items()}
    for name, layout in {"tp2": ParallelConfig(tensor=2), "pp2": ParallelConfig(pipeline=2)}.items():
        found[f"{name} predicted"] = _predicted(_model(folder, layout))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("generative"))
    return {**run_distributed(alone, 1, folder=folder), **run_distributed(in_two, 2, folder=folder)}


def test_the_loss_is_that_of_the_label_string_alone(runs: dict) -> None:
    assert runs["tp1"][0]["train/loss"] == pytest.approx(runs["loss"], rel=1e-5)


@pytest.mark.parametrize("layout", ["tp1 packed", *LAYOUTS])
def test_every_layout_trains_the_same(runs: dict, layout: str) -> None:
    assert len(runs[layout]) == len(runs["tp1"]) == 3 and "val/humor/mae" in runs["tp1"][-1]
    for line, reference in zip(runs[layout], runs["tp1"], strict=True):
        assert line == pytest.approx(reference, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2"])
def test_values_are_read_from_the_level_tokens_given_the_likeliest_before(runs: dict, layout: str) -> None:
    expected = np.array(runs["by hand"])  # [texts, attributes, levels]
    found = runs[f"{layout} predicted"]
    np.testing.assert_allclose(np.array(found["levels"]).transpose(1, 0, 2), expected, atol=2e-5)
    np.testing.assert_allclose(found["values"], expected @ np.arange(5), atol=1e-4)
    assert all(len(set(expected[:, k].argmax(-1))) > 1 for k in range(3))  # the texts do matter


def test_what_has_no_place_in_a_generative_regressor_is_refused(runs: dict) -> None:
    assert "model.pooling=mean" in runs["refused"]["pooling"] and "model.freeze=trunk" in runs["refused"]["freeze"]
    assert "head=ordinal, which has no vocabulary projection" in runs["refused"]["source"]


def test_losses_of_other_heads_are_refused() -> None:
    from nemo_steerlm.models.heads import make_head
    from nemo_steerlm.train.losses import Objective

    head = make_head("generative", AttributeSchema.load("helpsteer2"))
    for settings in ({"kind": "huber"}, {"weights": {"humor": 2.0}}, {"preference": "scaled"}, {"smoothing": 1.0}):
        with pytest.raises(ConfigError, match=f"loss.{next(iter(settings))}=.* is not for head=generative"):
            Objective(head, LossConfig(**settings))


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_label_strings_are_those_a_policy_reads(kind: str, tmp_path: Path) -> None:
    bpe = kind == "bpe"
    path = tokenizers.bpe(tmp_path, markers=True) if bpe else tokenizers.sentencepiece_model(tmp_path)
    tokenizer = load_tokenizer(path)
    schema = AttributeSchema.load("helpsteer2")
    strings = LabelString(schema, tokenizer)
    labels = [np.nan, 2.5, 4.0, np.nan, 0.2]
    ids, places = strings.encode(labels)
    text = "correctness:2,coherence:4,verbosity:0"
    assert tokenizer.decode_continuation(ids) == schema.format(schema.values(labels)) == text
    assert [tokenizer.decode_continuation([i]) for i, k in zip(ids, places, strict=True) if k >= 0] == ["2", "4", "0"]
    assert [k for k in places if k >= 0] == [1, 2, 4]
    with pytest.raises(ConfigError, match="level 10 of score is no token of its own"):
        LabelString(AttributeSchema.load({"score": {"low": 8, "high": 12}}), tokenizer)
