"""Simulated annotators: a pool of raters with their own bias, noise and disagreement, who skip some labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class AnnotatorPool:
    """How annotators label in the synthetic world.

    Each response is rated by `votes` different raters of the pool. `contrast` stretches the true value away from the
    middle of the scale, which compensates for the shrinkage that clamping votes to the scale causes. A vote is the
    stretched value plus the rater's bias for the attribute, plus an error that all raters of this response share, plus
    noise; it is rounded and clamped to the scale. The label is the rounded mean of the votes.

    Attributes:
        raters: Size of the pool.
        votes: Number of raters per response.
        bias: Standard deviation of the raters' biases, in levels.
        ambiguity: Standard deviation of the error that all raters of a response share, in levels.
        noise: Standard deviation of a vote's own noise, in levels.
        contrast: Factor by which raters stretch distances from the middle of the scale.
        missing: Share of labels that are missing.
        low: Lowest vote.
        high: Highest vote.
    """

    raters: int = 12
    votes: int = 3
    bias: float = 0.5
    ambiguity: float = 0.9
    noise: float = 1.0
    contrast: float = 1.4
    missing: float = 0.2
    low: int = 0
    high: int = 4

    def draw_biases(self, generator: np.random.Generator, attributes: int) -> np.ndarray:
        """Biases `[raters, attributes]` of one pool of annotators, in levels."""
        return generator.normal(0, self.bias, (self.raters, attributes))

    def rate(self, truth: np.ndarray, biases: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Labels of responses with known true values.

        Args:
            truth: True values `[rows, attributes]`, in levels.
            biases: The raters, from `draw_biases`.
            generator: Source of randomness.

        Returns:
            Whole numbers from `low` to `high` as floats `[rows, attributes]`, NaN where the label is missing.
        """
        rows = len(truth)
        who = np.argsort(generator.random((rows, self.raters)), axis=1)[:, : self.votes]
        middle = (self.low + self.high) / 2
        seen = middle + self.contrast * (truth - middle) + generator.normal(0, self.ambiguity, truth.shape)
        noise = generator.normal(0, self.noise, (rows, self.votes, truth.shape[1]))
        votes = np.clip(np.rint(seen[:, None] + biases[who] + noise), self.low, self.high)
        labels = np.rint(votes.mean(axis=1))
        labels[generator.random(labels.shape) < self.missing] = np.nan
        return labels
