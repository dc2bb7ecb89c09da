"""Weights on disk: model folders, Hugging Face, GGUF and llama2.c; not the checkpoints of a training."""

import nemo_steerlm.megatron  # noqa: F401  (before megatron-core: the CPU backend)
