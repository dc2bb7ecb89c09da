"""Configurations of Hugging Face folders: read, written, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_steerlm.config import Architecture, RopeScaling
from nemo_steerlm.errors import CheckpointError
from nemo_steerlm.formats import hf_config
from tests.formats.helpers import to_folder


def test_config_round_trip() -> None:
    from transformers import LlamaConfig

    architecture = Architecture(
        num_layers=3, hidden_size=48, ffn_hidden_size=80, num_attention_heads=6, num_query_groups=3, head_dim=10,
        vocab_size=77, max_position_embeddings=99, norm_epsilon=3e-6, rope_theta=123456.0, tie_word_embeddings=True,
        rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=512), init_std=0.03,
    )  # fmt: skip
    data = hf_config.config_from_architecture(architecture, "bfloat16")
    assert hf_config.architecture_from_config(data, "here") == architecture
    # transformers reads it, and what transformers writes in its own notation is read back as the same
    theirs = LlamaConfig.from_dict(data)
    assert theirs.num_key_value_heads == 3 and str(theirs.dtype).endswith("bfloat16")
    assert hf_config.architecture_from_config(json.loads(theirs.to_json_string(use_diff=False)), "") == architecture
    # keys that are left out mean the same as in transformers
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    short = {"model_type": "llama", **{key: data[key] for key in sizes}}
    full = json.loads(LlamaConfig.from_dict(short).to_json_string(use_diff=False))
    assert hf_config.architecture_from_config(short, "") == hf_config.architecture_from_config(full, "")


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "gemma"}, "model_type is 'gemma'"),
    "attention bias": ({"attention_bias": True}, "attention_bias is True"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "quantised, by name": ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights (gptq)"),
    "token classifier": ({"architectures": ["LlamaForTokenClassification"]}, "Classification, a token classifier;"),
    "headless": ({"architectures": ["LlamaModel"]}, "architectures names LlamaModel, a backbone without a head"),
    "reward model": ({"architectures": ["LlamaForRewardModel"]}, "RewardModel, a model of another task"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    "linear, old notation": ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
    "half a llama3": ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "lacks low_freq_factor"),
    "no sizes": ({"hidden_size": None}, "hidden_size is None"),
    "shapes of another": ({"intermediate_size": 96}, "gate_proj.weight has shape [88, 64], its configuration asks"),
    "more layers": ({"num_hidden_layers": 5}, "9 tensors are missing: model.layers.4.input_layernorm"),
    "fewer layers": ({"num_hidden_layers": 3}, "9 tensors that a llama model does not have: model.layers.3"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_refuses_config(models: dict[str, Path], tmp_path: Path, case: str) -> None:
    change, message = BAD_CONFIGS[case]
    source = shutil.copytree(models["llama2"], tmp_path / "in")
    data = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(data | change))
    with pytest.raises(CheckpointError) as caught:
        to_folder(source, tmp_path / "out")
    assert message in str(caught.value) and str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [source], "nothing half-written"
