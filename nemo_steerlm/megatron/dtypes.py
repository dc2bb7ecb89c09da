"""Number formats: their names, and torch's type for each."""

from __future__ import annotations

import torch

from nemo_steerlm.config import ComputeConfig, ExportConfig, choices

#: Of `trainer.precision`: the type of weights and activations. With fp8 only the matrix products are in fp8.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
#: Of `export dtype=` and of Hugging Face's config.json.
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Of safetensors files.
SAFETENSORS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
assert tuple(PRECISIONS) == choices(ComputeConfig, "precision") and tuple(STORED) == choices(ExportConfig, "dtype")


def name(dtype: torch.dtype) -> str:
    """The name in `STORED`."""
    return str(dtype).removeprefix("torch.")
