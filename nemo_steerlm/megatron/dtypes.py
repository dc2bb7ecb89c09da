"""Number formats: every name that one has, and torch's type for it."""

from __future__ import annotations

import torch

from nemo_steerlm.config import ComputeConfig, ExportConfig, choices

#: Of `trainer.precision`: what weights and activations are kept in. fp8: the matrix products alone are in it.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
#: Of `export dtype=` and of Hugging Face's config.json.
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Of safetensors files.
SAFETENSORS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
assert tuple(PRECISIONS) == choices(ComputeConfig, "precision") and tuple(STORED) == choices(ExportConfig, "dtype")


def name(dtype: torch.dtype) -> str:
    """The name in `STORED`."""
    return str(dtype).removeprefix("torch.")
