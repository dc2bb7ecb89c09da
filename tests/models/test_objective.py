"""Heads, pooling and preference pairs in the network: the same numbers at every layout, and those of float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_steerlm.config import LossConfig, ParallelConfig
from tests.distributed import run_distributed
from tests.models.helpers import ARCHITECTURE, GLOBAL_BATCH, random_items, random_units, train
from tests.models.helpers import make_model as make_model_of

PAIRS = 6
ONE = ParallelConfig()
CASES: dict[str, dict[str, Any]] = {
    "regression last scaled": dict(preference="scaled", preference_weight=0.7, weights={"humor": 3.0}),
    "regression mean margin": dict(preference="margin", kind="huber", balance="inverse_frequency"),
    "ordinal mean regular": dict(preference="regular", smoothing=1.5),
    "distribution last scaled": dict(preference="scaled", weights={"quality": 0.5}),
    "regression last regular": dict(preference="regular", preference_weight=0.7, weights={"humor": 3.0}),
    "distribution mean none": dict(),
    "ordinal last pairs": dict(preference="margin", kind="none"),
}
SMALL = dataclasses.replace(ARCHITECTURE, num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4)
SMALL = dataclasses.replace(SMALL, num_query_groups=2)
LAYOUTS: dict[str, dict] = {"dp2": {}, "tp2+sp": dict(tensor=2, sequence=True), "pp2": dict(pipeline=2)}


RUN_IN_TWO = [f"regression last scaled {name}{packed}" for name in LAYOUTS for packed in ("", " packed")] + [
    f"{case} {name}"
    for case in ("ordinal mean regular", "distribution last scaled")
    for name in ("dp2", "tp2+sp packed", "pp2")
]


def make_model(parallel: ParallelConfig = ONE, **settings: Any) -> Any:
    """A small regressor."""
    return make_model_of("regressor", parallel, architecture=SMALL, **settings)


def _settings(case: str) -> dict[str, Any]:
    head, pooling, _ = case.split()

    def task_of(model: Any) -> Any:
        from nemo_steerlm.train.losses import attribute_weights, mean_target
        from nemo_steerlm.train.tasks import RegressionTask

        labels = np.stack([item["labels"] for item in random_items("regressor", 20)])
        loss = LossConfig(preference_attribute="humor" if "preference" in CASES[case] else None, **CASES[case])
        weights = attribute_weights(loss, model.schema, labels)
        return RegressionTask(model, (), loss, weights, mean_target(model.head, labels))

    return dict(head=head, pooling=pooling, make_task=task_of, pairs=PAIRS, architecture=SMALL)


def _init(folder: Path, case: str) -> Path:
    return folder / f"init-{case.split()[0]}"


def _run(folder: str, case: str, name: str, parallel: ParallelConfig, **settings: Any) -> list[dict]:
    lines = train(
        "regressor", Path(folder) / f"{case} {name}", init=_init(Path(folder), case), parallel=parallel, steps=2,
        pack_length=96 if "packed" in name else None, **{**_settings(case), **settings},
    )  # fmt: skip
    keys = ("train/loss", "train/grad_norm", "val/loss", "val/humor/mae", "val/preference")
    return [{k: v for k, v in line.items() if k.startswith(keys)} for line in lines]


def alone(folder: str) -> dict:
    """In one process: every case padded and packed; the first loss by hand; what one process can show."""
    from nemo_steerlm.megatron import checkpoint, parallel

    found: dict[str, Any] = {}
    for case in CASES:
        parallel.initialize(ONE, seed=1)
        init = _init(Path(folder), case)
        if not init.exists():
            model = make_model(head=case.split()[0])
            model.build()
            _wake(model)
            checkpoint.save(init, checkpoint.model_state(model.chunks))
        found[f"{case} tp1"] = _run(folder, case, "tp1", ONE)
        found[f"{case} by hand"] = _by_hand(init, case)
        if case in list(CASES)[:4]:
            found[f"{case} tp1 packed"] = _run(folder, case, "tp1 packed", ONE)
    for head in ("regression", "ordinal", "distribution"):
        case = next(case for case in CASES if case.startswith(head))
        found[f"{head} frozen"], found[f"{head} adapted"] = _trained_parts(folder, case)
        found[f"{head} reopened"] = _reopened(Path(folder), head)
    found["silent"] = _silent_rows()
    return found


def _wake(model: Any) -> None:
    """A head of larger weights, so that values differ between texts and from the start."""
    with torch.no_grad():
        model.chunks[0].score.weight.mul_(10)


def _raw(model: Any, tokens: np.ndarray) -> np.ndarray:
    """The head's numbers for one text alone, float64."""
    with torch.no_grad():
        output = model.chunks[0](torch.tensor(np.array(tokens, np.int64))[None], None, None)[0].double().numpy()
    return output[-1] if model.card.pooling == "last" else output.mean(0)


