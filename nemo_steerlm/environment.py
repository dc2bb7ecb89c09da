"""Environment variables to set before torch is imported."""

from __future__ import annotations

import os
from collections.abc import MutableMapping


def set_defaults(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set variables for training on GPUs, which CUDA reads once; the user's own values take precedence.

    With one hardware queue kernels start in the order of their launch, on which megatron-core's overlap of tensor and
    sequence parallelism with the matrix products relies (``tensor_parallel/layers.py``). Expandable segments keep
    batches of varying lengths from fragmenting memory.
    """
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if "PYTORCH_CUDA_ALLOC_CONF" not in environment:  # the older name of the same
        environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
