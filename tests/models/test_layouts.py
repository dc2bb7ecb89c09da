"""Every layout, packed or not, computes the same training: loss and gradient norm over four steps, for both models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from nemo_steerlm.config import Architecture, ParallelConfig
from tests.distributed import run_distributed
from tests.models.helpers import ARCHITECTURE, make_batches, make_model, random_items, train

KINDS = ("regressor", "policy")
NAMES = ("quality", "humor", "verbosity")
VALIDATED: dict[str, dict[str, Any]] = {"dp2": {}, "dp2 packed": {}, "tp2": dict(tensor=2), "pp2": dict(pipeline=2)}
LAYOUTS: dict[str, dict] = {
    "tp1": dict(),
    "tp2+sp": dict(tensor=2, sequence=True),
    "tp2": dict(tensor=2),
    "pp2": dict(pipeline=2),
    "pp2+vpp2": dict(pipeline=2, virtual_pipeline=2),
    "dp2": dict(),
    "tp2xpp2": dict(tensor=2, pipeline=2),
    "tp2xpp2+sp": dict(tensor=2, pipeline=2, sequence=True),
}


def _held_out() -> list[dict]:
    """Eleven samples: the last global batch of eight is uneven, and one rank may hold none of it."""
    items = random_items("regressor", 11, seed=1)
    for number, item in enumerate(items):
        item["labels"] = np.rint(item["labels"])
        item["dataset"] = np.array(number % 2)
    return items


def _validate(folder: Path) -> dict:
    """Figures at each layout from the same weights, and the predictions they are of."""
    import torch

    from nemo_steerlm.megatron import checkpoint, parallel
    from nemo_steerlm.train.tasks import RegressionTask

    items, init = _held_out(), folder / "init-validation"
    result: dict[str, Any] = {}
    for name, layout in VALIDATED.items():
        config = ParallelConfig(**layout)
        parallel.initialize(config, seed=1)
        model = make_model("regressor", config)
        model.build()
        if name == "dp2":
            model.chunks[0].score.weight.data *= 10
            checkpoint.save(init, checkpoint.model_state(model.chunks))
        checkpoint.load_model_state(model.chunks, checkpoint.load(init, checkpoint.model_state(model.chunks)))
        if name == "dp2":  # each rank alone predicts all of them
            result["predicted"] = model.predict([item["tokens"].tolist() for item in items]).tolist()
        model.configure_model()
        model.eval()
        packed = 64 if "packed" in name else None
        batches = make_batches(
            "regressor", items, steps=2, micro_batch_size=2, parallel=config, once=True, pack_length=packed
        )
        plain = batches.collate

        def collate(items, starts, shape, plain=plain):
            dataset = [0 if item is None else int(item["dataset"]) for item in items]
            return {**plain(items, starts, shape), "dataset": torch.tensor(dataset)}

        for kind, names in (("", ()), (" by dataset", ("even", "odd"))):
            kept_keys = ("tokens", "labels", "dataset") if names else ("tokens", "labels")
            batches.item = lambda i, epoch, keys=kept_keys: {key: items[i][key] for key in keys}
            batches.collate, model.task = collate if names else plain, RegressionTask(model, names)
            with torch.no_grad():
                kept = [one for step in range(2) for one in model.run(batches[step], forward_only=True)]
            result[name + kind] = model.task.metrics(kept)
    return result


def train_layouts(folder: str, names: list[str], kinds: list[str], **settings) -> dict:
    """In every process: train each kind of model at each layout from the same weights."""
    from nemo_steerlm.megatron import checkpoint, parallel

    curves = {}
    for kind in kinds:
        init = Path(folder) / f"init-{kind}"
        if "tp1" in names:
            parallel.initialize(ParallelConfig(), seed=1)
            model = make_model(kind, ParallelConfig())
            model.build()
            checkpoint.save(init, checkpoint.model_state(model.chunks))
        for name in names:
            layout, _, packed = name.partition(" ")
            lines = train(
                kind, Path(folder) / f"{kind}-{name}", init=init, parallel=ParallelConfig(**LAYOUTS[layout]),
                pack_length=64 if packed else None, **settings,
            )  # fmt: skip
            keys = ("train/loss", "train/grad_norm", "val/loss", "val/humor/pearson", "val/humor/mae", "val/humor/mse")
            curves[f"{kind} {name}"] = [{k: line[k] for k in keys if k in line} for line in lines]
    return {**curves, "validation": _validate(Path(folder))} if "dp2" in names else curves


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = str(tmp_path_factory.mktemp("layouts"))
    one = run_distributed(train_layouts, 1, folder=folder, names=["tp1", "tp1 packed"], kinds=list(KINDS))
    names = ["tp2+sp", "tp2", "pp2", "pp2+vpp2", "dp2"]
    names += [f"{name} packed" for name in names]
    two = run_distributed(train_layouts, 2, folder=folder, names=names, kinds=list(KINDS), timeout=500)
    four = run_distributed(train_layouts, 4, folder=folder, names=["tp2xpp2", "tp2xpp2+sp"], kinds=list(KINDS))
    return {**one, **two, **four}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [*LAYOUTS, *(f"{name} packed" for name in LAYOUTS if "x" not in name)][1:])
def test_loss_and_gradient_norm_are_those_of_one_process(curves: dict, kind: str, layout: str) -> None:
    expected, found = curves[f"{kind} tp1"], curves[f"{kind} {layout}"]
    assert [set(line) for line in found] == [set(line) for line in expected]
    assert sum("train/loss" in line for line in expected) == 4
    for line, reference in zip(found, expected, strict=True):
        for name, value in reference.items():
            assert line[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def _expected(predicted: np.ndarray, labels: np.ndarray, prefix: str) -> dict[str, float]:
    result: dict[str, float] = {}
    for k, name in enumerate(NAMES):
        there = ~np.isnan(labels[:, k])
        x, y = predicted[there, k], labels[there, k]
        x_level, y_level = np.clip(np.rint(x), 0, 4).astype(int), y.astype(int)
        result |= {
            f"val/{prefix}{name}/pearson": stats.pearsonr(x, y)[0],
            f"val/{prefix}{name}/spearman": stats.spearmanr(x, y)[0],
            f"val/{prefix}{name}/mse": metrics.mean_squared_error(y, x),
            f"val/{prefix}{name}/mae": metrics.mean_absolute_error(y, x),
            f"val/{prefix}{name}/accuracy": metrics.accuracy_score(y_level, x_level),
            f"val/{prefix}{name}/kappa": metrics.cohen_kappa_score(
                y_level, x_level, labels=range(5), weights="quadratic"
            ),
        }
    return result


@pytest.mark.parametrize("layout", VALIDATED)
def test_every_layout_counts_each_sample_once_as_scikit_learn_does(curves: dict, layout: str) -> None:
    figures = curves["validation"]
    predicted = np.array(figures["predicted"], np.float64)
    labels = np.stack([item["labels"] for item in _held_out()]).astype(np.float64)
    assert np.isnan(labels).any() and predicted.std(axis=0).min() > 0.3
    expected = _expected(predicted, labels, "")
    expected["val/loss"] = float(np.nanmean((predicted - labels) ** 2))
    assert figures[layout] == pytest.approx(expected, rel=1e-4, nan_ok=True)
    for start, name in enumerate(("even/", "odd/")):
        expected |= _expected(predicted[start::2], labels[start::2], name)
    assert figures[f"{layout} by dataset"] == pytest.approx(expected, rel=1e-4, nan_ok=True)


def test_a_layout_that_does_not_divide_is_refused() -> None:
    from nemo_steerlm.config.layout import check_layout
    from nemo_steerlm.errors import ConfigError

    with pytest.raises(ConfigError, match=r"parallel.tensor=3 does not divide the model's num_attention_heads=8"):
        check_layout(ARCHITECTURE, ParallelConfig(tensor=3))
    with pytest.raises(ConfigError, match=r"parallel.pipeline=5 exceeds the model's num_layers=4"):
        check_layout(ARCHITECTURE, ParallelConfig(pipeline=5))
    with pytest.raises(ConfigError, match=r"virtual_pipeline=3 does not divide the model's num_layers=4"):
        check_layout(ARCHITECTURE, ParallelConfig(pipeline=2, virtual_pipeline=3))
    with pytest.raises(ConfigError, match="num_query_groups"):
        check_layout(Architecture(num_attention_heads=8, num_query_groups=2), ParallelConfig(tensor=4))
