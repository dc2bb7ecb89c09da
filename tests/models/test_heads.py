"""Heads and objective against float64 arithmetic written out by hand in NumPy, and its finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import LossConfig
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.models.heads import LevelHead, make_head
from nemo_steerlm.train.losses import Objective, attribute_weights, mean_target

SCHEMA = AttributeSchema.load({"quality": {"high": 4}, "humor": {"low": 1, "high": 3}, "refusal": {"high": 1}})
RANGES = [(0, 4), (1, 3), (0, 1)]
KINDS = ("regression", "ordinal", "distribution")
WIDTHS = {"regression": [1, 1, 1], "ordinal": [4, 2, 1], "distribution": [5, 3, 2]}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def distribution(kind: str, raw: np.ndarray) -> list[float]:
    """Probabilities of the levels of one attribute."""
    if kind == "distribution":
        return (np.exp(raw) / np.exp(raw).sum()).tolist()
    above, place = [1.0], raw[0]
    for position in range(len(raw)):
        place -= math.log1p(math.exp(raw[position])) if position else 0.0
        above.append(sigmoid(place))
    above.append(0.0)
    return [one - two for one, two in zip(above, above[1:], strict=False)]


def label_loss(kind: str, raw: np.ndarray, label: float, low: int, delta: float | None = None) -> float:
    """Loss of one label."""
    if kind == "regression":
        error = abs(raw[0] - label)
        if delta is None:
            return error**2
        return error**2 / 2 if error <= delta else delta * (error - delta / 2)
    logs = np.log(distribution(kind, raw))
    below = math.floor(label)
    share = label - below  # of the level above
    return -sum(part * logs[level - low] for level, part in ((below, 1 - share), (below + 1, share)) if part)


def reference(kind: str, raw: np.ndarray, labels: np.ndarray, weights=(1, 1, 1), delta: float | None = None) -> float:
    total = 0.0
    for numbers, row in zip(raw, labels, strict=True):
        parts = np.split(numbers, np.cumsum(WIDTHS[kind])[:-1])
        for part, label, (low, _), weight in zip(parts, row, RANGES, weights, strict=True):
            if not math.isnan(label):
                total += weight * label_loss(kind, part, label, low, delta)
    return total


def example(kind: str, rows: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(KINDS.index(kind))
    labels = np.stack([rng.uniform(low, high, rows) for low, high in RANGES], axis=1)
    labels[0] = [4, 1, 0]  # on levels, at both ends
    labels[1:4][rng.random((3, 3)) < 0.5] = np.nan
    labels[2] = np.nan  # a row without any label
    return rng.normal(size=(rows, sum(WIDTHS[kind]))) * 2, labels


def run(objective: Objective, raw: np.ndarray, labels: np.ndarray, **batch) -> tuple[float, int, np.ndarray]:
    leaf = torch.tensor(raw, requires_grad=True)
    total, count, _ = objective(leaf, {"labels": torch.tensor(labels), **batch})
    total.backward()
    assert count.dtype == torch.int
    assert leaf.grad is not None
    return float(total.detach()), int(count), leaf.grad.numpy()


def check(objective: Objective, expected, raw: np.ndarray, labels: np.ndarray, **batch) -> None:
    total, count, gradient = run(objective, raw, labels, **batch)
    assert total == pytest.approx(expected(raw), rel=1e-12)
    assert count == np.isfinite(labels).sum()
    assert not gradient[np.isnan(labels).all(1)].any()
    for place in np.ndindex(raw.shape):
        step = np.zeros_like(raw)
        step[place] = 1e-5
        difference = (expected(raw + step) - expected(raw - step)) / 2e-5
        assert gradient[place] == pytest.approx(difference, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient(kind: str) -> None:
    head = make_head(kind, SCHEMA)
    raw, labels = example(kind)
    assert head.outputs == raw.shape[1]
    check(Objective(head), lambda x: reference(kind, x, labels), raw, labels)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_values_are_the_means_of_proper_distributions(kind: str) -> None:
    head = make_head(kind, SCHEMA)
    assert isinstance(head, LevelHead)
    raw, _ = example(kind)
    probabilities = np.split(head.probabilities(torch.tensor(raw)).numpy(), np.cumsum([5, 3])[:2], axis=1)
    for row in range(len(raw)):
        parts = np.split(raw[row], np.cumsum(WIDTHS[kind])[:-1])
        for k, (part, (low, high)) in enumerate(zip(parts, RANGES, strict=True)):
            expected = distribution(kind, part)
            np.testing.assert_allclose(probabilities[k][row], expected, rtol=1e-10)
            mean = sum(p * level for p, level in zip(expected, range(low, high + 1), strict=True))
            assert float(head.values(torch.tensor(raw))[row, k]) == pytest.approx(mean, rel=1e-12)
    far = head.log_probabilities(torch.full((1, head.outputs), -200.0))
    assert all(torch.isfinite(part).all() for part in far)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_keeps_the_label_and_the_mean_target_starts_the_head(kind: str) -> None:
    head = make_head(kind, SCHEMA)
    _, labels = example(kind, rows=40)
    mean = mean_target(head, labels)
    assert mean.shape == (head.columns,)
    started = head.values(head.start(mean)[None])[0].numpy()
    np.testing.assert_allclose(started, np.nanmean(labels, axis=0), atol=0.02)
    if kind != "regression":
        levels = np.concatenate([np.arange(low, high + 1) for low, high in RANGES])
        columns = head.target(torch.tensor(labels[4:])).numpy() * levels
        means = [part.sum(1) for part in np.split(columns, [5, 8], axis=1)]
        np.testing.assert_allclose(np.stack(means, 1), labels[4:], rtol=1e-12)
    labels[:, 1] = np.nan  # nothing is known of humor: zero, or every level alike
    unknown = head.values(head.start(mean_target(head, labels))[None])[0]
    assert float(unknown[1]) == pytest.approx(0.0 if kind == "regression" else 2.0, abs=1e-6)


def test_huber() -> None:
    head = make_head("regression", SCHEMA)
    raw, labels = example("regression")
    objective = Objective(head, LossConfig(kind="huber", huber_delta=0.7))
    check(objective, lambda x: reference("regression", x, labels, delta=0.7), raw, labels)


def _weights(loss: LossConfig, labels: np.ndarray, draws: np.ndarray | None = None) -> torch.Tensor:
    weights = attribute_weights(loss, SCHEMA, labels, draws)
    assert weights is not None
    return weights


@pytest.mark.parametrize("kind", KINDS)
def test_weights_move_attention_and_keep_the_size(kind: str) -> None:
    head = make_head(kind, SCHEMA)
    raw, labels = example(kind)
    counts = np.isfinite(labels).sum(0)
    weights = _weights(LossConfig(weights={"humor": 3.0}), labels).double()
    assert weights[1] == pytest.approx(3 * float(weights[0])) and weights[0] == weights[2]
    assert float((weights * torch.tensor(counts)).sum()) == pytest.approx(counts.sum(), rel=1e-6)
    objective = Objective(head, weights=weights)
    check(objective, lambda x: reference(kind, x, labels, weights.tolist()), raw, labels)


def test_balanced_attributes_weigh_the_same_however_many_labels_they_have() -> None:
    labels = np.full((12, 3), np.nan)
    labels[:, 0], labels[:2, 1] = 1, 1  # 12, 2 and 0 labels
    balance = LossConfig(balance="inverse_frequency")
    assert (_weights(balance, labels) * torch.tensor([12, 2, 0])).tolist() == pytest.approx([7, 7, 0])
    draws = np.array([3.0] * 2 + [1.0] * 10)  # the rows with humor are drawn three times an epoch
    weights = _weights(balance, labels, draws)
    assert (weights * torch.tensor([16, 6, 0])).tolist() == pytest.approx([11, 11, 0])
    double = _weights(LossConfig(balance="inverse_frequency", weights={"humor": 2}), labels)
    assert (double * torch.tensor([12, 2, 0])).tolist() == pytest.approx([14 / 3, 28 / 3, 0])
    assert attribute_weights(LossConfig(), SCHEMA, labels) is None


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_few_annotators_lean_towards_the_mean(kind: str) -> None:
    head = make_head(kind, SCHEMA)
    raw, labels = example(kind)
    mean = mean_target(head, labels).double()
    annotators = torch.tensor([1, 3, 5, math.nan, math.nan, 2], dtype=torch.float64)
    objective = Objective(head, LossConfig(smoothing=2.0), mean=mean)
    total, count, gradient = run(objective, raw, labels, label_counts=annotators)
    expected = 0.0
    for row, numbers in enumerate(raw):
        n = float(annotators[row])
        trust = 1.0 if math.isnan(n) else n / (n + 2)
        columns = np.split(mean.numpy(), np.cumsum([1, 1] if kind == "regression" else [5, 3]))
        parts = np.split(numbers, np.cumsum(WIDTHS[kind])[:-1])
        for part, label, (low, _), prior in zip(parts, labels[row], RANGES, columns, strict=True):
            if math.isnan(label):
                continue
            if kind == "regression":
                expected += (part[0] - trust * label - (1 - trust) * prior[0]) ** 2
            else:
                expected += trust * label_loss(kind, part, label, low)
                expected -= (1 - trust) * float(prior @ np.log(distribution(kind, part)))
    assert total == pytest.approx(expected, rel=1e-6) and count == np.isfinite(labels).sum()
    assert not gradient[2].any()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"humour": 2.0}, "loss.weights.humour: no such attribute; did you mean 'humor'"),
        ({"humor": -1.0}, "loss.weights.humor=-1.0: expected at least 0"),
        ({"humor": 0.0, "quality": 0.0, "refusal": 0.0}, "loss.weights leaves no label"),
    ],
)
def test_weights_that_make_no_sense(weights: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attribute_weights(LossConfig(weights=weights), SCHEMA, np.ones((2, 3)))


def test_a_pair_of_equal_values_is_right_half_the_time() -> None:
    objective = Objective(
        make_head("regression", SCHEMA), LossConfig(kind="none", preference="regular", preference_attribute="humor")
    )
    humor = [2.0, 1.0, 1.0, 1.0, 0.5, 1.5, 7.0]  # above, equal, below, and a row without a partner
    raw = torch.tensor([[0.0, value, 0.0] for value in humor], dtype=torch.float64)
    strength = torch.tensor([1.0, math.nan, 1.0, math.nan, 1.0, math.nan, math.nan])
    total, count, kept = objective(raw, {"strength": strength})
    expected = sum(-math.log(sigmoid(difference)) for difference in (1.0, 0.0, -1.0))
    assert count == 3 and kept["preference"].tolist() == pytest.approx([expected, 1.5, 3.0])
    assert float(total) == pytest.approx(expected)
