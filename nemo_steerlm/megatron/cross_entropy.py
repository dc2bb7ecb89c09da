"""Cross-entropy of next tokens over a vocabulary that is sharded over tensor-parallel ranks."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token cross-entropy of the tokens that carry loss: the sum in fp32, and their number (int).

    Arguments as `token_losses`.
    """
    count = targets.new_full((), len(targets), dtype=torch.int)
    return token_losses(logits, targets, vocab_size).sum(), count


def token_losses(logits: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Cross-entropy of each token, `[n]` in fp32 nats.

    Args:
        logits: this tensor-parallel rank's part `[n, padded vocabulary / tp]`; may be changed in place.
        targets: `[n]` token ids.
        vocab_size: the true size; columns that only pad the vocabulary take no part.
    """
    rows = logits.float()
    first = parallel_state.get_tensor_model_parallel_rank() * rows.shape[-1]
    real = max(0, vocab_size - first)  # columns of this rank that stand for tokens
    if real < rows.shape[-1]:
        rows[:, real:] = torch.finfo(torch.float32).min
    return vocab_parallel_cross_entropy(rows, targets)
