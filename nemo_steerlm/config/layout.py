"""How a model is divided over tensor-parallel ranks and pipeline stages."""

from __future__ import annotations

import math

from nemo_steerlm.config.compute import ParallelConfig
from nemo_steerlm.config.model import Architecture
from nemo_steerlm.errors import ConfigError


def padded_vocabulary(architecture: Architecture) -> int:
    """Rows of the embedding: the true vocabulary rounded up to `pad_vocab_to`, the same for every layout."""
    return math.ceil(architecture.vocab_size / architecture.pad_vocab_to) * architecture.pad_vocab_to


def check_layout(architecture: Architecture, parallel: ParallelConfig) -> None:
    """Refuse a layout that does not divide the model.

    Raises:
        ConfigError: with the key that does not divide and values that do.
    """
    tensor, chunks = parallel.tensor, parallel.pipeline * (parallel.virtual_pipeline or 1)
    for name, size in (
        ("num_attention_heads", architecture.num_attention_heads),
        ("num_query_groups", architecture.key_value_heads),
        ("ffn_hidden_size", architecture.ffn_hidden_size),
        ("padded vocabulary", padded_vocabulary(architecture)),
    ):
        if size % tensor:
            raise ConfigError(
                f"parallel.tensor={tensor} does not divide the model's {name}={size}; "
                f"use one of {[t for t in range(1, size + 1) if size % t == 0][:8]}"
            )
    if parallel.virtual_pipeline and architecture.num_layers % chunks:
        raise ConfigError(
            f"parallel.pipeline={parallel.pipeline} x parallel.virtual_pipeline={parallel.virtual_pipeline} does not "
            f"divide the model's num_layers={architecture.num_layers}"
        )
    if architecture.num_layers < parallel.pipeline:
        raise ConfigError(
            f"parallel.pipeline={parallel.pipeline} exceeds the model's num_layers={architecture.num_layers}"
        )


def last_stage_layers(architecture: Architecture, parallel: ParallelConfig) -> int | None:
    """Layers of the last pipeline stage where an even split is impossible (None where it is possible).

    The other stages hold equally many; the last one, which also has the vocabulary, fewer if possible.
    """
    layers, others = architecture.num_layers, parallel.pipeline - 1
    if layers % parallel.pipeline == 0:
        return None
    each = math.ceil(layers / parallel.pipeline)
    return layers - others * (each if others * each < layers else each - 1)


def stage_layers(architecture: Architecture, parallel: ParallelConfig) -> list[int]:
    """Layers of each pipeline stage, as megatron-core builds them."""
    last = last_stage_layers(architecture, parallel)
    if last is None:
        return [architecture.num_layers // parallel.pipeline] * parallel.pipeline
    others = parallel.pipeline - 1
    return [(architecture.num_layers - last) // others] * others + [last]
