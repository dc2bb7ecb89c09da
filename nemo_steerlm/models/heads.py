"""Heads of the regressor: values, targets and losses of its raw outputs.

The network's last layer gives R raw outputs a text (`megatron.gpt.RegressionModel`, one fp32 linear layer for every
kind of head). A head defines how many it needs for K attributes, the values `[n, K]` they stand for, the training
targets and the loss. It has no weights of its own. Shapes: `n` texts, `C` columns of a target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import HEADS


class Head(ABC):
    """The head of a schema's attributes, in its order.

    Attributes:
        outputs: R, raw outputs a text.
        columns: C, numbers of a target; several of them may belong to one attribute.
    """

    kind: ClassVar[str]

    def __init__(self, schema: AttributeSchema) -> None:
        self.schema = schema
        self.outputs = self.columns = len(schema)

    @abstractmethod
    def values(self, raw: torch.Tensor) -> torch.Tensor:
        """Expected values `[n, K]`, on the attributes' own scale, of raw outputs `[n, R]`."""

    @abstractmethod
    def target(self, labels: torch.Tensor) -> torch.Tensor:
        """The targets `[n, C]` of labels `[n, K]` (none missing); linear between two integer levels."""

    @abstractmethod
    def loss(self, raw: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Loss of every label `[n, K]` for raw outputs `[n, R]` and targets `[n, C]`."""

    @abstractmethod
    def start(self, mean: torch.Tensor) -> torch.Tensor:
        """The raw outputs `[R]` that stand for the mean target `[C]` (NaN = unknown)."""

    def spread(self, per_attribute: torch.Tensor) -> torch.Tensor:
        """Repeat `[n, K]` for the columns of each attribute: `[n, C]`."""
        return per_attribute


class RegressionHead(Head):
    """One number an attribute, its value; squared error (HelpSteer, arXiv 2311.09528, section 4.4)."""

    kind = "regression"

    def values(self, raw: torch.Tensor) -> torch.Tensor:
        """The raw outputs."""
        return raw

    def target(self, labels: torch.Tensor) -> torch.Tensor:
        """The labels."""
        return labels

    def loss(self, raw: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Squared error."""
        return (raw - target).square()

    def start(self, mean: torch.Tensor) -> torch.Tensor:
        """The mean itself, zero where unknown."""
        return mean.nan_to_num(0.0)


class LevelHead(Head):
    """A distribution over the levels low, low + 1, ..., high of every attribute; its mean is the value.

    The target is a histogram: a label between two levels counts for both, nearer for more, so that the histogram's
    mean is the label. The loss is the cross-entropy between histogram and distribution.

    Attributes:
        temperatures: of each attribute, from a calibration: its distribution is the softmax of log-probabilities over
            the temperature, flatter above 1 and sharper below. None, as in training, for the distribution itself.
    """

    temperatures: Sequence[float] | None = None

    def __init__(self, schema: AttributeSchema) -> None:
        super().__init__(schema)
        self.sizes = [attribute.high - attribute.low + 1 for attribute in schema]
        self.columns = sum(self.sizes)

    @abstractmethod
    def log_probabilities(self, raw: torch.Tensor) -> list[torch.Tensor]:
        """Of each attribute the log-probabilities of its levels, `[n, levels]`, of raw outputs `[n, R]`."""

    def probabilities(self, raw: torch.Tensor) -> torch.Tensor:
        """The probabilities of all levels of all attributes, one after another, `[n, C]`."""
        logs = self.log_probabilities(raw)
        if self.temperatures is not None:
            logs = [(part / t).log_softmax(-1) for part, t in zip(logs, self.temperatures, strict=True)]
        return torch.cat(logs, dim=-1).exp()

    def values(self, raw: torch.Tensor) -> torch.Tensor:
        """The distributions' means."""
        return self.means(self.probabilities(raw))

    def means(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Values `[n, K]` of `probabilities` `[n, C]`."""
        parts = zip(probabilities.split(self.sizes, dim=-1), self._levels(probabilities), strict=True)
        return torch.stack([(part * levels).sum(-1) for part, levels in parts], dim=-1)

    def target(self, labels: torch.Tensor) -> torch.Tensor:
        """Histograms, one after another."""
        parts = zip(labels.unbind(-1), self._levels(labels), strict=True)
        return torch.cat([(1 - (label[..., None] - levels).abs()).clamp(min=0) for label, levels in parts], dim=-1)

    def loss(self, raw: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy, in nats."""
        parts = zip(target.split(self.sizes, dim=-1), self.log_probabilities(raw), strict=True)
        return torch.stack([-(histogram * logs).sum(-1) for histogram, logs in parts], dim=-1)

    def start(self, mean: torch.Tensor) -> torch.Tensor:
        """Those of the mean histogram, its levels clamped to at least 0.001."""
        parts = [part.nan_to_num(1.0).clamp(min=1e-3) for part in mean.split(self.sizes)]
        return torch.cat([self._start(part / part.sum()) for part in parts])

    def spread(self, per_attribute: torch.Tensor) -> torch.Tensor:
        """One number an attribute, for all of its levels."""
        return per_attribute.repeat_interleave(torch.tensor(self.sizes, device=per_attribute.device), dim=-1)

    def _levels(self, like: torch.Tensor) -> list[torch.Tensor]:
        return [torch.arange(a.low, a.high + 1, dtype=like.dtype, device=like.device) for a in self.schema]

    @abstractmethod
    def _start(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The raw outputs of one attribute that give these probabilities of its levels."""


class DistributionHead(LevelHead):
    """One raw number a level: softmax."""

    kind = "distribution"

    def __init__(self, schema: AttributeSchema) -> None:
        super().__init__(schema)
        self.outputs = self.columns

    def log_probabilities(self, raw: torch.Tensor) -> list[torch.Tensor]:
        """Log-softmax."""
        return [part.log_softmax(-1) for part in raw.split(self.sizes, dim=-1)]

    def _start(self, probabilities: torch.Tensor) -> torch.Tensor:
        return probabilities.log()


class OrdinalHead(LevelHead):
    """Cumulative link model with the logistic link (McCullagh, 1980): P(y > level j) = sigmoid(c_j), c_j falls with j.

    An attribute of L levels has L - 1 raw outputs: c_0, and the inverse softplus of each step from c_j down to c_j+1.
    So the thresholds are in order whatever the weights are. The steps may depend on the text: a text on which
    annotators disagree can have a wider distribution, which thresholds shared by all texts would not allow.
    """

    kind = "ordinal"

    def __init__(self, schema: AttributeSchema) -> None:
        super().__init__(schema)
        self.outputs = self.columns - len(schema)

    def log_probabilities(self, raw: torch.Tensor) -> list[torch.Tensor]:
        """Differences of neighbouring sigmoids, in logarithms throughout.

        sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), and with a - b = softplus(g) the last factor
        is sigmoid(g).
        """
        result = []
        for part in raw.split([size - 1 for size in self.sizes], dim=-1):
            steps = torch.cat((torch.zeros_like(part[..., :1]), F.softplus(part[..., 1:])), dim=-1)
            above = part[..., :1] - steps.cumsum(-1)
            inner = F.logsigmoid(above[..., :-1]) + F.logsigmoid(-above[..., 1:]) + F.logsigmoid(part[..., 1:])
            ends = F.logsigmoid(-above[..., :1]), F.logsigmoid(above[..., -1:])
            result.append(torch.cat((ends[0], inner, ends[1]), dim=-1))
        return result

    def _start(self, probabilities: torch.Tensor) -> torch.Tensor:
        above = (1 - probabilities.cumsum(0)[:-1]).logit()
        return torch.cat((above[:1], (above[:-1] - above[1:]).expm1().log()))


class GenerativeHead(DistributionHead):
    """The levels' tokens of a language model: raw outputs are their logits (`models.generative`)."""

    kind = "generative"


_KINDS: dict[str, type[Head]] = {
    cls.kind: cls for cls in (RegressionHead, OrdinalHead, DistributionHead, GenerativeHead)
}
assert tuple(_KINDS) == HEADS


def make_head(kind: str, schema: AttributeSchema) -> Head:
    """The head of this name (`nemo_steerlm.config.HEADS`)."""
    return _KINDS[kind](schema)
