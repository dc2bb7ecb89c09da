"""Fixtures of more than one file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.formats.helpers import SHAPES, make_model, sample_tokens


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each shape as a Hugging Face folder, with the logits of transformers beside it."""
    folders = {}
    for shape in SHAPES:
        folders[shape] = tmp_path_factory.mktemp("hf") / shape
        model = make_model(folders[shape], shape)
        with torch.no_grad():
            save_file({"logits": model(sample_tokens(shape)).logits}, folders[shape].with_suffix(".logits"))
    return folders
