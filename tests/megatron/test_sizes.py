"""The shapes in conf/model have the parameter counts of the models they are named after."""

from __future__ import annotations

import math

import pytest
from omegaconf import OmegaConf

from nemo_steerlm.config import Architecture
from tests.distributed import ROOT

# as the published checkpoints count themselves
COUNTS = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_1_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama_260k": 260_032,
    "mistral_7b": 7_248_023_552,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
}


def _parameters(name: str) -> int:
    from nemo_steerlm.formats.hf_config import tensor_shapes

    values = OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml").architecture
    architecture = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Architecture), values))
    assert isinstance(architecture, Architecture)
    return sum(math.prod(shape) for shape in tensor_shapes(architecture).values())


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    assert _parameters(name) == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "embedding", "others"),
    [("nemotron_4_15b", 3.2e9, 12.5e9), ("nemotron_4_340b", 9.4e9, 331.6e9)],  # as their reports say
)
def test_nemotron_has_the_parameters_of_its_report(name: str, embedding: float, others: float) -> None:
    values = OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml").architecture
    tables = 2 * values.vocab_size * values.hidden_size
    assert tables == pytest.approx(embedding, rel=0.02)
    assert _parameters(name) - tables == pytest.approx(others, rel=0.01)


def test_the_43b_shape_has_43_billion() -> None:
    assert _parameters("gpt_43b") == pytest.approx(43e9, rel=0.03)
