"""Losses as sums and counts, so that the mean is taken once, over the whole global batch.

A mean of micro-batch means weights labels by how the batch happened to be cut (a defect of the reference); every
function here returns `(sum, count)` and megatron-core divides the summed gradient by the summed count.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy


def masked_mse(values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error over the labels that are present (HelpSteer, arXiv 2311.09528; NaN = missing).

    Args:
        values: predictions `[batch, K]` in fp32.
        labels: `[batch, K]`, NaN where a label is missing.

    Returns:
        The sum over present labels, and their number (int).
    """
    present = ~torch.isnan(labels)
    error = torch.where(present, values - torch.nan_to_num(labels), 0.0)
    return (error * error).sum(), present.sum().int()


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token cross-entropy of the tokens that carry loss.

    Args:
        logits: this tensor-parallel rank's part `[n, padded vocabulary / tp]`; may be changed in place.
        targets: `[n]` token ids.
        vocab_size: the true size; columns that only pad the vocabulary take no part.

    Returns:
        The sum over the tokens in fp32, and their number (int).
    """
    rows = logits.float()
    first = parallel_state.get_tensor_model_parallel_rank() * rows.shape[-1]
    real = max(0, vocab_size - first)  # columns of this rank that stand for tokens
    if real < rows.shape[-1]:
        rows[:, real:] = torch.finfo(torch.float32).min
    count = torch.tensor(len(targets), dtype=torch.int, device=targets.device)
    return vocab_parallel_cross_entropy(rows, targets).sum(), count