def _by_hand(init: Path, case: str) -> float:
    """The loss of the first global batch, from single texts, pair by pair and label by label."""
    from nemo_steerlm.megatron import checkpoint
    from tests.models.test_heads import distribution, label_loss

    settings = _settings(case)
    model = make_model(head=settings["head"], pooling=settings["pooling"])
    model.build()
    checkpoint.load_model_state(model.chunks, checkpoint.load(init, checkpoint.model_state(model.chunks)))
    items = random_items("regressor", 20)
    units = random_units(items, PAIRS)
    objective, kind = settings["make_task"](model).objective, model.head.kind
    loss = objective.loss
    width = {"regression": 1, "ordinal": 4, "distribution": 5}[kind]
    total, count = 0.0, 0

    def value(parts: np.ndarray) -> float:
        humor = parts[1]
        return float(humor[0] if kind == "regression" else np.dot(distribution(kind, humor), range(5)))

    for unit in units[:GLOBAL_BATCH]:
        values = []
        for index in (i for i in unit if i >= 0):
            item, parts = items[index], _raw(model, items[index]["tokens"]).reshape(3, width)
            values.append(value(parts))
            for k, label in enumerate(item["labels"]):
                if np.isnan(label) or loss.kind == "none":
                    continue
                delta = loss.huber_delta if loss.kind == "huber" else None
                error = label_loss(kind, parts[k], float(label), 0, delta)
                if loss.smoothing and not np.isnan(item["label_count"]):
                    trust = item["label_count"] / (item["label_count"] + loss.smoothing)
                    prior = objective.mean.numpy().reshape(3, width + 1)[k]
                    error = trust * error - (1 - trust) * float(prior @ np.log(distribution(kind, parts[k])))
                total += error * (1.0 if objective.weights is None else float(objective.weights[k]))
                count += 1
        if len(values) == 2 and loss.preference != "none":
            strength = float(items[unit[0]]["strength"])
            difference = values[0] - values[1] - (strength if loss.preference == "margin" else 0.0)
            cost = np.log1p(np.exp(-difference)) * (strength if loss.preference == "scaled" else 1.0)
            total, count = total + loss.preference_weight * cost, count + 1
    return total / count


def _trained_parts(folder: str, case: str) -> tuple[list[str], list[str]]:
    """Names of what a frozen backbone and adapters train, with this head."""
    names: list[list[str]] = []

    def inspect(model: Any) -> None:
        names.append([n for n, p in model.chunks[0].named_parameters() if p.requires_grad and p.abs().sum() > 0])

    common: dict[str, Any] = dict(parallel=ONE, validate=False, inspect=inspect)
    _run(folder, case, "frozen", freeze="trunk", **common)
    lora = {"rank": 2, "alpha": 4.0, "targets": ["linear_qkv"]}
    _run(folder, case, "adapted", lora=lora, **common)
    return names[0], names[1]


def _reopened(folder: Path, head: str) -> dict:
    """Save, load, predict in batches, values and probabilities; whether the next training keeps the head."""
    from nemo_steerlm.formats import model_folder
    from nemo_steerlm.models import regressor
    from nemo_steerlm.models.base import model_config
    from tests.models.helpers import NumberTokenizer

    model = make_model(head=head, pooling="mean")
    model.build()
    _wake(model)
    model.save_pretrained(folder / head)
    card = model_folder.read(folder / head)
    tokenizer: Any = NumberTokenizer()
    again = regressor.AttributeRegressor(model_config(card), tokenizer)
    again.load_weights(folder / head)
    texts = [item["tokens"].tolist() for item in random_items("regressor", 9)]
    single = [torch.tensor(_raw(again, np.array(text)))[None] for text in texts]
    expected = torch.cat([again.head.values(raw) for raw in single])
    result: dict[str, Any] = {
        "card": [card.head, card.pooling], "fresh": again.fresh_head,
        "error": float(np.abs(again.predict(texts, batch_tokens=100) - expected.numpy()).max()),
    }  # fmt: skip
    if head == "regression":
        return result
    levels = again.distribution(texts, batch_tokens=100)
    result["sum"] = max(float(np.abs(levels[name].sum(1) - 1).max()) for name in again.schema.names)
    means = np.stack([levels[name] @ np.arange(5) for name in again.schema.names], axis=1)
    result["means"] = float(np.abs(means - expected.numpy()).max())
    other = make_model(head="regression")
    other.load_weights(folder / head)
    result["other head fresh"] = other.fresh_head
    return result


