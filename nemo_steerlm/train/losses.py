"""Losses as sums and counts, so that the mean is taken once, over the whole global batch.

A mean of micro-batch means weights labels by how the batch happened to be cut (a defect of the reference); everything
here returns `(sum, count)` and megatron-core divides the summed gradient by the summed count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import LossConfig
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.models.heads import Head


class Objective:
    """What the training of a regressor minimises: the mean over the terms of a global batch.

    A term is a label that is present, or a preference pair. A label's loss is the head's own (or Huber's) times the
    weight of its attribute, a pair's is that of `preference_loss` times `loss.preference_weight`. The sum of all terms
    is divided by their number, labels plus pairs, not by their summed weights: so a rare attribute counts the same in
    a batch that has no other. The weights of the labels have a mean of 1 over the training data; they shift weight
    between attributes and keep the scale of the loss.

    Args:
        head: the regressor's.
        loss: the configuration.
        weights: of each attribute, `[K]`; see `attribute_weights`.
        mean: the mean target of the training data `[C]`, which smoothing shrinks to; see `mean_target`.

    Raises:
        ConfigError: a loss that the head does not have, no loss at all, or a preference for an unknown attribute.
    """

    def __init__(
        self,
        head: Head,
        loss: LossConfig | None = None,
        weights: torch.Tensor | None = None,
        mean: torch.Tensor | None = None,
    ) -> None:
        self.head, self.loss, self.weights = head, loss or LossConfig(), weights
        self.mean = None if mean is None else mean.nan_to_num(0.0)
        self.label_loss: Callable[..., torch.Tensor] = head.loss
        self.preferred = check_loss(head, self.loss)
        if self.loss.kind == "huber":
            self.label_loss = partial(F.huber_loss, reduction="none", delta=self.loss.huber_delta)

    def __call__(
        self, raw: torch.Tensor, batch: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Sum and count (int) of the terms of one micro-batch.

        Args:
            raw: the head's raw outputs, `[samples, R]` in fp32.
            batch: what `collate_regression` makes; `label_counts` is read where labels are smoothed, `strength` where
                pairs are trained on.

        Returns:
            The sum, the count, and with pairs `preference` `[3]`: the unweighted sum of their losses, how many are in
            the right order (equal values count half), and their number.
        """
        parts = [self._labels(raw, batch)] if self.loss.kind != "none" else []
        if self.preferred is None:
            return *parts[0], {}
        total, right, count = self._pairs(raw, batch["strength"])
        parts.append((self.loss.preference_weight * total, count))
        sums, counts = zip(*parts, strict=True)
        return sum(sums), sum(counts), {"preference": torch.stack((total.detach(), right, count.to(total)))}

    def _pairs(self, raw: torch.Tensor, strength: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, correct order and number of the pairs: samples with a strength are preferred to the one after them."""
        values = self.head.values(raw)[:, self.preferred]
        difference, strength = values[:-1] - values[1:], strength[:-1]
        present = ~torch.isnan(strength)
        losses = preference_loss(self.loss.preference, difference, strength.nan_to_num(0.0))
        above = torch.heaviside(difference.detach(), difference.new_full((), 0.5))  # an equal score wins half the time
        right = torch.where(present, above, 0.0).sum()
        return torch.where(present, losses, 0.0).sum(), right, present.sum().int()

    def _labels(self, raw: torch.Tensor, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        labels = batch["labels"]
        present = ~torch.isnan(labels)
        target = self._smoothed(self.head.target(labels.nan_to_num(0.0)), batch)
        losses = self.label_loss(raw, target)
        if self.weights is not None:
            self.weights = self.weights.to(losses)  # once
            losses = losses * self.weights
        return torch.where(present, losses, 0.0).sum(), present.sum().int()

    def _smoothed(self, target: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """Add `loss.smoothing` pseudo-annotators who give the mean: labels of few annotators shrink the most."""
        if not self.loss.smoothing or self.mean is None:
            return target
        self.mean = self.mean.to(target)  # once
        strangers = self.loss.smoothing / (batch["label_counts"] + self.loss.smoothing)
        return target + strangers.nan_to_num(0.0)[:, None] * (self.mean - target)


def preference_loss(kind: str, difference: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry losses of HelpSteer2-Preference (arXiv 2410.01257), one per pair.

    Args:
        kind: "regular": -log s(d); "margin": -log s(d - m); "scaled": -m log s(d), where s is the logistic function.
        difference: d, the chosen response's value minus the rejected one's.
        strength: m, by how much the chosen response was preferred.
    """
    if kind == "margin":
        difference = difference - strength
    losses = -F.logsigmoid(difference)
    return strength * losses if kind == "scaled" else losses


def check_loss(head: Head, loss: LossConfig) -> int | None:
    """The index of the attribute that preferences train, None without preferences.

    Raises:
        ConfigError: a loss that the head does not have, no loss at all, or a preference for an unknown attribute.
    """
    if head.kind == "generative":
        _refuse_all(loss)
    loss.validate("loss.")
    loss.check_names(head.schema)
    if loss.kind in ("mse", "huber") and head.kind != "regression":
        raise ConfigError(
            f"loss.kind={loss.kind} is for head=regression; leave it out: head={head.kind} has its own loss"
        )
    return None if loss.preference == "none" else head.schema.names.index(str(loss.preference_attribute))


def _refuse_all(loss: LossConfig) -> None:
    for field in dataclasses.fields(loss):
        if getattr(loss, field.name) != getattr(LossConfig(), field.name):
            raise ConfigError(
                f"loss.{field.name}={getattr(loss, field.name)} is not for head=generative, whose loss is the "
                "cross-entropy of the attribute string; leave it out"
            )


def attribute_weights(
    loss: LossConfig, schema: AttributeSchema, labels: np.ndarray, draws: np.ndarray | None = None
) -> torch.Tensor | None:
    """The weight of each attribute `[K]`, with a mean of 1 over the labels; None where all weigh the same.

    Args:
        loss: `weights`, and `balance`: "inverse_frequency" divides by the number of labels, so that attributes of
            equal weight contribute equally over an epoch, however many labels each has.
        schema: the attributes.
        labels: of the training data, `[items, K]`, NaN where missing.
        draws: how often an epoch draws each item, `[items]`; None = once.

    Raises:
        ConfigError: a weight for an attribute that is not in the schema, a negative one, or nothing but zeros.
    """
    loss.validate("loss.")
    loss.check_names(schema)
    if not loss.weights and loss.balance is None:
        return None
    present = ~np.isnan(labels)
    counts = (present if draws is None else present * draws[:, None]).sum(0, dtype=np.float64)
    weights = np.array([loss.weights.get(name, 1.0) for name in schema.names])
    if loss.balance is not None:
        weights /= np.maximum(counts, 1.0)
    total = float((weights * counts).sum())
    if total <= 0:
        raise ConfigError("loss.weights leaves no label with a weight; give a labelled attribute more than 0")
    return torch.tensor(weights * counts.sum() / total, dtype=torch.float32)


def mean_target(head: Head, labels: np.ndarray, draws: np.ndarray | None = None) -> torch.Tensor:
    """Mean `[C]` of the targets of labels `[items, K]` (NaN = missing); NaN for an attribute without labels.

    `draws` as in `attribute_weights`.
    """
    tensor = torch.from_numpy(np.array(labels, np.float32))
    present = ~torch.isnan(tensor)
    targets = head.target(tensor.nan_to_num(0.0))
    weights = torch.ones(len(labels)) if draws is None else torch.from_numpy(draws).float()
    seen = head.spread(present * weights[:, None])
    return (targets * seen).sum(0) / seen.sum(0)
