"""Draw tokens from logits: temperature, top-k, top-p, with random numbers of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nemo_steerlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How responses are drawn.

    Attributes:
        max_new_tokens: most tokens, the one that ends the response included. A row also ends at the model's
            `max_position_embeddings`.
        temperature: 0 takes the most likely token (the lowest id among equals); otherwise logits are divided by it.
        top_k: draw from the k most likely tokens only, and those that equal the k-th; 0 for all.
        top_p: then from the smallest set of most likely tokens whose probability reaches this, and those that equal
            the last of it; 1 for all ("The Curious Case of Neural Text Degeneration", arXiv 1904.09751).
        stop: texts that end a response, however they are tokenised; they are not part of it.
        seed: determines a row's draws, together with the row's own seed.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value is out of range.
        """
        for name, valid, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (no limit) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("stop", isinstance(self.stop, tuple) and all(self.stop), "a tuple of texts, none of them empty"),
        ):
            if not valid:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected {expected}")


def uniforms(settings: SamplingSettings, seeds: Sequence[int], steps: int) -> np.ndarray:
    """Numbers in [0, 1) `[rows, steps]`: a row's depend on (`settings.seed`, its seed) alone, not on `steps`."""
    keys = [np.array([settings.seed % 2**64, seed % 2**64], np.uint64) for seed in seeds]
    return np.stack([np.random.Generator(np.random.Philox(key=key)).random(steps) for key in keys])


def draw(logits: torch.Tensor, settings: SamplingSettings, uniform: torch.Tensor | None) -> torch.Tensor:
    """Choose one token a row.

    The filtered probabilities are in the order of the ids, not sorted by size: rounding then cannot swap two tokens
    with nearly equal logits and change the draw. On CUDA nothing waits for the device.

    Args:
        logits: `[rows, vocabulary]`, fp32.
        uniform: float64 `[rows]` in [0, 1), beside the logits; None with temperature 0.

    Returns:
        Ids `[rows]` on the logits' device.
    """
    if uniform is None:
        return logits.argmax(-1)
    return (_with_torch if logits.is_cuda else _with_numpy)(logits, settings, uniform)


def _with_torch(logits: torch.Tensor, settings: SamplingSettings, uniform: torch.Tensor) -> torch.Tensor:
    """On any device, in float64."""
    highest, top_k = logits.amax(-1, keepdim=True), min(settings.top_k or logits.shape[1], logits.shape[1])

    def weights_of(logits: torch.Tensor) -> torch.Tensor:
        return logits.double().sub_(highest).div_(settings.temperature).exp_()

    weights = weights_of(logits)
    if settings.top_p < 1 or top_k < logits.shape[1]:
        largest = logits.topk(top_k).values
        weights.masked_fill_(logits < largest[:, -1:], 0.0)
        if settings.top_p < 1:
            descending = weights_of(largest)
            before = descending.cumsum(-1) - descending
            inside = (before < settings.top_p * weights.sum(-1, keepdim=True)).sum(-1, keepdim=True)
            weights.masked_fill_(weights < descending.gather(1, inside - 1), 0.0)
    # A GPU sums each prefix in another order, so the border of a filtered token may differ from the one before it: it
    # gets none.
    borders = weights.cumsum(-1).masked_fill_(weights == 0, 0.0)
    return (borders > uniform[:, None] * borders.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)


def _with_numpy(logits: torch.Tensor, settings: SamplingSettings, uniform: torch.Tensor) -> torch.Tensor:
    """The same on the CPU, where NumPy's partition and sort are several times as fast as torch's."""
    values, ids = logits.numpy(), None
    if 0 < settings.top_k < logits.shape[1]:
        values, ids = _largest(values, settings.top_k)
    scaled = values.astype(np.float64)
    scaled -= scaled.max(-1, keepdims=True)
    scaled /= settings.temperature
    weights = np.exp(scaled, out=scaled)
    if settings.top_p < 1:
        descending = -np.sort(-weights, axis=-1)
        before = descending.cumsum(-1) - descending
        inside = (before < settings.top_p * descending.sum(-1, keepdims=True)).sum(-1)
        weights[weights < np.take_along_axis(descending, inside[:, None] - 1, -1)] = 0
    borders = weights.cumsum(-1)
    limits = uniform.numpy()[:, None] * borders[:, -1:]  # below the last border: uniform <= 1 - 2**-53
    index = (borders <= limits).sum(-1)
    return torch.from_numpy(index if ids is None else ids[np.arange(len(ids)), index])


def _largest(array: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and ids `[rows, m]` of each row's k largest logits and those equal to the k-th, in the order of the ids.

    Rows with fewer than m end in -inf.
    """
    size = array.shape[1]
    smallest = np.partition(array, size - k, axis=-1)[:, size - k, None]
    flat = np.flatnonzero(array >= smallest)
    rows, found = np.divmod(flat, size)
    counts = np.bincount(rows, minlength=len(array))
    columns = np.arange(len(flat)) - np.repeat(counts.cumsum() - counts, counts)
    values = np.full((len(array), counts.max()), -np.inf, array.dtype)
    ids = np.zeros(values.shape, np.int64)
    values[rows, columns], ids[rows, columns] = array[rows, found], found
    return values, ids