def _silent_rows() -> dict[str, float]:
    """Largest gradient of any weight from rows without labels, an unpaired half and an empty row; with a label."""
    from functools import partial

    from nemo_steerlm.train.batches import collate_regression

    sizes = {}
    items: list[Any] = random_items("regressor", 3)
    for pooling in ("last", "mean"):
        model = make_model(pooling=pooling)
        model.build()
        _wake(model)
        task = _settings("regression last scaled")["make_task"](model)
        collate = partial(collate_regression, outputs=3)
        for name, label in (("silent", np.nan), ("heard", 2.0)):
            rows = [{**item, "labels": np.full(3, np.nan, np.float32)} for item in items]
            rows[1]["labels"][2] = label
            batch = collate([*rows, None], range(0, 4 * 48, 48), (4, 48))
            model.chunks[0].zero_grad()
            model.train()
            total, _, _ = task.loss(model.chunks[0](batch["tokens"], None, None), batch)
            total.backward()
            gradients = [p.grad.abs().max() for p in model.chunks[0].parameters() if p.grad is not None]
            assert len(gradients) > 10
            sizes[f"{pooling} {name}"] = float(max(gradients))
    return sizes


def in_two(folder: str) -> dict:
    """In two processes: every case at every layout."""
    found = {}
    for run in sorted(RUN_IN_TWO, key=lambda run: run.split()[3]):  # a layout at a time
        case, name = " ".join(run.split()[:3]), " ".join(run.split()[3:])
        found[run] = _run(folder, case, name, ParallelConfig(**LAYOUTS[name.split()[0]]))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = str(tmp_path_factory.mktemp("objective"))
    return {**run_distributed(alone, 1, folder=folder), **run_distributed(in_two, 2, folder=folder)}


def _same(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected) == 3
    for line, reference in zip(found, expected, strict=True):
        assert line == pytest.approx(reference, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_float64(runs: dict, case: str) -> None:
    assert runs[f"{case} tp1"][0]["train/loss"] == pytest.approx(runs[f"{case} by hand"], rel=1e-5)
    if f"{case} tp1 packed" in runs:
        _same(runs[f"{case} tp1 packed"], runs[f"{case} tp1"])


def test_scaled_and_regular_losses_differ_where_strengths_do(runs: dict) -> None:
    scaled, regular = (runs[f"regression last {kind} tp1"][0]["train/loss"] for kind in ("scaled", "regular"))
    assert abs(scaled - regular) > 1e-3 * regular


@pytest.mark.parametrize("run", RUN_IN_TWO)
def test_every_layout_computes_the_same(runs: dict, run: str) -> None:
    _same(runs[run], runs[f"{' '.join(run.split()[:3])} tp1"])
    last = runs[run][-1]
    assert 0 <= last["val/preference/accuracy"] <= 1 and last["val/preference/loss"] > 0


@pytest.mark.parametrize("head", ["regression", "ordinal", "distribution"])
def test_frozen_trunks_and_adapters_train_every_head(runs: dict, head: str) -> None:
    assert runs[f"{head} frozen"] == ["score.weight"]
    adapted = runs[f"{head} adapted"]
    assert "score.weight" in adapted and any("adapter" in name for name in adapted)


@pytest.mark.parametrize("head", ["regression", "ordinal", "distribution"])
def test_a_model_folder_keeps_head_and_pooling(runs: dict, head: str) -> None:
    found = runs[f"{head} reopened"]
    assert found["card"] == [head, "mean"] and found["fresh"] is False and found["error"] < 1e-5
    if head != "regression":
        assert found["sum"] < 1e-5 and found["means"] < 1e-5 and found["other head fresh"] is True


def test_rows_without_a_label_or_a_pair_have_no_gradient(runs: dict) -> None:
    for pooling in ("last", "mean"):
        assert runs["silent"][f"{pooling} silent"] == 0.0 < runs["silent"][f"{pooling} heard"]
