"""One forward pass without gradients, through however many pipeline stages there are."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_steerlm.megatron.gpt import LanguageModel


def forward(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor | None:
    """Run `tokens` `[batch, seq]` through all pipeline stages, with causal attention.

    Returns:
        The last stage's output (logits `[batch, seq, vocabulary / tp]` or values `[batch, seq, K]`); None on the
        other stages.
    """
    config, group = model.config, parallel_state.get_pipeline_model_parallel_group()
    assert not config.sequence_parallel, "inference models are built without sequence parallelism"
    if not model.pre_process:
        batch, length = tokens.shape
        hidden = torch.empty(length, batch, config.hidden_size, dtype=config.params_dtype, device=tokens.device)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank(), group=group)
        model.set_input_tensor(hidden)
    output = model(tokens, None, None)
    if model.post_process:
        return output
    dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group=group)
    return None


def broadcast_from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """Give every pipeline stage the last stage's `tensor` (same shape and type everywhere, filled in place)."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(tensor, source, group=parallel_state.get_pipeline_model_parallel_group())
    return tensor
