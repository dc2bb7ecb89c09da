"""megatron-core's own forward pass, which our decoding and reading are compared with."""

from __future__ import annotations

import torch
import torch.distributed as dist

from nemo_steerlm.megatron import gpt


def forward(model: gpt.LanguageModel, tokens: torch.Tensor) -> torch.Tensor | None:
    """Run `tokens` `[batch, seq]` through all pipeline stages, with causal attention.

    Returns:
        The last stage's output (logits `[batch, seq, vocabulary / tp]` or values `[batch, seq, K]`); None on the
        other stages.
    """
    from megatron.core import parallel_state

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
